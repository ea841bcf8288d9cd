// What kernels ask of a GPU, on the host: in the place of csrc/cuda/hw.cuh, function for function. Threads and copies
// are machine.cpp's; here are number formats, and what the matrix instructions compute.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "machine.h"

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define DEVICE inline
#define INLINE

inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }

#include "number.cuh"

// --- Threads, and what they exchange.

enum { SHUFFLE = 1, LOAD_MATRICES, LOAD_TRANSPOSED, MULTIPLY };

inline int thread_index() { return machine_thread; }
inline int block_index() { return machine_block; }
inline void barrier() { machine_barrier(); }

template <class X> struct Shuffled {
    X given, taken;
    int from;
};
template <class X> X shuffle(X x, int from) {
    Shuffled<X> lane = {x, x, from};
    machine_together(SHUFFLE, &lane, [](void** lanes) {
        for (int i = 0; i < 32; ++i) {
            Shuffled<X>& own = *static_cast<Shuffled<X>*>(lanes[i]);
            own.taken = static_cast<Shuffled<X>*>(lanes[own.from])->given;
        }
    });
    return lane.taken;
}
template <class X> X shuffle_xor(X x, int mask) { return shuffle(x, (machine_thread % 32) ^ mask); }

inline u8* shared_memory() { return machine_shared; }
inline void atomic_or(u32* at, u32 bits) { *at |= bits; }

// --- Arithmetic.

template <class X> X infinity() { return std::numeric_limits<X>::infinity(); }
template <class X> X exp_2(X x) { return std::exp2(x); }
template <class X> X log_2(X x) { return std::log2(x); }
template <class X> X log_e(X x) { return std::log(x); }
template <class X> X tanh_(X x) { return std::tanh(x); }
template <class X> X larger(X x, X y) { return std::fmax(x, y); }
template <class X> X smaller(X x, X y) { return std::fmin(x, y); }

// --- Numbers of 16 bits.

template <class To, class From> To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "a number's bits");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

inline float widen(half_t x) { return bits_of<_Float16>(x.bits); }
inline float widen(bf16_t x) { return bits_of<float>(static_cast<u32>(x.bits) << 16); }

inline void round_to(half_t& y, float x) { y.bits = bits_of<u16>(static_cast<_Float16>(x)); }
inline void round_to(bf16_t& y, float x) {
    const u32 bits = bits_of<u32>(x);
    y.bits = std::isnan(x) ? 0x7fff : static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <class T> u32 pack(float low, float high) {
    T x, y;
    round_to(x, low);
    round_to(y, high);
    return x.bits | static_cast<u32>(y.bits) << 16;
}

// --- Matrix units.

inline u16 half_of(u32 both, int which) { return static_cast<u16>(both >> (16 * which)); }

struct LoadedMatrices {
    u32* x;
    const void* row;
};
template <bool TRANSPOSED> void load_matrices_together(void** lanes) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        for (int lane = 0; lane < 32; ++lane) {
            u16 two[2];
            for (int e = 0; e < 2; ++e) {
                const int g = lane / 4, t = lane % 4 * 2 + e, row = TRANSPOSED ? t : g, column = TRANSPOSED ? g : t;
                two[e] = static_cast<const u16*>(static_cast<LoadedMatrices*>(lanes[8 * matrix + row])->row)[column];
            }
            static_cast<LoadedMatrices*>(lanes[lane])->x[matrix] = two[0] | static_cast<u32>(two[1]) << 16;
        }
    }
}
inline void load_matrices(u32 (&x)[4], const void* row, int bytes = 0) {
    LoadedMatrices lane = {x, static_cast<const u8*>(row) + bytes};
    machine_together(LOAD_MATRICES, &lane, load_matrices_together<false>);
}
inline void load_transposed(u32 (&x)[4], const void* row, int bytes = 0) {
    LoadedMatrices lane = {x, static_cast<const u8*>(row) + bytes};
    machine_together(LOAD_TRANSPOSED, &lane, load_matrices_together<true>);
}

struct Multiplied {
    float* c;
    const u32* a;
    u32 b[2];
};
template <class T> void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Multiplied lane = {c, a, {b0, b1}};
    machine_together(MULTIPLY, &lane, [](void** lanes) {
        float of_a[16][16], of_b[16][8];
        for (int i = 0; i < 32; ++i) {
            const Multiplied& own = *static_cast<Multiplied*>(lanes[i]);
            for (int e = 0; e < 2; ++e) {
                const int g = i / 4, t = i % 4 * 2 + e;
                for (int part = 0; part < 4; ++part) {
                    of_a[g + part % 2 * 8][t + part / 2 * 8] = widen(T{half_of(own.a[part], e)});
                }
                for (int part = 0; part < 2; ++part) of_b[t + part * 8][g] = widen(T{half_of(own.b[part], e)});
            }
        }
        for (int i = 0; i < 32; ++i) {
            for (int e = 0; e < 4; ++e) {
                const int row = i / 4 + e / 2 * 8, column = i % 4 * 2 + e % 2;
                float sum = 0;
                for (int k = 0; k < 16; ++k) sum += of_a[row][k] * of_b[k][column];
                static_cast<Multiplied*>(lanes[i])->c[e] += sum;
            }
        }
    });
}

// --- Copies.

inline void copy16(void* to, const void* from, bool valid) { machine_copy16(to, from, valid); }
inline void copies_end() { machine_copies_end(); }
template <int PENDING> void copies_wait() { machine_copies_wait(PENDING); }
