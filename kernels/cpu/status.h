// How a function called from Python fails: no exception may cross the C ABI, nor leave a parallel
// region, before which buffers are therefore allocated.

#pragma once

#include <cstdint>
#include <exception>
#include <memory>

namespace nybble {

// The Python side knows the numbers. Allocations are all that throws here.
enum Status : int { kDone = 0, kOutOfMemory = 1 };

// `each` floats for each of so many threads, not initialized.
inline std::unique_ptr<float[]> buffers(int64_t threads, int64_t each) {
    return std::unique_ptr<float[]>(new float[threads * each]);
}

}  // namespace nybble
