// A CTA's shared memory: its bytes, and of every few bytes (a granule: what the smallest access covers) who wrote them
// last, who read them, and whether a copy is on its way there. Faults do not depend on the schedule that ran, but on
// what orders the accesses (PTX ISA, "Memory Consistency Model").
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "clock.h"
#include "fault.h"
#include "options.h"

namespace ptx {

constexpr uint32_t kSharedBase = 1024;  // where it begins, as on the chips

enum class Proxy : uint8_t { kGeneric, kAsync };

enum class State : uint8_t {
    kUnwritten,
    kWritten,
    kAtomic,   // written, by atomics that nothing else has come between
    kCopying,  // a cp.async is on its way there
    kLoading,  // a TMA load is
    kBarrier,  // holds an mbarrier
};

struct Granule {
    uint32_t clock;  // of the last write, by the writer's clock
    uint8_t writer;  // an agent
    State state;
    bool copied;   // by cp.async
    uint8_t lane;  // of the warp that wrote
};

constexpr int kWholeWarp = 32;     // the lane of what all lanes do together
constexpr int kSeveralLanes = 33;  // that did not do it together

struct Reading {  // the last one by a warp
    uint32_t clock : 26, lane : 6;
};

struct Access {
    uint32_t at, bytes;
    int lane;
    const char* what;
    Proxy proxy = Proxy::kGeneric;
};

class SharedMemory {
  public:
    void begin(uint32_t bytes, uint32_t granule, int warps, int64_t checks) {
        size_ = bytes;
        granule_log_ = __builtin_ctz(granule);
        warps_ = warps;
        checks_ = checks;
        bytes_.assign(bytes + 16, 0xFF);  // NaN to whoever reads what nobody wrote
        granules_.assign((bytes >> granule_log_) + 4, Granule{0, 0, State::kUnwritten, false, 0});
        readings_.assign(granules_.size() * warps, Reading{0, 0});
    }

    // The bytes at an address, which must lie inside and be a multiple of `align`.
    uint8_t* at(const Access& access, uint32_t align) {
        const uint32_t offset = access.at - kSharedBase;
        if (access.at < kSharedBase || offset + access.bytes > size_)
            fail("%s of %u bytes of shared memory out of bounds, lane %d: offset %d of %u", access.what, access.bytes,
                 access.lane, static_cast<int>(offset), size_);
        if (access.at & (align - 1))
            fail("misaligned %s of shared memory, lane %d: offset %u", access.what, access.lane, offset);
        return &bytes_[offset];
    }
    uint8_t* at(const Access& access) { return at(access, access.bytes); }
    uint8_t* bytes(uint32_t at) { return &bytes_[at - kSharedBase]; }  // of what was checked before

    void read(const Agent& reader, const Access& access) {
        for (uint32_t g = first(access); g <= last(access); ++g) {
            Granule& granule = granules_[g];
            if (granule.state == State::kAtomic) settle_atomics(granule, g, reader, access);
            if (granule.state != State::kWritten) check_readable(granule, g, access);
            check_order(granule, g, reader, access);
            note_reading(g, reader, access);
        }
    }

    void write(const Agent& writer, const Access& access, State state = State::kWritten) {
        for (uint32_t g = first(access); g <= last(access); ++g) {
            check_writable(g, writer, access);
            granules_[g] = {writer.now(), static_cast<uint8_t>(writer.id), state, false,
                            static_cast<uint8_t>(access.lane)};
        }
    }

    // Writes values. One that nothing orders after the last write, but that changes nothing, is no race: what all warps
    // hold alike, Triton has them all store.
    void store(const Agent& writer, const Access& access, const void* values) {
        uint8_t* to = at(access);
        const Granule& granule = granules_[first(access)];
        const bool ordered = happened_before(granule, writer) && !between_lanes(granule, writer, access);
        if (granule.state == State::kWritten && !ordered && !memcmp(to, values, access.bytes)) return;
        write(writer, access);
        memcpy(to, values, access.bytes);
    }

    // Atomics of all warps may come in any order; what is not atomic must be ordered after them all.
    void atomic(const Agent& agent, const Access& access) {
        for (uint32_t g = first(access); g <= last(access); ++g) {
            Granule& granule = granules_[g];
            if (granule.state != State::kAtomic) {
                if (granule.state != State::kWritten) check_readable(granule, g, access);
                check_writable(g, agent, access);
                std::fill_n(&reading(g, 0), warps_, Reading{0, 0});
            }
            note_reading(g, agent, access);
            granule = {agent.now(), static_cast<uint8_t>(agent.id), State::kAtomic, false,
                       static_cast<uint8_t>(access.lane)};
        }
    }

    // The same as long as nobody writes there: folded into `version`.
    uint64_t version(uint64_t version, uint32_t at, uint32_t bytes) const {
        for (uint32_t g = index(at); g <= index(at + bytes - 1); ++g)
            version = (version ^ (uint64_t(granules_[g].clock) << 8 | granules_[g].writer)) * 0x9e3779b97f4a7c15ull;
        return version;
    }

    // What was on its way has come, or an mbarrier is no more.
    void settle(uint32_t at, uint32_t bytes, int writer, uint32_t clock, State state, int copied_by = -1) {
        for (uint32_t g = index(at); g <= index(at + bytes - 1); ++g)
            granules_[g] = {clock, static_cast<uint8_t>(writer), state, copied_by >= 0,
                            static_cast<uint8_t>(copied_by)};
    }

