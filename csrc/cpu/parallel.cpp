#include "parallel.h"

#include <cstdlib>
#include <memory>
#include <new>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace pyattn {

namespace {

struct Free {
    void operator()(void* block) const { std::free(block); }
};

}  // namespace

void parallel_for(int64_t tasks, int threads, int64_t scratch_bytes, TaskBody body, const void* context) {
    if (tasks == 0) return;
    const int team = tasks < threads ? static_cast<int>(tasks) : threads;
    const int64_t stride = (scratch_bytes + 63) / 64 * 64;
    const std::unique_ptr<void, Free> block(std::aligned_alloc(64, static_cast<size_t>(stride * team + 64)));
    if (!block) throw std::bad_alloc();
    char* const scratch = static_cast<char*>(block.get());
#ifdef _OPENMP
    if (team > 1) {
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) body(context, task, scratch + omp_get_thread_num() * stride);
        return;
    }
#endif
    for (int64_t task = 0; task < tasks; ++task) body(context, task, scratch);
}

}  // namespace pyattn
