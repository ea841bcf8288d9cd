// What an execution costs: how often each instruction ran, and how much memory it moved against how much it had to.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ptx {

struct Statistics {
    bool on = false;
    std::vector<uint64_t> counts;         // of each instruction: warps that executed it
    std::vector<uint64_t> moved, needed;  // its transactions in shared memory, or sectors in global memory
    uint64_t executed = 0, ctas = 0;

    void begin(size_t instructions) {
        counts.assign(instructions, 0);
        moved.assign(instructions, 0);
        needed.assign(instructions, 0);
    }

    // A bank serves one word of 4 bytes at a time; wide accesses go by halves or quarters of a warp.
    void shared(size_t pc, const uint64_t* at, uint32_t lanes, uint32_t bytes) {
        if (!on) return;
        const int together = bytes <= 4 ? 32 : bytes == 8 ? 16 : 8;
        for (int first = 0; first < 32; first += together) {
            const uint32_t some = lanes >> first & (together == 32 ? ~0u : (1u << together) - 1);
            moved[pc] += conflicts(at + first, some, bytes);
            needed[pc] += some != 0;
        }
    }

    // Global memory is read and written by sectors of 32 bytes.
    void global(size_t pc, const uint64_t* at, uint32_t lanes, uint32_t bytes) {
        if (!on) return;
        std::vector<uint64_t> sectors;
        uint64_t wanted = 0;
        for (; lanes; lanes &= lanes - 1) {
            const uint64_t address = at[__builtin_ctz(lanes)];
            for (uint64_t sector = address / 32; sector <= (address + bytes - 1) / 32; ++sector)
                sectors.push_back(sector);
            wanted += bytes;
        }
        std::sort(sectors.begin(), sectors.end());
        moved[pc] += std::unique(sectors.begin(), sectors.end()) - sectors.begin();
        needed[pc] += (wanted + 31) / 32;
    }

  private:
    // How many different words the busiest bank has to serve.
    static uint64_t conflicts(const uint64_t* at, uint32_t lanes, uint32_t bytes) {
        std::vector<uint32_t> words;
        for (; lanes; lanes &= lanes - 1)
            for (uint32_t byte = 0; byte < bytes; byte += 4)
                words.push_back(static_cast<uint32_t>(at[__builtin_ctz(lanes)] + byte) / 4);
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        uint64_t of_bank[32] = {}, most = 0;
        for (uint32_t word : words) most = std::max(most, ++of_bank[word % 32]);
        return most;
    }
};

}  // namespace ptx
