// The logits of a mixture's router; kernels/reference.py defines them.

#include "simd.h"

using namespace nybble;

namespace {

inline Floats load_input(const bf16* source) { return load_bf16(source); }
inline Floats load_input(const float* source) { return load(source); }

// Always added in this order, so that a row's logits do not depend on the other rows.
template <typename T>
float product(const T* x, const float* weight, int64_t inputs) {
    constexpr int kSums = 4;
    Floats sums[kSums] = {zero(), zero(), zero(), zero()};
    int64_t i = 0;
    for (; i + 16 * kSums <= inputs; i += 16 * kSums)
        for (int s = 0; s < kSums; ++s)
            sums[s] = fma(load_input(x + i + 16 * s), load(weight + i + 16 * s), sums[s]);
    for (; i < inputs; i += 16) sums[0] = fma(load_input(x + i), load(weight + i), sums[0]);
    return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
void logits(const T* x, const float* weight, const float* bias, float* out, int64_t rows,
            int64_t inputs, int64_t outputs, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * outputs > 256)
    for (int64_t n = 0; n < outputs; ++n)
        for (int64_t row = 0; row < rows; ++row)
            out[row * outputs + n] = product(x + row * inputs, weight + n * inputs, inputs) +
                                     (bias ? bias[n] : 0.0f);
}

}  // namespace

// Contiguous; inputs is a multiple of 16. bias may be null.
extern "C" void nybble_router_logits(const void* x, const float* weight, const float* bias,
                                     float* out, int64_t rows, int64_t inputs, int64_t outputs,
                                     int is_bf16, int threads) {
    if (is_bf16)
        logits(static_cast<const bf16*>(x), weight, bias, out, rows, inputs, outputs, threads);
    else
        logits(static_cast<const float*>(x), weight, bias, out, rows, inputs, outputs, threads);
}
