// Random numbers that are the same everywhere for a seed: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
#pragma once

#include <cstdint>

namespace ptx {

class Random {
  public:
    explicit Random(uint64_t seed = 0) : state_(seed * 0x2545F4914F6CDD1Dull + 1) {}

    uint64_t next() {
        state_ += 0x9e3779b97f4a7c15ull;
        uint64_t z = state_;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    uint32_t below(uint32_t n) { return n ? static_cast<uint32_t>(next() % n) : 0; }
    double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)
    bool coin() { return next() & 1; }

  private:
    uint64_t state_;
};

}  // namespace ptx
