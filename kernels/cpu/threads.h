// Work on several threads, which wait for each other a hundred times in a decode step.

#pragma once

#include <algorithm>
#include <cstdint>

namespace nybble {

using Call = void (*)(const void* task, int64_t index, int thread);

// Calls `call` for each index below count on up to `threads` threads, the caller's among them.
void run_parallel(int64_t count, int threads, Call call, const void* task);

// Calls task(index, thread) once for each index below count; each thread takes the next index when
// it is free. `thread` is below `threads`, and no two that run at once have the same.
template <class Task>
void parallel_for(int64_t count, int threads, const Task& task) {
    if (threads <= 1 || count <= 1) {
        for (int64_t index = 0; index < count; ++index) task(index, 0);
        return;
    }
    run_parallel(
        count, threads,
        [](const void* of, int64_t index, int thread) {
            (*static_cast<const Task*>(of))(index, thread);
        },
        &task);
}

// As parallel_for, for tasks that are so small that a thread takes some that follow each other.
template <class Task>
void parallel_for_small(int64_t count, int threads, const Task& task) {
    const int64_t each = threads <= 1 ? count : (count + 4 * threads - 1) / (4 * threads);
    if (each == 0) return;
    parallel_for((count + each - 1) / each, threads, [&](int64_t part, int thread) {
        const int64_t last = std::min(count, (part + 1) * each);
        for (int64_t index = part * each; index < last; ++index) task(index, thread);
    });
}

}  // namespace nybble
