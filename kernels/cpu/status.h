// How a function called from Python reports failure. No exception may cross the C ABI or leave a
// parallel region, so buffers are allocated before the region.

#pragma once

#include <cstdint>
#include <exception>
#include <memory>

namespace nybble {

// The numbers are also in the Python side. Only allocations can throw here.
enum Status : int { kDone = 0, kOutOfMemory = 1 };

// `each` floats for each of so many threads, not initialized.
inline std::unique_ptr<float[]> buffers(int64_t threads, int64_t each) {
    return std::unique_ptr<float[]>(new float[threads * each]);
}

}  // namespace nybble
