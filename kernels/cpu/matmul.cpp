// out = x · Wᵀ + bias for a packed weight W; kernels/reference.py defines it.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "status.h"

#if defined(__AVX512BF16__)
#include "matmul_avx512.h"
#else
#include "matmul_avx2.h"
#endif

using namespace nybble;

// (rows, groups) sums of x.
static std::vector<float> sums_of_groups(const PackedArgs& a) {
    std::vector<float> sums(a.rows * a.groups);
    const int64_t width = a.octets_per_group * 8;
    for (int64_t r = 0; r < a.rows; ++r)
        for (int64_t g = 0; g < a.groups; ++g) {
            const int64_t end = std::min(a.columns, (g + 1) * width);
            Floats total = zero();
            int64_t k = g * width;
            for (; k + 16 <= end; k += 16) total = total + load_bf16(a.x + r * a.columns + k);
            float rest = sum(total);
            for (; k < end; ++k) rest += to_float(a.x[r * a.columns + k]);
            sums[r * a.groups + g] = rest;
        }
    return sums;
}

// Work is handed out in chunks of 4 tiles (64 outputs) to whichever thread is free: the event loop
// runs on the same cores, and equal shares would wait for the thread it interrupts.
extern "C" int nybble_packed_matmul(const bf16* x, const uint8_t* codes, const void* scales,
                                    const void* zeros, const float* levels, const float* bias,
                                    bf16* out, int64_t rows, int64_t outputs, int64_t columns,
                                    int64_t groups, int64_t octets_per_group, int scale_type,
                                    int threads) try {
    // A group may be larger than the weight, and buffers are made for one.
    octets_per_group = std::min(octets_per_group, columns / 8);
    PackedArgs a{x,    nullptr, nullptr, codes,       scales, zeros,            levels,    bias, out,
                 rows, outputs, columns, columns / 8, groups, octets_per_group, scale_type};
    std::vector<float> sums;
    std::unique_ptr<float[]> wide;
    if (zeros) {
        sums = sums_of_groups(a);
        a.group_sums = sums.data();
    }
    if (kWantsWideX) {
        wide = buffers(1, rows * columns);
        for (int64_t i = 0; i < rows * columns; ++i) wide[i] = to_float(x[i]);
        a.wide_x = wide.get();
    }
    const int64_t tiles = (outputs + 15) / 16;
    constexpr int64_t kChunk = 4;
    const int64_t chunks = (tiles + kChunk - 1) / kChunk;
    const int64_t size = buffer_size(a);
    const auto all_buffers = buffers(threads, size);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        packed_tiles(a, chunk * kChunk, std::min(kChunk, tiles - chunk * kChunk),
                     all_buffers.get() + omp_get_thread_num() * size);
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
