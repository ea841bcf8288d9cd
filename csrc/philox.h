// Dropout bits: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYATTN_HOST_DEVICE __host__ __device__
#else
#define PYATTN_HOST_DEVICE
#endif

namespace pyattn {

struct PhiloxWords {
    uint32_t word[4];
};

// The four words that decide keys 4 * (key / 4) + {0, 1, 2, 3} of one query.
PYATTN_HOST_DEVICE static inline PhiloxWords philox(uint64_t seed, uint32_t key_div_4, uint32_t query, uint32_t head,
                                                    uint32_t batch) {
    uint32_t c0 = key_div_4, c1 = query, c2 = head, c3 = batch;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53} * c0, product1 = uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    return {{c0, c1, c2, c3}};
}

}  // namespace pyattn