    // An mbarrier may be used by whoever knows of its mbarrier.init.
    void check_order(const Agent& user, const Access& access) const {
        check_order(granules_[index(access.at)], index(access.at), user, access);
    }

  private:
    uint32_t index(uint32_t at) const { return (at - kSharedBase) >> granule_log_; }
    uint32_t first(const Access& access) const { return index(access.at); }
    uint32_t last(const Access& access) const { return index(access.at + access.bytes - 1); }
    uint32_t offset(uint32_t g) const { return g << granule_log_; }

    void settle_atomics(Granule& granule, uint32_t g, const Agent& reader, const Access& access) {
        for (int warp = 0; warp < warps_ && checks_ & kCheckRaces; ++warp)
            if (reading(g, warp).clock > reader.known.seen.of[warp])
                fail("race: %s of shared offset %u, which warp %d may still be updating", access.what, offset(g), warp);
        granule.state = State::kWritten;
    }
    [[gnu::noinline]] void check_readable(const Granule& granule, uint32_t g, const Access& access) const {
        if (granule.state == State::kUnwritten) {
            if (checks_ & kCheckInitialized)
                fail("%s of shared offset %u, which was never written", access.what, offset(g));
        } else if (granule.state == State::kBarrier) {
            fail("%s of shared offset %u, which holds an mbarrier", access.what, offset(g));
        } else {
            fail("%s of shared offset %u while %s is still on its way there", access.what, offset(g),
                 granule.state == State::kCopying ? "a cp.async" : "a TMA load");
        }
    }

    static bool happened_before(const Granule& granule, const Agent& agent) {
        return granule.clock <= agent.known.seen.of[granule.writer];
    }
    // Whether an access of the agent's own warp at that time was another lane's, and nothing orders the two. Lanes are
    // threads to the memory model: barriers order their accesses (PTX ISA, "bar.warp.sync"), but shfl.sync, vote.sync
    // and mma.sync exchange values and promise no order of memory.
    static bool between_lanes(uint32_t clock, int lane, const Agent& agent, const Access& access) {
        return clock > agent.ordered && lane != access.lane;
    }
    bool between_lanes(const Granule& granule, const Agent& agent, const Access& access) const {
        return checks_ & kCheckLanes && granule.writer == agent.id &&
               between_lanes(granule.clock, granule.lane, agent, access);
    }

    // That the last write happened before, and to the async proxy, that a proxy fence came between. Between cp.async
    // and wgmma the PTX ISA asks for that fence, too ("Async proxy": cp.async writes by the generic one), but Triton
    // and CUTLASS leave it out: an option.
    void check_order(const Granule& granule, uint32_t g, const Agent& agent, const Access& access) const {
        if (!(checks_ & kCheckRaces)) return;
        if (!happened_before(granule, agent)) fail_race(granule, g, access);
        if (between_lanes(granule, agent, access))
            fail("race: %s of shared offset %u, lane %d, written by lane %d of the same warp without bar.warp.sync",
                 access.what, offset(g), access.lane, granule.lane);
        if (access.proxy == Proxy::kAsync && granule.writer < kWarps &&
            (!granule.copied || checks_ & kCheckCopyProxy) && granule.clock > agent.known.fenced.of[granule.writer])
            fail("missing proxy fence: %s of shared offset %u, written by ordinary stores of warp %d", access.what,
                 offset(g), granule.writer);
    }
    [[noreturn, gnu::noinline]] void fail_race(const Granule& granule, uint32_t g, const Access& access) const {
        const bool warp = granule.writer < kWarps;
        fail("race: %s of shared offset %u, written by %s %d without synchronization", access.what, offset(g),
             warp ? "warp" : "TMA of mbarrier", warp ? granule.writer : granule.writer - kWarps);
    }

    Reading& reading(uint32_t g, int warp) { return readings_[size_t(g) * warps_ + warp]; }
    void note_reading(uint32_t g, const Agent& reader, const Access& access) {
        Reading& last = reading(g, reader.id);
        const bool several = between_lanes(last.clock, last.lane, reader, access);
        last = {reader.now(), static_cast<uint32_t>(several ? kSeveralLanes : access.lane)};
    }

    void check_writable(uint32_t g, const Agent& writer, const Access& access) {
        const Granule& granule = granules_[g];
        if (granule.state > State::kAtomic)
            fail("%s to shared offset %u, %s", access.what, offset(g),
                 granule.state == State::kBarrier ? "which holds an mbarrier"
                                                  : "while a copy is still on its way there");
        if (!(checks_ & kCheckRaces)) return;
        if (granule.state != State::kUnwritten) check_order(granule, g, writer, access);
        const Reading* readings = &reading(g, 0);
        for (int warp = 0; warp < warps_; ++warp)
            if (readings[warp].clock > writer.known.seen.of[warp])
                fail("race: %s to shared offset %u, which warp %d may still be reading", access.what, offset(g), warp);
        if (checks_ & kCheckLanes && between_lanes(readings[writer.id].clock, readings[writer.id].lane, writer, access))
            fail("race: %s to shared offset %u, which another lane of the warp may still be reading: no bar.warp.sync",
                 access.what, offset(g));
    }

    uint32_t size_ = 0;
    int granule_log_ = 2, warps_ = 0;
    int64_t checks_ = 0;
    std::vector<uint8_t> bytes_;
    std::vector<Granule> granules_;
    std::vector<Reading> readings_;  // [granule][warp]
};

}  // namespace ptx
