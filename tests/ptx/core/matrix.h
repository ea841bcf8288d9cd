// Matrices of 16-bit elements in shared memory, as wgmma and tcgen05.mma find them by their descriptors: the canonical
// layouts of PTX ISA, "Shared Memory Matrix Layout".
#pragma once

#include <cstdint>

#include "numbers.h"
#include "product.h"
#include "shared_memory.h"
#include "tma.h"

namespace ptx {

struct MatrixDescriptor {
    uint32_t start;
    uint32_t leading, stride;  // byte offsets between the core matrices of 8 rows of 16 bytes
    int swizzle;               // 0: none, 1: 32 bytes, 2: 64, 3: 128
};

struct Matrix {
    MatrixDescriptor descriptor;
    bool mn_major;  // M or N is contiguous instead of K
    bool f16;       // or bf16
    const char* what;

    // The address of element (mn, k).
    uint32_t place(uint32_t mn, uint32_t k) const {
        const auto [start, leading, stride, swizzle] = descriptor;
        const uint32_t row = 16u << swizzle;  // bytes
        if (!mn_major && !swizzle) return start + mn % 8 * 16 + mn / 8 * stride + k / 8 * leading + k % 8 * 2;
        if (!mn_major) return swizzled(start + mn % 8 * row + mn / 8 * stride + k * 2, swizzle);
        if (!swizzle) return start + mn % 8 * 2 + mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
        const uint32_t wide = row / 2;
        return swizzled(start + mn % wide * 2 + mn / wide * leading + k % 8 * row + k / 8 * stride, swizzle);
    }

    // f(shared address, mn, k) for every 16 bytes of the rows [first, first + n): elements along M or N where that is
    // contiguous, else along K.
    template <class F>
    void for_each_chunk(uint32_t first, uint32_t n, F f) const {
        const uint32_t step_mn = mn_major ? 8 : 1, step_k = mn_major ? 1 : 8;
        for (uint32_t mn = first; mn < first + n; mn += step_mn)
            for (uint32_t k = 0; k < kDepth; k += step_k) f(place(mn, k), mn, k);
    }

    // Checks the reads of those rows by a lane, and returns the version of what they read.
    uint64_t check(SharedMemory& shared, const Agent& reader, int lane, uint32_t first, uint32_t n) const {
        uint64_t version = 0;
        for_each_chunk(first, n, [&](uint32_t at, uint32_t, uint32_t) {
            const Access access{at, 16, lane, what, Proxy::kAsync};
            shared.at(access);
            shared.read(reader, access);
            version = shared.version(version, at, 16);
        });
        return version;
    }

    uint64_t version(const SharedMemory& shared, uint32_t first, uint32_t n) const {
        uint64_t version = 0;
        for_each_chunk(first, n, [&](uint32_t at, uint32_t, uint32_t) { version = shared.version(version, at, 16); });
        return version;
    }

    // Those rows: element (mn, k) to to[(mn - first) * step_mn + k * step_k].
    void gather(SharedMemory& shared, uint32_t first, uint32_t n, double* to, uint32_t step_mn, uint32_t step_k) const {
        const uint32_t next = mn_major ? step_mn : step_k;
        for_each_chunk(first, n, [&](uint32_t at, uint32_t mn, uint32_t k) {
            const uint8_t* from = shared.at({at, 16, 0, what, Proxy::kAsync});
            double* chunk = to + (mn - first) * step_mn + k * step_k;
            for (uint32_t e = 0; e < 8; ++e) {
                uint16_t bits;
                memcpy(&bits, from + 2 * e, 2);
                chunk[e * next] = from_half(bits, f16);
            }
        });
    }
};

}  // namespace ptx
