// A linear layer as it crosses the border between Python and the kernels: y = x w^T + bias.
#pragma once

#include "attention_args.h"

namespace pyattn {

struct LinearArgs {
    Dtype dtype = Dtype::float32;  // of all four
    int64_t rows = 0, in = 0, out = 0;
    TensorArg x, w, y;  // [rows, in], [out, in], [rows, out]; last stride 1
    TensorArg bias;     // [out], contiguous, or absent
    int threads = 1;
};

}  // namespace pyattn
