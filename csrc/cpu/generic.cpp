// The compiler's baseline: 16-byte vectors.
#define PYATTN_ISA generic
#define PYATTN_VECTOR_BYTES 16
#define PYATTN_STRIP_VECTORS 2
#include "kernels.h"
