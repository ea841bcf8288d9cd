// Every kernel. An instantiation such as forward<Tensor<half_t, 64, 4, 64, 2>, 0> is one entry point; it runs with
// THREADS threads a block, and pyattn/backends/cuda_config.py says which there are.
#pragma once

#include "backward_bias.cuh"
#include "backward_kv.cuh"
#include "backward_q.cuh"
#include "decode.cuh"
#include "forward.cuh"
