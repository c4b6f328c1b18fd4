// Which of a parallel region's threads runs. Without OpenMP its pragmas are passed over, and one does
// all of the work.

#pragma once

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

}  // namespace nybble
