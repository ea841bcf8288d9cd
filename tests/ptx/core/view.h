// Which bytes of a storage are a tensor's elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace ptx {

// As the caller gives it. Of rank 0, all of the storage may be touched.
struct Buffer {
    uint64_t begin, end;  // of the storage
    uint64_t first;       // the address of element [0, ..., 0]
    int64_t rank;
    uint64_t size[5], stride[5];  // strides in bytes
    uint64_t element;             // bytes of one
};

// No bitmap: strides may reach far beyond what any memory holds. The dimensions are merged where they can be, so that
// most tensors are one run of bytes, and what is left is divided by the strides.
class View {
  public:
    explicit View(const Buffer& buffer) : first_(buffer.first), run_(buffer.element) {
        if (buffer.rank == 0) first_ = buffer.begin, run_ = buffer.end - buffer.begin;
        for (int d = 0; d < buffer.rank; ++d) {
            if (buffer.size[d] == 0) run_ = 0;
            if (buffer.size[d] > 1 && buffer.stride[d] > 0)
                dimensions_.push_back({buffer.size[d], buffer.stride[d], 0});
        }
        merge();
    }

    // How many bytes from `at` on are elements without a gap.
    uint64_t run_from(uint64_t at) const { return at < first_ ? 0 : run_within(at - first_, dimensions_.size()); }
    uint64_t run() const { return run_; }

  private:
    struct Dimension {
        uint64_t size, stride;
        uint64_t inner;  // bytes that the dimensions below it span
    };

    void merge() {
        std::sort(dimensions_.begin(), dimensions_.end(), [](auto& a, auto& b) { return a.stride < b.stride; });
        std::vector<Dimension> merged;
        uint64_t span = run_;
        for (Dimension d : dimensions_) {
            if (merged.empty() && d.stride == run_) {
                run_ *= d.size;
            } else if (!merged.empty() && d.stride == merged.back().stride * merged.back().size) {
                merged.back().size *= d.size;
            } else {
                d.inner = span;
                merged.push_back(d);
            }
            span += (d.size - 1) * d.stride;
        }
        dimensions_ = merged;
    }

    // Of an offset into the innermost `rank` dimensions. Where dimensions overlap, several indices may lead to it.
    uint64_t run_within(uint64_t offset, size_t rank) const {
        if (rank == 0) return offset < run_ ? run_ - offset : 0;
        const Dimension& d = dimensions_[rank - 1];
        for (uint64_t index = std::min(offset / d.stride, d.size - 1);; --index) {
            const uint64_t rest = offset - index * d.stride;
            if (rest >= d.inner) return 0;
            if (const uint64_t run = run_within(rest, rank - 1)) return run;
            if (index == 0) return 0;
        }
    }

    uint64_t first_, run_;
    std::vector<Dimension> dimensions_;  // the innermost first
};

}  // namespace ptx
