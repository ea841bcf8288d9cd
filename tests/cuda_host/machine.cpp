// Runs a kernel's threads on the host, one at a time, so that what a GPU leaves open goes wrong:
// - Threads are fibers. Warps run in an order that a seed draws, and run on for as long as it likes.
// - A warp's operations are done when its last lane arrives; lanes that are elsewhere are an error, not a wait.
// - Asynchronous copies land when they are waited for. Until then NaN lies where they go.
// - Shared memory is as large as the launch says, and holds NaN at the start of every block.
#include "machine.h"

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

int machine_thread, machine_block;
unsigned char* machine_shared;

namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = 1 << 18;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuardBytes = 0;  // the sanitizer watches
#else
constexpr size_t kGuardBytes = 4096;  // behind shared memory; nothing may be written there
#endif
constexpr unsigned char kPoison = 0xff;  // four, eight or two of it are NaN

enum class State { kReady, kInWarp, kAtBarrier, kDone };

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
    void* stack_pointer = nullptr;
    State state = State::kDone;
    int operation = 0;
    void* operand = nullptr;
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};

std::vector<Fiber> fibers;
void* scheduler;  // its stack pointer
void (*running)(const void*);
const void* arguments;
char failure[256];

// Saves the registers that a function must keep, and goes on where `to` has saved its own.
extern "C" void machine_switch(void** from, void* to);
asm(R"(
.text
.globl machine_switch
machine_switch:
    push %rbp
    push %rbx
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbx
    pop %rbp
    ret
)");

Fiber& current() { return fibers[machine_thread]; }

void leave() { machine_switch(&current().stack_pointer, scheduler); }

// Ends the launch.
void fail(const char* what) {
    snprintf(failure, sizeof failure, "block %d, thread %d: %s", machine_block, machine_thread, what);
    leave();
}

void fiber_main() {
    running(arguments);
    current().state = State::kDone;
    leave();
    abort();
}

void start(Fiber& f) {
    f.state = State::kReady;
    f.groups.clear();
    f.open.clear();
    // As machine_switch leaves a stack: six registers below the address to return to.
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(f.stack.get()) + kStackBytes) & ~uintptr_t{15});
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(fiber_main);
    top -= 6;
    memset(top, 0, 6 * sizeof(void*));
    f.stack_pointer = top;
}

// Runs every lane of a warp up to its next operation. Returns how many there were to run.
int run_warp(int warp) {
    int ran = 0;
    for (machine_thread = warp * kWarp; machine_thread < (warp + 1) * kWarp; ++machine_thread) {
        if (current().state != State::kReady) continue;
        const int thread = machine_thread;
        machine_switch(&scheduler, current().stack_pointer);
        machine_thread = thread;
        if (failure[0]) return -1;
        ++ran;
    }
    return ran;
}

bool run_block(std::mt19937& random) {
    const int warps = static_cast<int>(fibers.size()) / kWarp;
    std::vector<int> order(warps);
    for (int w = 0; w < warps; ++w) order[w] = w;
    for (Fiber& f : fibers) start(f);
    while (true) {
        for (int w = warps - 1; w > 0; --w) std::swap(order[w], order[random() % (w + 1)]);
        int ran = 0;
        for (int warp : order) {
            for (unsigned turns = 1 + random() % 8; turns > 0; --turns) {
                const int in_turn = run_warp(warp);
                if (in_turn < 0) return false;
                if (in_turn == 0) break;
                ran += in_turn;
            }
        }
        size_t done = 0, at_barrier = 0;
        for (const Fiber& f : fibers) {
            done += f.state == State::kDone;
            at_barrier += f.state == State::kAtBarrier;
        }
        if (done == fibers.size()) return true;
        if (done + at_barrier == fibers.size()) {
            for (Fiber& f : fibers) {
                if (f.state == State::kAtBarrier) f.state = State::kReady;
            }
        } else if (ran == 0) {
            snprintf(failure, sizeof failure, "block %d: a warp waits for lanes that are elsewhere", machine_block);
            return false;
        }
    }
}

void land(const Copy& copy) {
    if (copy.valid) {
        memcpy(copy.to, copy.from, 16);
    } else {
        memset(copy.to, 0, 16);
    }
}

}  // namespace

void machine_barrier() {
    current().state = State::kAtBarrier;
    leave();
}

void machine_together(int operation, void* operand, void (*all)(void**)) {
    Fiber* const warp = &fibers[machine_thread / kWarp * kWarp];
    current().operation = operation;
    current().operand = operand;
    current().state = State::kInWarp;
    void* operands[kWarp];
    for (int lane = 0; lane < kWarp; ++lane) {
        if (warp[lane].state != State::kInWarp) return leave();
        operands[lane] = warp[lane].operand;
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        if (warp[lane].operation != operation) return fail("lanes of a warp are at different operations");
        warp[lane].state = State::kReady;
    }
    all(operands);
}

void machine_copy16(void* to, const void* from, bool valid) {
    memset(to, kPoison, 16);
    current().open.push_back({to, from, valid});
}

void machine_copies_end() {
    current().groups.push_back(std::move(current().open));
    current().open.clear();
}

void machine_copies_wait(int pending) {
    std::vector<std::vector<Copy>>& groups = current().groups;
    while (static_cast<int>(groups.size()) > pending) {
        for (const Copy& copy : groups.front()) land(copy);
        groups.erase(groups.begin());
    }
}

const char* machine_run(void (*kernel)(const void*), const void* args, int blocks, int threads, int shared_bytes,
                        unsigned seed) {
    failure[0] = 0;
    running = kernel;
    arguments = args;
    std::mt19937 random(seed);
    if (static_cast<int>(fibers.size()) != threads) fibers = std::vector<Fiber>(threads);
    std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes + kGuardBytes]);
    machine_shared = shared.get();
    for (machine_block = 0; machine_block < blocks; ++machine_block) {
        memset(machine_shared, kPoison, shared_bytes + kGuardBytes);
        if (!run_block(random)) return failure;
        for (size_t i = 0; i < kGuardBytes; ++i) {
            if (machine_shared[shared_bytes + i] != kPoison) return "a kernel wrote past its shared memory";
        }
    }
    return nullptr;
}
