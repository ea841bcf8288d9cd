// What orders accesses to tensor memory (PTX ISA, "Memory Consistency Model for 5th generation of TensorCore
// operations").
//
//   tcgen05.st is complete after tcgen05.wait::st, tcgen05.ld after tcgen05.wait::ld, by the warp that issued it;
//   tcgen05.mma when the mbarrier of a later tcgen05.commit is, to those that waited for it;
//   and one thread's access is before another's if synchronization came between: with tcgen05.fence::before_thread_sync
//   before and ::after_thread_sync after it. Triton leaves these two fences out: an option.
#pragma once

#include <cstdint>
#include <vector>

#include "clock.h"
#include "fault.h"
#include "options.h"

namespace ptx {

struct Region {
    uint32_t lanes;  // bit g: lanes [16 g, 16 g + 16)
    uint32_t column, columns;
};

struct TensorUse {  // of a tcgen05.mma
    int warp;
    Region sums, a;  // a: no columns where A is in shared memory
    uint32_t shape;  // equal for those that the tensor core keeps in order
};

class TensorOrder {
  public:
    void begin(int64_t checks) {
        races_ = checks & kCheckRaces;
        fences_ = checks & kCheckTensorFences;
        cells_.assign(races_ ? kGroups * kColumns : 0, {});
        products_.clear();
        for (OfWarp& warp : warps_) warp = {};
        issued_ = 0;
    }

    void load(const Agent& warp, const Region& region) {
        if (!races_) return;
        for_each(region, [&](Cell& cell) {
            check_written(cell, warp, "tcgen05.ld");
            cell.loading |= 1u << warp.id;
        });
        warps_[warp.id].loading.push_back(region);
    }
    void store(const Agent& warp, const Region& region) {
        if (!races_) return;
        for_each(region, [&](Cell& cell) {
            check_written(cell, warp, "tcgen05.st");
            check_read(cell, warp, "tcgen05.st");
            cell.storing = warp.id + 1;
        });
        warps_[warp.id].storing.push_back(region);
    }
    void wait_loads(const Agent& warp) {
        OfWarp& of = warps_[warp.id];
        for_each(of.loading, [&](Cell& cell) {
            cell.loading &= ~(1u << warp.id);
            cell.loads[warp.id / 4] = fences_ ? kUnfenced : warp.now();
        });
        move_to(of.loading, of.loaded);
    }
    void wait_stores(const Agent& warp) {
        OfWarp& of = warps_[warp.id];
        for_each(of.storing, [&](Cell& cell) {
            cell.storing = 0;
            cell.writer = warp.id, cell.written = fences_ ? kUnfenced : warp.now();
        });
        move_to(of.storing, of.stored);
    }
    void fence_before(const Agent& warp) {
        OfWarp& of = warps_[warp.id];
        for_each(of.loaded, [&](Cell& cell) { cell.loads[warp.id / 4] = warp.now(); });
        for_each(of.stored, [&](Cell& cell) {
            if (cell.writer == warp.id) cell.written = warp.now();
        });
        of.loaded.clear(), of.stored.clear();
    }
    void fence_after(const Agent& warp) { warps_[warp.id].fenced = warp.known.seen; }

    void multiply(const Agent& warp, const TensorUse& use) {
        if (!races_) return;
        ++issued_;
        for_each(use.a, [&](Cell& cell) {
            check_written(cell, warp, "tcgen05.mma's read");
            cell.multiplying = issued_;
        });
        for_each(use.sums, [&](Cell& cell) {
            const bool in_order = cell.summing && cell.summer == warp.id && cell.shape == use.shape;
            if (!in_order) check_written(cell, warp, "tcgen05.mma's write");
            check_read(cell, warp, "tcgen05.mma's write");
            cell.summing = issued_, cell.summer = warp.id, cell.shape = use.shape;
        });
        products_.push_back({issued_, use});
    }
    uint32_t issued() const { return issued_; }

