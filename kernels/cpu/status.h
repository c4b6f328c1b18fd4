// How a function called from Python reports failure. No exception may cross the C ABI or leave a
// parallel region, so buffers are allocated before the region.

#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <new>

namespace nybble {

// kernels/cpu/library.py has the same numbers. Only allocations can throw in these functions.
enum Status : int { kDone = 0, kOutOfMemory = 1 };

struct FreeAligned {
    void operator()(float* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
using Buffers = std::unique_ptr<float[], FreeAligned>;

// Uninitialized memory: `each` floats for each thread. It begins at a cache line; each thread's part
// does too if `each` is a multiple of 16.
inline Buffers buffers(int64_t threads, int64_t each) {
    return Buffers(new (std::align_val_t{64}) float[threads * each]);
}

}  // namespace nybble
