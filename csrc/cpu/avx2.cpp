// AVX2 with FMA: 16 registers of 8 floats.
#define PYATTN_ISA avx2
#define PYATTN_VECTOR_BYTES 32
#define PYATTN_STRIP_VECTORS 2
#include "kernels.h"