    // A commit has reached its mbarrier, whose phase `clock` completes the warp's products up to `last`. What earlier
    // commits of the warp completed, who waits for this one knows, too.
    void commit(int warp, uint32_t last, int agent, uint32_t clock, Known& gathering) {
        std::vector<Product> left;
        for (const Product& product : products_) {
            if (product.use.warp != warp || product.number > last) {
                left.push_back(product);
                continue;
            }
            for_each(product.use.sums, [&](Cell& cell) {
                if (cell.summing != product.number) return;
                cell.summing = 0, cell.writer = agent, cell.written = clock;
            });
            for_each(product.use.a, [&](Cell& cell) {
                if (cell.multiplying != product.number) return;
                cell.multiplying = 0, cell.multiplier = agent, cell.multiplied = clock;
            });
        }
        products_ = left;
        gathering.seen.join(warps_[warp].completed);
        warps_[warp].completed.of[agent] = clock;
    }

  private:
    static constexpr int kGroups = 8, kColumns = 512;
    static constexpr uint32_t kUnfenced = ~0u;  // later than anything another thread knows

    struct Cell {                             // 16 lanes of a column
        int writer, storing, summer;          // an agent; a warp + 1; a warp
        uint32_t written, summing, shape;     // the writer's clock; the number of a tcgen05.mma not complete, or 0
        uint32_t loading, loads[kWarps / 4];  // bit: warp; clocks. Warps w, w + 4, ... share their lanes
        int multiplier;                       // who read it as A: an agent
        uint32_t multiplied, multiplying;
    };
    struct Product {
        uint32_t number;
        TensorUse use;
    };
    struct OfWarp {
        std::vector<Region> loading, storing;  // not waited for
        std::vector<Region> loaded, stored;    // waited for, but not followed by a fence
        Clock fenced{};                        // what fence::after_thread_sync has followed
        Clock completed{};                     // the warp's commits
    };

    template <class F>
    void for_each(const Region& region, F f) {
        for (uint32_t lanes = region.lanes; lanes && region.columns; lanes &= lanes - 1) {
            Cell* cells = &cells_[__builtin_ctz(lanes) * kColumns + region.column];
            for (uint32_t k = 0; k < region.columns; ++k) f(cells[k]);
        }
    }
    template <class F>
    void for_each(const std::vector<Region>& regions, F f) {
        for (const Region& region : regions) for_each(region, f);
    }
    void move_to(std::vector<Region>& from, std::vector<Region>& to) const {
        if (fences_) to.insert(to.end(), from.begin(), from.end());
        from.clear();
    }

    bool knows(const Agent& warp, int agent, uint32_t clock) const {
        return agent == warp.id || clock <= (fences_ ? warps_[warp.id].fenced : warp.known.seen).of[agent];
    }
    void check_written(const Cell& cell, const Agent& warp, const char* what) const {
        if (cell.storing)
            fail("%s of tensor memory that a tcgen05.st of warp %d writes: no wait::st", what, cell.storing - 1);
        if (cell.summing) fail("%s of tensor memory that a tcgen05.mma on its way writes", what);
        if (!knows(warp, cell.writer, cell.written))
            fail("race: %s of tensor memory, written by %s %d without synchronization", what,
                 cell.writer < kWarps ? "warp" : "tcgen05.mma of mbarrier", cell.writer % kWarps);
    }
    void check_read(const Cell& cell, const Agent& warp, const char* what) const {
        if (cell.loading)
            fail("%s of tensor memory that a tcgen05.ld of warp %d reads: no wait::ld", what,
                 __builtin_ctz(cell.loading));
        if (cell.multiplying) fail("%s of tensor memory that a tcgen05.mma on its way reads", what);
        for (int k = 0; k < kWarps / 4; ++k) {
            const int reader = quarter(cell) + 4 * k;
            if (!knows(warp, reader, cell.loads[k]))
                fail("race: %s of tensor memory, which warp %d may still be reading", what, reader);
        }
        if (!knows(warp, cell.multiplier, cell.multiplied))
            fail("race: %s of tensor memory, read by a tcgen05.mma", what);
    }
    // Warps of this number modulo 4 may use the cell.
    int quarter(const Cell& cell) const { return static_cast<int>((&cell - cells_.data()) / (2 * kColumns)); }

    bool races_ = false, fences_ = false;
    std::vector<Cell> cells_;
    std::vector<Product> products_;  // not complete
    OfWarp warps_[kWarps];
    uint32_t issued_ = 0;
};

}  // namespace ptx
