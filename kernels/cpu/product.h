// The packed matmul's inner loops, in the form which suits the CPU best.

#pragma once

#include <algorithm>

#if defined(__AMX_BF16__)
#include "matmul_amx.h"
#elif defined(__AVX512BF16__)
#include "matmul_bf16.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "matmul_dot.h"
#else
#include "matmul_int16.h"
#endif
#include "matmul_int8.h"

namespace nybble {

#if defined(__AMX_BF16__)
template <class Codes>
using BestProduct = TileProduct<Codes>;
#else
template <class Codes>
using BestProduct = Product<Codes>;
#endif

// Calls `use` with a tag of the Product that computes with such levels and digits, and activations in
// 8 bits if they are asked for and the CPU multiplies such codes as bytes.
template <class Use>
void with_product(const float* levels, int digits, int activation_bits, Use use) {
    if (activation_bits == 8) {
        if (digits == 1 && are_integers(levels)) return use(Tag<ByteProduct<IntegerBytes>>{});
#if defined(NYBBLE_LARGE_BYTES)
        if (digits == 1) return use(Tag<ByteProduct<LevelBytes>>{});
        return use(Tag<ByteProduct<ByteBytes>>{});
#endif
    }
    if (digits == 2) return use(Tag<BestProduct<ByteCodes>>{});
#if !defined(__AVX512BF16__)
    if (are_integers(levels)) return use(Tag<BestProduct<IntegerCodes>>{});
#endif
    use(Tag<BestProduct<LevelCodes>>{});
}

// A product is computed by tasks, which are handed to whichever thread is free: the event loop runs on
// the same cores, and equal shares would wait for the thread it interrupts. So many of a task's tiles
// are multiplied at a time.
constexpr int64_t kTilesAtATime = 4;

// How many of all `tiles` a task has, if each takes as long as so many octets of one row. Few rows wait
// for memory, which is best read in long pieces: what lies behind a piece is prefetched too, in vain if
// another thread takes it. Tasks enough are left that all threads end together.
inline int64_t tiles_of_task(int64_t tiles, int64_t octets, int threads) {
    constexpr int64_t kOctets = 8192, kTasksOfThread = 8;
    const int64_t wanted = std::min(kOctets / std::max<int64_t>(octets, 1),  // there may be no rows
                                    tiles / (kTasksOfThread * threads));
    return std::max(kTilesAtATime, wanted / kTilesAtATime * kTilesAtATime);
}

template <class Product>
void multiply_tiles(const Product& product, int64_t first, int64_t end, float* buffer) {
    for (int64_t tile = first; tile < end; tile += kTilesAtATime)
        product.tiles(tile, std::min(kTilesAtATime, end - tile), buffer);
}

}  // namespace nybble
