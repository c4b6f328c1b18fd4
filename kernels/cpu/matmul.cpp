// out = x · Wᵀ + bias for a packed weight W; kernels/reference.py defines it.

#include <algorithm>

#include "kernels.h"
#include "product.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

template <class Product>
void multiply(const Product& product, const PackedArgs& a, int threads) {
    const int64_t tiles = (a.outputs + 15) / 16, size = product.buffer_size();
    const int64_t each = tiles_of_task(tiles, a.octets * a.rows, threads);
    const auto all_buffers = buffers(threads, size);
    parallel_for((tiles + each - 1) / each, threads, [&](int64_t task, int thread) {
        const int64_t first = task * each;
        multiply_tiles(product, first, std::min(first + each, tiles),
                       all_buffers.get() + thread * size);
    });
}

extern "C" int nybble_packed_matmul(const bf16* x, const uint8_t* codes, const void* scales,
                                    const void* zeros, const float* levels, const float* bias,
                                    bf16* out, int64_t rows, int64_t outputs, int64_t columns,
                                    int64_t groups, int64_t octets_per_group, int scale_type,
                                    int digits, int activation_bits, int threads) try {
    // A group may be larger than the weight, and buffers are made for one.
    octets_per_group = std::min(octets_per_group, columns / 8);
    const PackedArgs a{x,       codes,       scales,      zeros,  levels,           bias,       out,
                       rows,    outputs,     columns,     columns / 8, groups, octets_per_group,
                       scale_type, digits};
    with_product(levels, digits, activation_bits, [&](auto tag) {
        multiply(typename decltype(tag)::type(a, threads), a, threads);
    });
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
