// Tensor maps, and the boxes that TMA copies (PTX ISA, "Tensors", "cp.async.bulk.tensor").
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace ptx {

struct Instruction;

// The machine's own encoding of what cuTensorMapEncodeTiled is given; a parameter of 128 bytes.
struct TensorMap {
    uint64_t base;
    uint32_t rank, element;  // bytes of one
    uint64_t size[5];        // the innermost dimension first
    uint64_t stride[5];      // in bytes; of the first dimension it is `element`
    uint8_t box[5];          // 255 stands for 256
    uint8_t swizzle;         // 0: none, 1: 32 bytes, 2: 64, 3: 128
    uint8_t pad[2];

    uint32_t box_size(uint32_t d) const { return d < rank ? (box[d] == 255 ? 256 : box[d]) : 1; }
    uint32_t box_bytes() const {
        uint32_t bytes = element;
        for (uint32_t d = 0; d < rank; ++d) bytes *= box_size(d);
        return bytes;
    }
};
static_assert(sizeof(TensorMap) <= 128);

struct Box {
    TensorMap map;
    int32_t at[5];    // coordinates of its first element
    uint32_t shared;  // where it lies there
};
struct TmaLoad {
    Box box;
    uint32_t mbarrier;
    const Instruction* instruction;
};
struct TmaStore {
    Box box;
    bool done;
    uint64_t version;  // of what it reads, when it was issued
};

// Swizzles XOR bits 4 to 6 of an address with bits 7 to 9, as many as the mode has (PTX ISA, "Swizzling Modes").
inline uint32_t swizzled(uint32_t at, int mode) { return at ^ ((at >> 7 & ((1u << mode) - 1)) << 4); }

// f(shared address, global address, first, valid) for every 16 bytes of the box in shared memory, of which the bytes
// from `first` on, `valid` many, lie inside the tensor, from the global address on.
template <class F>
void for_each_chunk(const Box& box, F f) {
    const TensorMap& map = box.map;
    uint32_t rows = 1;
    for (uint32_t d = 1; d < map.rank; ++d) rows *= map.box_size(d);
    const uint32_t row_bytes = map.box_size(0) * map.element, chunk = 16 / map.element;
    for (uint32_t row = 0; row < rows; ++row) {
        uint32_t rest = row;
        bool inside = true;
        uint64_t address = map.base;
        for (uint32_t d = 1; d < map.rank; ++d) {
            const int64_t x = int64_t(box.at[d]) + rest % map.box_size(d);
            rest /= map.box_size(d);
            inside &= x >= 0 && uint64_t(x) < map.size[d];
            address += uint64_t(x) * map.stride[d];
        }
        for (uint32_t byte = 0; byte < row_bytes; byte += 16) {
            const int64_t begin = int64_t(box.at[0]) + byte / map.element;
            const int64_t low = std::max<int64_t>(begin, 0), high = std::min(begin + chunk, int64_t(map.size[0]));
            const bool some = inside && high > low;
            const uint32_t first = some ? uint32_t(low - begin) * map.element : 0;
            const uint32_t valid = some ? uint32_t(high - low) * map.element : 0;
            f(swizzled(box.shared + row * row_bytes + byte, map.swizzle),
              address + uint64_t(begin) * map.element + first, first, valid);
        }
    }
}

struct Machine;

// A load on its way, machine.loads[k], takes effect.
void land(Machine& machine, size_t k);

}  // namespace ptx
