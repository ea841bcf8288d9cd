#include "dispatch.h"

namespace pyattn {

#ifdef PYATTN_X86
namespace avx512 {
void attention_fwd(const AttentionArgs&);
void attention_bwd(const AttentionArgs&);
}  // namespace avx512
namespace avx2 {
void attention_fwd(const AttentionArgs&);
void attention_bwd(const AttentionArgs&);
}  // namespace avx2
#endif
namespace generic {
void attention_fwd(const AttentionArgs&);
void attention_bwd(const AttentionArgs&);
}  // namespace generic

const Isa kIsas[] = {
#ifdef PYATTN_X86
    // __builtin_cpu_supports also asks the operating system (xgetbv) whether it saves the registers.
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
     },
     avx512::attention_fwd, avx512::attention_bwd},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::attention_fwd,
     avx2::attention_bwd},
#endif
    {"generic", [] { return true; }, generic::attention_fwd, generic::attention_bwd},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace pyattn
