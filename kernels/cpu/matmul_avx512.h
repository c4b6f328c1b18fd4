// The packed matmul's inner loops in AVX-512 BF16: a tile's codes become bf16 pairs by one permute
// each and are multiplied in registers.

#pragma once

#include "packed_args.h"

namespace nybble {

constexpr bool kWantsWideX = false;

// Rows [row, row + R) of tiles [tile, tile + T). The order of the additions for one output does not
// depend on R or T, so a row's result does not depend on the batch it is computed in.
template <int R, int T>
void packed_block(const PackedArgs& a, __m512i levels, int64_t row, int64_t tile) {
    Floats total[R][T];
    for (auto& r : total)
        for (auto& t : r) t = zero();
    const uint8_t* codes[T];
    for (int t = 0; t < T; ++t) codes[t] = a.codes + (tile + t) * a.octets * 64;
    const bf16* x = a.x + row * a.columns;

    for (int64_t group = 0; group < a.groups; ++group) {
        __m512 sum[R][T];
        for (auto& r : sum)
            for (auto& t : r) t = _mm512_setzero_ps();
        const int64_t first = group * a.octets_per_group;
        const int64_t last = std::min(a.octets, first + a.octets_per_group);
        for (int64_t octet = first; octet < last; ++octet) {
            __m512i packed[T];
            for (int t = 0; t < T; ++t) {
                packed[t] = _mm512_loadu_si512(codes[t] + octet * 64);
                // Far enough ahead to cover memory latency at one cache line per octet.
                if (R <= 4)
                    _mm_prefetch(reinterpret_cast<const char*>(codes[t] + octet * 64 + 1536),
                                 _MM_HINT_T0);
            }
#define NYBBLE_PAIR(s)                                                                          \
    {                                                                                           \
        __m512bh w[T];                                                                          \
        for (int t = 0; t < T; ++t)                                                             \
            w[t] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(                         \
                s ? _mm512_srli_epi32(packed[t], 4 * (s)) : packed[t], levels));                \
        for (int r = 0; r < R; ++r) {                                                           \
            int32_t pair;                                                                       \
            std::memcpy(&pair, x + r * a.columns + octet * 8 + 2 * (s), sizeof pair);           \
            __m512bh v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));                   \
            for (int t = 0; t < T; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w[t], v);       \
        }                                                                                       \
    }
            NYBBLE_PAIR(0)
            NYBBLE_PAIR(1)
            NYBBLE_PAIR(2)
            NYBBLE_PAIR(3)
#undef NYBBLE_PAIR
        }
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r)
                total[r][t] = add_group(a, row + r, tile + t, group, {sum[r][t]}, total[r][t]);
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) store_tile(a, row + r, tile + t, total[r][t]);
}

template <int R>
void packed_rows(const PackedArgs& a, __m512i levels, int64_t row, int64_t tile, int64_t tiles) {
    constexpr int T = R <= 2 ? 4 : 2;
    int64_t t = 0;
    for (; t + T <= tiles; t += T) packed_block<R, T>(a, levels, row, tile + t);
    for (; t < tiles; ++t) packed_block<R, 1>(a, levels, row, tile + t);
}

// All is done in registers.
inline int64_t buffer_size(const PackedArgs&) { return 0; }

inline void packed_tiles(const PackedArgs& a, int64_t tile, int64_t tiles, float*) {
    alignas(64) bf16 table[32];  // the sixteen levels, twice
    for (int i = 0; i < 32; ++i) table[i] = to_bf16(a.levels[i & 15]);
    const __m512i levels = _mm512_load_si512(table);
    int64_t row = 0;
    for (; row + 10 <= a.rows; row += 10) packed_rows<10>(a, levels, row, tile, tiles);
    switch (a.rows - row) {
        case 9: packed_rows<9>(a, levels, row, tile, tiles); break;
        case 8: packed_rows<8>(a, levels, row, tile, tiles); break;
        case 7: packed_rows<7>(a, levels, row, tile, tiles); break;
        case 6: packed_rows<6>(a, levels, row, tile, tiles); break;
        case 5: packed_rows<5>(a, levels, row, tile, tiles); break;
        case 4: packed_rows<4>(a, levels, row, tile, tiles); break;
        case 3: packed_rows<3>(a, levels, row, tile, tiles); break;
        case 2: packed_rows<2>(a, levels, row, tile, tiles); break;
        case 1: packed_rows<1>(a, levels, row, tile, tiles); break;
        default: break;
    }
}

}  // namespace nybble
