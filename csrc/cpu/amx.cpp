// AVX-512 with products of bfloat16 pairs on AMX tiles.
#define PYATTN_ISA amx
#define PYATTN_VECTOR_BYTES 64
#define PYATTN_STRIP_VECTORS 4
#define PYATTN_AMX
#include "kernels.h"
