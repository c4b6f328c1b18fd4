// Which of a parallel region's threads runs. Without OpenMP its pragmas are passed over, and one does
// all of the work.

#pragma once

#include <cstdint>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace nybble {

inline int thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// body(i) of every i below count, by several threads if it is worth it. `omp parallel if` would make a
// team even of one thread, which takes microseconds if weights have driven it from the caches.
template <class Body>
inline void parallel_for(int64_t count, int threads, bool worth_it, Body body) {
    if (!worth_it) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
#pragma omp parallel for schedule(static) num_threads(threads) firstprivate(body)
    for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace nybble
