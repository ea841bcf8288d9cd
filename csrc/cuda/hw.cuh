// What the kernels ask of a GPU: threads, shared memory, number formats, matrix units. The only file that knows PTX and
// architectures. No CUDA header is included, because NVRTC as pip installs it has none.
// tests/cuda_host holds another file of this name, which does the same on a CPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE __device__ __forceinline__
#define INLINE __attribute__((always_inline))  // behind a lambda's parameters: called, it would keep arrays in memory

#include "number.cuh"

// --- Threads, and what they exchange.

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE void barrier() { __syncthreads(); }

// `x` of the lane `from`. Every lane of a warp takes part.
template <class X> DEVICE X shuffle(X x, int from) { return __shfl_sync(~0u, x, from); }
template <class X> DEVICE X shuffle_xor(X x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

extern __shared__ __align__(16) u8 dynamic_shared_memory[];
DEVICE u8* shared_memory() { return dynamic_shared_memory; }
DEVICE void atomic_or(u32* at, u32 bits) { atomicOr(at, bits); }

// --- Arithmetic that is an instruction, or CUDA's own function, in float and in double.

template <class X> DEVICE X infinity();
template <> DEVICE float infinity<float>() { return __int_as_float(0x7f800000); }
template <> DEVICE double infinity<double>() { return __longlong_as_double(0x7ff0000000000000ll); }

DEVICE float exp_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE double exp_2(double x) { return exp2(x); }
DEVICE float log_2(float x) { return log2f(x); }
DEVICE double log_2(double x) { return log2(x); }
DEVICE float log_e(float x) { return logf(x); }
DEVICE double log_e(double x) { return log(x); }
DEVICE float tanh_(float x) { return tanhf(x); }
DEVICE double tanh_(double x) { return tanh(x); }
// The larger number; NaN only where both are.
DEVICE float larger(float x, float y) { return fmaxf(x, y); }
DEVICE double larger(double x, double y) { return fmax(x, y); }
DEVICE float smaller(float x, float y) { return fminf(x, y); }
DEVICE double smaller(double x, double y) { return fmin(x, y); }

// --- Numbers of 16 bits.

DEVICE float widen(half_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
DEVICE float widen(bf16_t x) { return __uint_as_float(static_cast<u32>(x.bits) << 16); }

DEVICE void round_to(half_t& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE void round_to(bf16_t& y, float x) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const u32 bits = __float_as_uint(x);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    y.bits = is_nan ? 0x7fff : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to even
#endif
}

// Two numbers in one register, as matrix units take them.
template <class T> DEVICE u32 pack(float low, float high) {
    T x, y;
    round_to(x, low);
    round_to(y, high);
    return static_cast<u32>(x.bits) | static_cast<u32>(y.bits) << 16;
}
#if __CUDA_ARCH__ >= 800
template <> DEVICE u32 pack<half_t>(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
template <> DEVICE u32 pack<bf16_t>(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif

// --- Matrix units. Fragments as the PTX ISA lays them out for mma.m16n8k16; lane 4 g + t.

DEVICE u32 shared_address(const void* at) {
    u32 address;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(address) : "l"(at));
    return address;
}

// Four 8 x 8 matrices of 16 bits. Lane 8 i + r says where row r of matrix i lies; matrix i ends up in x[i], of which
// lane 4 g + t holds columns 2 t and 2 t + 1 of row g. `bytes` are added to `row`: a constant becomes part of the
// instruction, where sums of generic addresses would each take registers.
DEVICE void load_matrices(u32 (&x)[4], const void* row, int bytes = 0) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row) + bytes)
                 : "memory");
}

// The same, transposed: rows 2 t and 2 t + 1 of column g.
DEVICE void load_transposed(u32 (&x)[4], const void* row, int bytes = 0) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(shared_address(row) + bytes)
                 : "memory");
}

// c += a b, for a [16, 16], b [16, 8] and c [16, 8] in float.
template <class T> DEVICE void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);

template <> DEVICE void multiply<half_t>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // Turing's is half as deep: the same fragments, half by half
    const u32 b[2] = {b0, b1};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                     : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
    }
#endif
}

#if __CUDA_ARCH__ >= 800
template <> DEVICE void multiply<bf16_t>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// --- Copies from global to shared memory that go on beside other work, where the GPU has them.

// 16 bytes, which may be read only after copies_wait and a barrier; zeros where not `valid`, and `from` is not read.
DEVICE void copy16(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
#else
    uint4 x = make_uint4(0, 0, 0, 0);
    if (valid) x = *static_cast<const uint4*>(from);
    *static_cast<uint4*>(to) = x;
#endif
}

// Ends a group of copies.
DEVICE void copies_end() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most PENDING of this thread's groups are on their way.
template <int PENDING> DEVICE void copies_wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
