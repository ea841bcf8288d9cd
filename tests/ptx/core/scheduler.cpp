// Who runs when: CTAs in the seed's order, one after another; the warps of one by turns, of random length and with
// random weights, so that some seeds starve a warp; and between turns, what is on its way lands.
#include <cmath>
#include <string>
#include <utility>

#include "step.h"

namespace ptx {
namespace {

double random_weight(Random& random) { return std::pow(10.0, -2 * random.unit()); }

// That a wgmma or tcgen05.ld in flight does not hold what the instruction touches. LLVM packs what a tcgen05.ld loads
// into pairs before the wait: a move that ptxas dissolves.
void check_registers_in_flight(const Step& s) {
    if (s.i.op == OP_PACK32 && !s.warp.loading.empty()) return;
    for (uint32_t bits = s.i.registers; bits; bits &= bits - 1) {
        const int k = __builtin_ctz(bits);
        const Use use = s.warp.use[s.operands[k] / kLanes];
        const bool writes = s.i.destinations >> k & 1;
        if (use == Use::kWritten || (use == Use::kRead && writes))
            fail("a register that a wgmma in flight %s", use == Use::kWritten ? "writes" : "reads");
    }
}

void note_accesses(const Step& s) {
    for (uint32_t bits = s.i.registers; bits; bits &= bits - 1) {
        const int k = __builtin_ctz(bits), r = s.operands[k] / kLanes;
        s.warp.accessed[r] = s.warp.epoch;
        if (s.i.destinations >> k & 1) s.warp.written[r] = s.warp.epoch;
    }
}

std::string awaited(const Warp& warp) {
    const std::string what = std::to_string(warp.wait == Wait::kMBarrier ? warp.awaited - kSharedBase : warp.awaited);
    if (warp.wait == Wait::kNamedBarrier) return "barrier " + what;
    if (warp.wait == Wait::kRegisters) return what + " registers";
    return "the mbarrier at shared offset " + what + " phase " + std::to_string(warp.parity);
}

bool can_go_on(Machine& machine, const Warp& warp) {
    switch (warp.wait) {
        case Wait::kMBarrier: return !machine.mbarriers.at(warp.awaited).waiting(warp.parity);
        case Wait::kRegisters: return static_cast<int>(warp.awaited) <= machine.register_pool;
        default: return false;  // the last to arrive wakes those at a named barrier
    }
}

}  // namespace

void Machine::begin_warp(Warp& w, int id) {
    w.begin(id);
    w.registers.assign(program.words, 0x7fc0dead);  // NaN
    w.local.assign(size_t(kLanes) * program.local_bytes, 0xFF);
    w.predicates.assign(program.predicates, 0xAAAAAAAA);
    if (program.keeps_registers) {
        w.accessed.assign(program.words / kLanes, 0);
        w.written.assign(program.words / kLanes, 0);
        w.summed.assign(program.words / kLanes, {0, 0});
        w.use.assign(program.words / kLanes, Use::kFree);
    }
    for (const Constant& constant : program.constants) {
        uint32_t* to = &w.registers[constant.bytes ? constant.offset : 0];
        if (!constant.bytes) w.predicates[constant.offset] = constant.value ? kAllLanes : 0;
        for (int lane = 0; lane < kLanes; ++lane)
            memcpy(to + lane * constant.bytes / 4, &constant.value, constant.bytes);
    }
    uint32_t values[kSpecials] = {};
    for (int d = 0; d < 3; ++d) values[kCtaX + d] = cta[d], values[kGridX + d] = grid[d];
    values[kTidX] = id * kLanes, values[kNtidX] = threads, values[kWarpId] = id;
    for (int k = 0; k < kSpecials; ++k)
        for (int lane = 0; lane < kLanes && program.special[k] >= 0; ++lane)
            w.registers[program.special[k] + lane] = values[k] + (k == kTidX || k == kLaneId ? lane : 0);
    w.paths.assign(1, {0, kAllLanes});
    w.exited = false;
    w.wait = Wait::kNone;
    w.epoch = kFirstEpoch;
    w.loading.clear(), w.copies.clear(), w.products.clear(), w.stores.clear();
    w.register_count = static_cast<int>(options.registers);
    w.weight = random_weight(random);
}

void Machine::end_warp() {
    if (!warp->products.empty()) fail("ends with a wgmma that was not waited for");
    if (!warp->stores.empty()) fail("ends with a TMA store that was not waited for");
    complete_copies(*this, *warp, 0);
    if (!warp->copies.empty()) fail("ends with a cp.async that was not committed");
    register_pool += warp->register_count * kLanes;
}

// Until the warp waits, has ended, or had its turn of so many instructions.
void Machine::run_warp(int turn) {
    Warp& w = *warp;
    for (; turn > 0; --turn) {
        w.reconverge();
        const int32_t pc = w.paths[0].pc;
        const Instruction& i = program.code[pc];
        instruction = &i;
        uint32_t lanes = w.paths[0].lanes;
        if (i.predicate > 0) lanes &= w.predicates[i.predicate - 1];
        if (i.predicate < 0) lanes &= ~w.predicates[-i.predicate - 1];
        ++statistics.executed;
        if (statistics.on) ++statistics.counts[pc];
        if (!lanes) {
            ++w.paths[0].pc;
            continue;
        }
        Step step(*this, i, lanes);
        if (program.keeps_registers && !i.exempt && w.has_registers_in_flight() && checks(kCheckRegisters))
            check_registers_in_flight(step);
        kExecute[i.op](step);
        if (i.op == OP_BRA || i.op == OP_BRX || i.op == OP_RET) {
            if (w.exited) return end_warp();
            continue;
        }
        if (w.wait == Wait::kMBarrier || w.wait == Wait::kRegisters) return;  // the same again later
        if (program.keeps_registers && !i.exempt) note_accesses(step);
        ++w.paths[0].pc;
        if (w.wait != Wait::kNone) return;
    }
}

void Machine::begin_cta() {
    shared.begin(shared_bytes, program.granule, static_cast<int>(warps.size()), options.checks);
    mbarriers.clear();
    for (NamedBarrier& barrier : barriers) barrier.clear();
    loads.clear();
    tensor_queue.clear();
    tensor.columns = 0;
    if (program.keeps_registers) tensor_order.begin(options.checks);
    register_pool = 0;
    for (size_t k = 0; k < warps.size(); ++k) begin_warp(warps[k], static_cast<int>(k));
}

void Machine::end_cta() {
    if (!loads.empty()) fail("ends with a TMA load on its way");
    if (!tensor_queue.empty()) fail("ends with a tcgen05.mma or commit on its way");
    if (tensor.columns) fail("ends with tensor memory allocated");
    for (const NamedBarrier& barrier : barriers)
        if (barrier.arrived)
            fail("ends with barrier %d half way: %d of %d threads", static_cast<int>(&barrier - barriers),
                 barrier.arrived, barrier.expected);
    ++statistics.ctas;
}

void Machine::fail_deadlock() {
    std::string text = "deadlock:";
    for (const Warp& w : warps) {
        if (w.exited) continue;
        text += " warp " + std::to_string(w.id) + " at @" + std::to_string(w.paths[0].pc) + " waits for " + awaited(w) +
                ";";
    }
    fail("%s", text.c_str());
}

void Machine::run_cta() {
    begin_cta();
    const double landing_weight = random_weight(random);
    const uint64_t limit = statistics.executed + options.instructions;
    std::vector<int> ready;
    for (;;) {
        double total = 0;
        bool all_exited = true;
        ready.clear();
        for (Warp& w : warps) {
            if (w.exited) continue;
            all_exited = false;
            if (w.wait != Wait::kNone && can_go_on(*this, w)) w.wait = Wait::kNone;
            if (w.wait == Wait::kNone) ready.push_back(w.id), total += w.weight;
        }
        warp = nullptr;
        instruction = nullptr;
        if (all_exited) return end_cta();
        const uint32_t on_their_way = static_cast<uint32_t>(loads.size()) + !tensor_queue.empty();
        if (ready.empty() && !on_their_way) fail_deadlock();
        double pick = random.unit() * (total + on_their_way * landing_weight);
        if (ready.empty() || pick >= total) {
            const uint32_t k = random.below(on_their_way);
            if (k < loads.size())
                land(*this, k);
            else
                advance_tensor_core(*this);
            continue;
        }
        size_t k = 0;
        while (k + 1 < ready.size() && pick >= warps[ready[k]].weight) pick -= warps[ready[k++]].weight;
        warp = &warps[ready[k]];
        run_warp(1 + static_cast<int>(random.below(static_cast<uint32_t>(options.quantum))));
        if (statistics.executed > limit)
            fail("more than %lld instructions", static_cast<long long>(options.instructions));
    }
}

void Machine::run() {
    const uint64_t count = uint64_t(grid[0]) * grid[1] * grid[2];
    std::vector<uint64_t> order(count);
    for (uint64_t k = 0; k < count; ++k) order[k] = k;
    for (uint64_t k = count; k > 1; --k) std::swap(order[k - 1], order[random.below(static_cast<uint32_t>(k))]);
    for (uint64_t number : order) {
        global.begin_cta(number);
        cta[0] = static_cast<uint32_t>(number % grid[0]);
        cta[1] = static_cast<uint32_t>(number / grid[0] % grid[1]);
        cta[2] = static_cast<uint32_t>(number / grid[0] / grid[1]);
        run_cta();
    }
}

}  // namespace ptx
