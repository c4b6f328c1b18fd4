// How a function called from Python reports failure. No exception may cross the C ABI or leave a
// parallel region, so buffers are allocated before the region.

#pragma once

#include <cstdint>
#include <exception>
#include <memory>

namespace nybble {

// kernels/cpu/library.py has the same numbers. Only allocations can throw in these functions.
enum Status : int { kDone = 0, kOutOfMemory = 1 };

// Uninitialized memory: `each` floats for each thread.
inline std::unique_ptr<float[]> buffers(int64_t threads, int64_t each) {
    return std::unique_ptr<float[]>(new float[threads * each]);
}

}  // namespace nybble
