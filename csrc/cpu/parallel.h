// Tasks over threads. Compiled once, without instruction-set flags.
#pragma once

#include <cstdint>

namespace pyattn {

// Uninitialised memory, aligned to 64 bytes. Throws std::bad_alloc.
class Block {
  public:
    explicit Block(int64_t bytes);
    ~Block();
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
    void* get() const { return memory_; }

  private:
    void* memory_;
};

// `scratch` is the executing thread's own block, aligned to 64 bytes.
using TaskBody = void (*)(const void* context, int64_t task, void* scratch);

// Runs body for every task in [0, tasks), in any order, on at most `threads` threads.
// Throws std::bad_alloc before the first task when the scratch cannot be had.
void parallel_for(int64_t tasks, int threads, int64_t scratch_bytes, TaskBody body, const void* context);

}  // namespace pyattn
