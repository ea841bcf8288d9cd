// AVX-512 with products of bfloat16 pairs.
#define PYATTN_ISA avx512_bf16
#define PYATTN_VECTOR_BYTES 64
#define PYATTN_STRIP_VECTORS 4
#include "kernels.h"
