// Dropout bits: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3),
// one counter at a time, on the host and on a GPU. cpu/dropout.h draws the same words for a vector of counters.
#pragma once

#ifdef __CUDACC__
#define PYATTN_PHILOX __device__ __forceinline__
#else
#define PYATTN_PHILOX inline
#endif

// Replaces a counter by its four random words.
PYATTN_PHILOX void philox(unsigned long long seed, unsigned int (&c)[4]) {
    unsigned int key_low = static_cast<unsigned int>(seed), key_high = static_cast<unsigned int>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const unsigned long long product0 = c[0] * 0xD2511F53ull, product1 = c[2] * 0xCD9E8D57ull;
        c[0] = static_cast<unsigned int>(product1 >> 32) ^ c[1] ^ key_low;
        c[1] = static_cast<unsigned int>(product1);
        c[2] = static_cast<unsigned int>(product0 >> 32) ^ c[3] ^ key_high;
        c[3] = static_cast<unsigned int>(product0);
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
}
