#include "parallel.h"

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __unix__
#include <pthread.h>
#endif

namespace pyattn {

namespace {

constexpr int64_t kAlignment = 64;  // a cache line

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// OpenMP's threads do not survive a fork(), and its next team would wait for them for ever.
bool openmp_usable = true;
#ifdef __unix__
const int watching_forks = pthread_atfork(nullptr, nullptr, [] { openmp_usable = false; });
#endif

class Team {
  public:
    Team(int64_t tasks, TaskBody body, const void* context, char* scratch, int64_t stride)
        : tasks_(tasks), body_(body), context_(context), scratch_(scratch), stride_(stride) {}

    void run(int size) {
        if (size == 1) return work(0);
#ifdef _OPENMP
        if (openmp_usable) {
#pragma omp parallel num_threads(size)
            work(omp_get_thread_num());
            return;
        }
#endif
        std::vector<std::thread> others;
        for (int member = 1; member < size; ++member) others.emplace_back([this, member] { work(member); });
        work(0);
        for (std::thread& other : others) other.join();
    }

  private:
    void work(int member) {
        for (int64_t task = next_++; task < tasks_; task = next_++) body_(context_, task, scratch_ + member * stride_);
    }

    int64_t tasks_;
    TaskBody body_;
    const void* context_;
    char* scratch_;
    int64_t stride_;
    alignas(kAlignment) std::atomic<int64_t> next_{0};
};

}  // namespace

Block::Block(int64_t bytes) : memory_(std::aligned_alloc(kAlignment, static_cast<size_t>(aligned(bytes + 1)))) {
    if (!memory_) throw std::bad_alloc();
}

Block::~Block() { std::free(memory_); }

void parallel_for(int64_t tasks, int threads, int64_t scratch_bytes, TaskBody body, const void* context) {
    if (tasks == 0) return;
    const int team = tasks < threads ? static_cast<int>(tasks) : threads;
    const int64_t stride = aligned(scratch_bytes);
    const Block block(stride * team);
    Team(tasks, body, context, static_cast<char*>(block.get()), stride).run(team);
}

}  // namespace pyattn
