// Global memory: which addresses a launch may touch, and races between its CTAs, which run one after another here but
// in any order on a GPU.
#pragma once

#include <cstdint>
#include <vector>

#include "fault.h"
#include "options.h"
#include "view.h"
#include "zeros.h"

namespace ptx {

struct Storage {
    uint64_t begin, end;
    std::vector<View> views;              // the tensors that lie in it
    uint64_t run_begin = 0, run_end = 0;  // bytes known to be elements: those of the last access
    // Of every two bytes, the CTA (its number + 1) that wrote them, and that read them.
    Zeros<uint32_t> writer, reader;

    bool holds(uint64_t at, uint64_t bytes) const { return at >= begin && at + bytes <= end; }

    // The bytes from `at` on that are elements without a gap.
    uint64_t run_from(uint64_t at) {
        for (const View& view : views)
            if (const uint64_t run = view.run_from(at)) {
                run_begin = at + run - view.run(), run_end = at + run;
                return run;
            }
        return 0;
    }
};

class GlobalMemory {
  public:
    void begin(const Buffer* buffers, int count, int64_t checks) {
        races_ = checks & kCheckGlobalRaces;
        last_ = 0;
        storages_.clear();
        for (int k = 0; k < count; ++k) storage_of(buffers[k]).views.emplace_back(buffers[k]);
    }
    void begin_cta(uint64_t number) { cta_ = static_cast<uint32_t>(number) + 1; }

    static void check_aligned(uint64_t at, uint32_t bytes, int lane, const char* what) {
        if (at & (bytes - 1))
            fail("misaligned %s of %u bytes at %llx, lane %d", what, bytes, static_cast<unsigned long long>(at), lane);
    }
    void read(uint64_t at, uint32_t bytes, int lane, const char* what) {
        Storage& storage = find(at, bytes, lane, what);
        if (races_) note_read(storage, at, bytes, lane);
    }
    void write(uint64_t at, uint32_t bytes, int lane, const char* what) {
        Storage& storage = find(at, bytes, lane, what);
        if (races_) note_write(storage, at, bytes, lane);
    }

    void atomic(uint64_t at, uint32_t bytes, int lane, const char* what) {
        Storage& storage = find(at, bytes, lane, what);
        if (races_) note_atomic(storage, at, bytes, lane);
    }

  private:
    static constexpr uint32_t kAtomic = 1u << 31;  // of a writer: by atomics only
    static constexpr uint32_t kSeveral = kAtomic - 1;

    Storage& storage_of(const Buffer& buffer) {
        for (Storage& storage : storages_)
            if (storage.begin == buffer.begin && storage.end == buffer.end) return storage;
        const size_t pairs = races_ ? (buffer.end - buffer.begin) / 2 + 2 : 0;
        storages_.push_back({buffer.begin, buffer.end, {}, 0, 0, Zeros<uint32_t>(pairs), Zeros<uint32_t>(pairs)});
        return storages_.back();
    }

    Storage& find(uint64_t at, uint32_t bytes, int lane, const char* what) {
        if (last_ >= storages_.size() || !storages_[last_].holds(at, bytes))
            last_ = find_storage(at, bytes, lane, what);
        Storage& storage = storages_[last_];
        if (at < storage.run_begin || at + bytes > storage.run_end) check_elements(storage, at, bytes, lane, what);
        return storage;
    }
    size_t find_storage(uint64_t at, uint32_t bytes, int lane, const char* what) const {
        for (size_t k = 0; k < storages_.size(); ++k)
            if (storages_[k].holds(at, bytes)) return k;
        if (storages_.empty()) fail("%s of %u bytes out of bounds, lane %d: there is no buffer", what, bytes, lane);
        int64_t least = INT64_MAX;
        size_t nearest = 0;
        bool below = false;
        for (size_t k = 0; k < storages_.size(); ++k) {
            const int64_t under = static_cast<int64_t>(storages_[k].begin - at);
            const int64_t over = static_cast<int64_t>(at + bytes - storages_[k].end);
            if (under > 0 && under < least) least = under, nearest = k, below = true;
            if (over > 0 && over < least) least = over, nearest = k, below = false;
        }
        fail("%s of %u bytes out of bounds, lane %d: %lld bytes %s buffer %zu", what, bytes, lane,
             static_cast<long long>(least), below ? "below" : "past the end of", nearest);
    }
    void check_elements(Storage& storage, uint64_t at, uint32_t bytes, int lane, const char* what) const {
        for (uint64_t covered = 0; covered < bytes;) {
            const uint64_t run = storage.run_from(at + covered);
            if (!run)
                fail("%s of %u bytes out of bounds, lane %d: byte %llu of buffer %zu is no tensor's element", what,
                     bytes, lane, static_cast<unsigned long long>(at + covered - storage.begin), number(storage));
            covered += run;
        }
    }
    size_t number(const Storage& storage) const { return static_cast<size_t>(&storage - storages_.data()); }

    void note_read(Storage& storage, uint64_t at, uint32_t bytes, int lane) {
        for (uint64_t k = (at - storage.begin) / 2; k <= (at + bytes - 1 - storage.begin) / 2; ++k) {
            const uint32_t writer = storage.writer[k];
            if (writer && (writer & ~kAtomic) != cta_) fail_race(storage, at, lane, "read", "wrote", writer);
            uint32_t& reader = storage.reader[k];
            reader = reader && reader != cta_ ? kSeveral : cta_;
        }
    }
    void note_write(Storage& storage, uint64_t at, uint32_t bytes, int lane) {
        for (uint64_t k = (at - storage.begin) / 2; k <= (at + bytes - 1 - storage.begin) / 2; ++k) {
            const uint32_t writer = storage.writer[k], reader = storage.reader[k];
            if (writer && (writer & ~kAtomic) != cta_) fail_race(storage, at, lane, "write", "wrote", writer);
            if (reader && reader != cta_) fail_race(storage, at, lane, "write", "reads", reader);
            storage.writer[k] = cta_;
        }
    }
    // Atomics of all CTAs may come in any order; what is not atomic races with them.
    void note_atomic(Storage& storage, uint64_t at, uint32_t bytes, int lane) {
        for (uint64_t k = (at - storage.begin) / 2; k <= (at + bytes - 1 - storage.begin) / 2; ++k) {
            uint32_t& writer = storage.writer[k];
            const uint32_t reader = storage.reader[k], own = kAtomic | cta_;
            if (writer && writer != cta_ && !(writer & kAtomic))
                fail_race(storage, at, lane, "atomic", "wrote", writer);
            if (reader && reader != cta_) fail_race(storage, at, lane, "atomic", "reads", reader);
            if (writer != cta_) writer = !writer || writer == own ? own : kAtomic | kSeveral;
        }
    }
    [[noreturn]] void fail_race(const Storage& storage, uint64_t at, int lane, const char* what, const char* did,
                                uint32_t cta) const {
        char other[32] = "another CTA";
        if ((cta & ~kAtomic) != kSeveral) snprintf(other, sizeof other, "CTA %u", (cta & ~kAtomic) - 1);
        fail("race between CTAs: %s of byte %llu of buffer %zu, which %s %s in the same launch, lane %d", what,
             static_cast<unsigned long long>(at - storage.begin), number(storage), other, did, lane);
    }

    bool races_ = false;
    uint32_t cta_ = 0;
    size_t last_ = 0;  // the storage of the last access
    std::vector<Storage> storages_;
};

}  // namespace ptx
