// Control flow, and what the lanes of a warp do together (PTX ISA, "Control Flow Instructions", "Data Movement and
// Conversion Instructions: shfl.sync", "Parallel Synchronization and Communication Instructions: redux.sync,
// elect.sync, bar.warp.sync").
#include <algorithm>

#include "numbers.h"
#include "step.h"

namespace ptx {
namespace {

// Collectives name their members, who must all come. Lanes that are elsewhere would still have to: those run first
// whose instruction comes first, so they could only come by a branch back.
void need_members(const Step& s, uint32_t members, const char* what) {
    if (members & ~s.lanes)
        fail("%s waits for lanes %08x, of which %08x are elsewhere", what, members, members & ~s.lanes);
}

}  // namespace

void execute_BRA(Step& s) {
    Path& path = s.warp.paths[0];
    if (path.lanes == s.lanes) {
        path.pc = s.i.target;
        return;
    }
    path.lanes &= ~s.lanes;
    ++path.pc;
    s.warp.paths.push_back({s.i.target, s.lanes});
}

// Operands: index, then the table of targets.
void execute_BRX(Step& s) {
    std::vector<Path>& paths = s.warp.paths;
    paths[0].lanes &= ~s.lanes;
    ++paths[0].pc;
    if (!paths[0].lanes) paths.erase(paths.begin());
    s.for_each_lane([&](int lane) {
        const uint32_t index = s.u32(0)[lane];
        if (index >= static_cast<uint32_t>(s.i.operands - 1)) fail("brx.idx beyond its table");
        paths.push_back({s.immediate(1 + index), 1u << lane});
    });
}

void execute_RET(Step& s) {
    Path& path = s.warp.paths[0];
    path.lanes &= ~s.lanes;
    ++path.pc;
    if (!path.lanes) s.warp.paths.erase(s.warp.paths.begin());
    s.warp.exited = s.warp.paths.empty();
}

void execute_TRAP(Step&) { fail("trap"); }

// Operands: [members]
void execute_BAR_WARP(Step& s) {
    if (s.i.operands) need_members(s, s.u32(0)[s.first_lane()], "bar.warp.sync");
    s.warp.order_lanes();
}

// Operands: d, a, b, c, members, [predicate]. sub: bits 0-1 mode (up, down, bfly, idx), 2: with predicate
void execute_SHFL(Step& s) {
    uint32_t from[kLanes], inside = 0;
    memcpy(from, s.u32(1), sizeof from);
    s.for_each_lane([&](int lane) {
        const uint32_t members = s.u32(4)[lane];
        need_members(s, members, "shfl.sync");
        if (!(members >> lane & 1)) fail("shfl.sync by a lane that it does not name");
        const int b = s.u32(2)[lane] & 31, clamp = s.u32(3)[lane] & 31, segment = s.u32(3)[lane] >> 8 & 31;
        const int least = lane & segment, most = least | (clamp & ~segment);
        int source = 0;
        bool valid = false;
        switch (s.field(0, 2)) {
            case 0: source = lane - b, valid = source >= most; break;
            case 1: source = lane + b, valid = source <= most; break;
            case 2: source = lane ^ b, valid = source <= most; break;
            case 3: source = least | (b & ~segment), valid = source <= most; break;
        }
        if (!valid) source = lane;
        if (!(s.lanes >> source & 1)) fail("shfl.sync reads lane %d, which is not there", source);
        s.u32(0)[lane] = from[source];
        inside |= static_cast<uint32_t>(valid) << lane;
    });
    if (s.field(2)) s.set_predicate(5, inside);
}

// Operands: d, a, members. sub: 0 add, 1 min.s32, 2 max.s32, 3 min.u32, 4 max.u32, 5 and, 6 or, 7 xor, 8 max.f32, 9
// min.f32
void execute_REDUX(Step& s) {
    const uint32_t* a = s.u32(1);
    const uint32_t members = s.u32(2)[s.first_lane()];
    if (members != s.lanes) fail("redux.sync over lanes %08x by %08x", members, s.lanes);
    uint32_t result = a[s.first_lane()];
    for (uint32_t rest = s.lanes & (s.lanes - 1); rest; rest &= rest - 1) {
        const uint32_t x = a[__builtin_ctz(rest)];
        const auto of_floats = [&](auto f) {
            return bit_cast<uint32_t>(f(bit_cast<float>(result), bit_cast<float>(x)));
        };
        switch (s.i.sub) {
            case 0: result += x; break;
            case 1: result = std::min<int32_t>(result, x); break;
            case 2: result = std::max<int32_t>(result, x); break;
            case 3: result = std::min(result, x); break;
            case 4: result = std::max(result, x); break;
            case 5: result &= x; break;
            case 6: result |= x; break;
            case 7: result ^= x; break;
            case 8: result = of_floats([](float r, float y) { return std::fmax(r, y); }); break;
            case 9: result = of_floats([](float r, float y) { return std::fmin(r, y); }); break;
        }
    }
    s.each(s.u32(0), [=](int) { return result; });
}

// Operands: d (a predicate, of ballot a register), predicate, members. sub: bits 0-1: all, any, uni, ballot; 2: of the
// negated predicate
void execute_VOTE(Step& s) {
    const uint32_t members = s.u32(2)[s.first_lane()];
    if (members != s.lanes) fail("vote.sync over lanes %08x by %08x", members, s.lanes);
    const uint32_t votes = (s.field(2) ? ~s.predicate(1) : s.predicate(1)) & members;
    const bool all = votes == members, any = votes != 0;
    switch (s.field(0, 2)) {
        case 0: s.set_predicate(0, all ? kAllLanes : 0); break;
        case 1: s.set_predicate(0, any ? kAllLanes : 0); break;
        case 2: s.set_predicate(0, all || !any ? kAllLanes : 0); break;
        case 3: s.each(s.u32(0), [=](int) { return votes; }); break;
    }
}

// Operands: d
void execute_ACTIVEMASK(Step& s) {
    const uint32_t lanes = s.lanes;
    s.each(s.u32(0), [=](int) { return lanes; });
}

// Operands: d or -1, predicate, members.
void execute_ELECT(Step& s) {
    const uint32_t members = s.u32(2)[s.first_lane()];
    need_members(s, members, "elect.sync");
    const uint32_t leader = __builtin_ctz(members);
    if (s.immediate(0) >= 0) s.each(s.u32(0), [=](int) { return leader; });
    s.set_predicate(1, 1u << leader);
}

}  // namespace ptx
