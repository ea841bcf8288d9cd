// Included once by each instruction set's file: instantiates the kernels in its namespace.
#pragma once

#include "backward.h"
#include "forward.h"
#include "limit.h"
#include "linear.h"

namespace pyattn {
namespace PYATTN_ISA {

template <template <class> class Kernel, class Args>
static void run(const Args& args) {
    switch (args.dtype) {
        case Dtype::float32: return Kernel<float>::run(args);
        case Dtype::bfloat16: return Kernel<bfloat16>::run(args);
        case Dtype::float16: return Kernel<float16>::run(args);
        case Dtype::float64: return Kernel<double>::run(args);
    }
}

void attention_fwd(const AttentionArgs& args) { run<Forward>(args); }
void attention_bwd(const AttentionArgs& args) { run<Backward>(args); }
void linear(const LinearArgs& args) { run<Linear>(args); }

}  // namespace PYATTN_ISA
}  // namespace pyattn
