// Dropout bits: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3).
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "rows.h"

namespace pyattn {
namespace PYATTN_ISA {

// A 32-bit word per 64-bit lane, in its low half; the high half is anything.
typedef uint64_t Words __attribute__((vector_size(PYATTN_VECTOR_BYTES)));

// The full product of the low halves.
PYATTN_INLINE Words multiply_low(Words x, uint32_t by) {
    const Words factor = Words{} + by;
#if defined(__AVX512F__) && PYATTN_VECTOR_BYTES == 64
    return (Words)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)factor);
#elif defined(__AVX2__) && PYATTN_VECTOR_BYTES == 32
    return (Words)_mm256_mul_epu32((__m256i)x, (__m256i)factor);
#else
    return (x & 0xffffffffu) * factor;
#endif
}

// Replaces a counter per lane by its four random words.
PYATTN_INLINE void philox(uint64_t seed, Words* c) {
    uint32_t key_low = static_cast<uint32_t>(seed), key_high = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Words product0 = multiply_low(c[0], 0xD2511F53), product1 = multiply_low(c[2], 0xCD9E8D57);
        c[0] = (product1 >> 32) ^ c[1] ^ key_low;
        c[1] = product1;
        c[2] = (product0 >> 32) ^ c[3] ^ key_high;
        c[3] = product0;
        key_low += 0x9E3779B9;
        key_high += 0xBB67AE85;
    }
}

// keep[key][query] = 1 / (1 - dropout_p) or 0. j is a multiple of 4, lanes one of kWidth.
template <class A>
static inline void draw_keep(const AttentionArgs& args, const Rows& rows, int64_t j, int64_t keys, int64_t lanes,
                             A* keep) {
    constexpr int64_t H = sizeof(Words) / sizeof(uint64_t);
    const A kept = static_cast<A>(args.keep_scale);
    for (int64_t lane = 0; lane < lanes; lane += H) {
        Words query, head;
        std::memcpy(&query, rows.query + lane, sizeof query);
        std::memcpy(&head, rows.head + lane, sizeof head);
        for (int64_t key = 0; key < keys; key += 4) {
            Words c[4] = {Words{} + static_cast<uint64_t>((j + key) / 4), query, head,
                          Words{} + static_cast<uint64_t>(rows.sequence.number)};
            philox(args.seed, c);
            for (int w = 0; w < 4; ++w) {
                uint64_t words[H];
                std::memcpy(words, &c[w], sizeof words);
                A* to = keep + (key + w) * kQueries + lane;
                for (int64_t l = 0; l < H; ++l) {
                    to[l] = static_cast<uint32_t>(words[l]) >= args.dropout_threshold ? kept : A(0);
                }
            }
        }
    }
}

}  // namespace PYATTN_ISA
}  // namespace pyattn
