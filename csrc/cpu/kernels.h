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
    with_dtype(args.dtype, [&](auto element) { Kernel<decltype(element)>::run(args); });
}

void attention_fwd(const AttentionArgs& args) { run<Forward>(args); }
void attention_bwd(const AttentionArgs& args) { run<Backward>(args); }
void linear(const LinearArgs& args) { run<Linear>(args); }

}  // namespace PYATTN_ISA
}  // namespace pyattn
