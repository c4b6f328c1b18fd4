// The packed matmul's inner loops in AVX2: codes become floats by two eight-entry permutes and a
// blend. For a few rows they are multiplied in registers; for more, a group of a tile is decoded
// once into a buffer that stays in the first-level cache.

#pragma once

#include <algorithm>

#include "levels.h"
#include "packed_args.h"

namespace nybble {

constexpr bool kWantsWideX = true;

// One column of a tile's octet as sixteen floats.
template <int Column>
Floats decode(const Levels& levels, const uint8_t* octet) {
    const auto* lanes = reinterpret_cast<const __m256i*>(octet);
    return {levels.of(_mm256_srli_epi32(_mm256_loadu_si256(lanes), shift_of(Column))),
            levels.of(_mm256_srli_epi32(_mm256_loadu_si256(lanes + 1), shift_of(Column)))};
}

// Rows [row, row + R) of one tile, decoded as they are multiplied. The order of the additions for
// one output is that of the columns within a group, then that of the groups, here and below.
template <int R>
void packed_block(const PackedArgs& a, const Levels& levels, int64_t row, int64_t tile) {
    Floats total[R];
    for (auto& r : total) r = zero();
    const uint8_t* codes = a.codes + tile * a.octets * 64;
    const float* x = a.wide_x + row * a.columns;
    for (int64_t group = 0; group < a.groups; ++group) {
        Floats sum[R];
        for (auto& r : sum) r = zero();
        const int64_t first = group * a.octets_per_group;
        const int64_t last = std::min(a.octets, first + a.octets_per_group);
        for (int64_t octet = first; octet < last; ++octet) {
            _mm_prefetch(reinterpret_cast<const char*>(codes + octet * 64 + 1536), _MM_HINT_T0);
            const float* values = x + octet * 8;
#define NYBBLE_COLUMN(c)                                                                \
    {                                                                                   \
        const Floats w = decode<c>(levels, codes + octet * 64);                         \
        for (int r = 0; r < R; ++r)                                                     \
            sum[r] = fma(w, broadcast(values[r * a.columns + (c)]), sum[r]);            \
    }
            NYBBLE_COLUMN(0)
            NYBBLE_COLUMN(1)
            NYBBLE_COLUMN(2)
            NYBBLE_COLUMN(3)
            NYBBLE_COLUMN(4)
            NYBBLE_COLUMN(5)
            NYBBLE_COLUMN(6)
            NYBBLE_COLUMN(7)
#undef NYBBLE_COLUMN
        }
        for (int r = 0; r < R; ++r) total[r] = add_group(a, row + r, tile, group, sum[r], total[r]);
    }
    for (int r = 0; r < R; ++r) store_tile(a, row + r, tile, total[r]);
}

// `columns` columns of R rows against decoded weights (columns, 16), added to totals (rows, 16).
template <int R>
void buffered_block(const PackedArgs& a, const float* weights, int64_t row, int64_t tile,
                    int64_t group, int64_t columns, float* totals) {
    Floats sum[R];
    for (auto& r : sum) r = zero();
    const float* x = a.wide_x + row * a.columns + group * a.octets_per_group * 8;
    for (int64_t k = 0; k < columns; ++k) {
        const Floats w = load(weights + k * 16);
        for (int r = 0; r < R; ++r) sum[r] = fma(w, broadcast(x[r * a.columns + k]), sum[r]);
    }
    for (int r = 0; r < R; ++r) {
        float* total = totals + (row + r) * 16;
        store(total, add_group(a, row + r, tile, group, sum[r], load(total)));
    }
}

// Floats that `packed_tiles` needs a buffer of: a tile's group, decoded, and its totals.
inline int64_t buffer_size(const PackedArgs& a) {
    return a.rows <= 4 ? 0 : a.octets_per_group * 8 * 16 + a.rows * 16;
}

inline void buffered_tile(const PackedArgs& a, const Levels& levels, int64_t tile, float* weights) {
    float* totals = weights + a.octets_per_group * 8 * 16;
    std::fill(totals, totals + a.rows * 16, 0.0f);
    for (int64_t group = 0; group < a.groups; ++group) {
        const int64_t first = group * a.octets_per_group;
        const int64_t last = std::min(a.octets, first + a.octets_per_group);
        for (int64_t octet = first; octet < last; ++octet) {
            const uint8_t* codes = a.codes + (tile * a.octets + octet) * 64;
            float* target = weights + (octet - first) * 8 * 16;
            store(target, decode<0>(levels, codes));
            store(target + 16, decode<1>(levels, codes));
            store(target + 32, decode<2>(levels, codes));
            store(target + 48, decode<3>(levels, codes));
            store(target + 64, decode<4>(levels, codes));
            store(target + 80, decode<5>(levels, codes));
            store(target + 96, decode<6>(levels, codes));
            store(target + 112, decode<7>(levels, codes));
        }
        const int64_t columns = (last - first) * 8;
        int64_t row = 0;
        for (; row + 6 <= a.rows; row += 6)
            buffered_block<6>(a, weights, row, tile, group, columns, totals);
        for (; row < a.rows; ++row)
            buffered_block<1>(a, weights, row, tile, group, columns, totals);
    }
    for (int64_t row = 0; row < a.rows; ++row) store_tile(a, row, tile, load(totals + row * 16));
}

inline void packed_tiles(const PackedArgs& a, int64_t tile, int64_t tiles, float* buffer) {
    const Levels levels(a.levels);
    for (int64_t t = tile; t < tile + tiles; ++t) switch (a.rows) {
            case 0: break;
            case 1: packed_block<1>(a, levels, 0, t); break;
            case 2: packed_block<2>(a, levels, 0, t); break;
            case 3: packed_block<3>(a, levels, 0, t); break;
            case 4: packed_block<4>(a, levels, 0, t); break;
            default: buffered_tile(a, levels, t, buffer);
        }
}

}  // namespace nybble
