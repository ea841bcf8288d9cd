// AVX-512: 32 registers of 16 floats.
#define PYATTN_ISA avx512
#define PYATTN_VECTOR_BYTES 64
#define PYATTN_STRIP_VECTORS 4
#include "kernels.h"
