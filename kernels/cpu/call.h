// How a function called from Python fails: no exception may cross the C ABI, nor leave a parallel
// region, before which buffers are therefore allocated.

#pragma once

#include <cstdint>
#include <exception>
#include <memory>

namespace nybble {

// 0, or 1 where memory ran out, which is all that throws here.
template <typename Body>
int call(const Body& body) noexcept {
    try {
        body();
        return 0;
    } catch (const std::exception&) {
        return 1;
    }
}

// `each` floats for each of so many threads, not initialized.
inline std::unique_ptr<float[]> buffers(int threads, int64_t each) {
    return std::unique_ptr<float[]>(new float[threads * each]);
}

}  // namespace nybble
