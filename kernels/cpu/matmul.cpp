// out = x · Wᵀ + bias for a packed weight W; kernels/reference.py defines it.

#include <algorithm>

#include "kernels.h"
#include "product.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

// Work is handed out in chunks of 4 tiles (64 outputs) to whichever thread is free: the event loop
// runs on the same cores, and equal shares would wait for the thread it interrupts.
template <class Product>
void multiply(const Product& product, int64_t outputs, int threads) {
    const int64_t tiles = (outputs + 15) / 16;
    constexpr int64_t kChunk = 4;
    const int64_t chunks = (tiles + kChunk - 1) / kChunk;
    const int64_t size = product.buffer_size();
    const auto all_buffers = buffers(threads, size);
    parallel_for(chunks, threads, [&](int64_t chunk, int thread) {
        product.tiles(chunk * kChunk, std::min(kChunk, tiles - chunk * kChunk),
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
        multiply(typename decltype(tag)::type(a, threads), outputs, threads);
    });
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
