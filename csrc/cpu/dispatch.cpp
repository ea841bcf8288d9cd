#include "dispatch.h"

#include <algorithm>
#include <chrono>

#ifdef PYATTN_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "parallel.h"

namespace pyattn {

#define PYATTN_DECLARE(isa)                    \
    namespace isa {                            \
    void attention_fwd(const AttentionArgs&);  \
    void attention_bwd(const AttentionArgs&);  \
    void linear(const LinearArgs&);            \
    double spin(Dtype, int64_t);               \
    }
#define PYATTN_KERNELS(isa) isa::attention_fwd, isa::attention_bwd, isa::linear, isa::spin

#ifdef PYATTN_X86
PYATTN_DECLARE(avx512_bf16)
PYATTN_DECLARE(avx512)
PYATTN_DECLARE(avx2)
#endif
#ifdef PYATTN_AMX
PYATTN_DECLARE(amx)
#endif
PYATTN_DECLARE(generic)

namespace {

#ifdef PYATTN_X86
// __builtin_cpu_supports also asks the operating system (xgetbv) whether it saves the registers.
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

#ifdef PYATTN_AMX
// A process has to ask Linux for the tiles, once (Documentation/arch/x86/xstate.rst); it refuses where they are missing.
bool has_amx() {
    constexpr unsigned tiles = 1u << 24, bf16 = 1u << 22;
    constexpr long request_permission = 0x1023, tile_data = 18;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & tiles) == 0 || (edx & bf16) == 0) return false;
    static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return granted;
}
#endif

struct Spin {
    const Isa& isa;
    Dtype dtype;
    int64_t rounds;
};

}  // namespace

const Isa kIsas[] = {
#ifdef PYATTN_AMX
    {"amx", has_amx, PYATTN_KERNELS(amx)},
#endif
#ifdef PYATTN_X86
    {"avx512_bf16", has_avx512_bf16, PYATTN_KERNELS(avx512_bf16)},
    {"avx512", has_avx512, PYATTN_KERNELS(avx512)},
    {"avx2", has_avx2, PYATTN_KERNELS(avx2)},
#endif
    {"generic", [] { return true; }, PYATTN_KERNELS(generic)},
    {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr},
};

double multiply_add_rate(const Isa& isa, Dtype dtype, int threads) {
    using Clock = std::chrono::steady_clock;
    const Spin spin{isa, dtype, 1 << 20};
    double best = 0;
    for (int attempt = 0; attempt < 5; ++attempt) {
        const auto start = Clock::now();
        const auto work = [](const void* context, int64_t, void*) {
            const Spin& own = *static_cast<const Spin*>(context);
            own.isa.spin(own.dtype, own.rounds);
        };
        parallel_for(threads, threads, 0, work, &spin);
        const std::chrono::duration<double> seconds = Clock::now() - start;
        // What one round does is the same everywhere.
        best = std::max(best, threads * isa.spin(dtype, 1) * static_cast<double>(spin.rounds) / seconds.count());
    }
    return best;
}

}  // namespace pyattn
