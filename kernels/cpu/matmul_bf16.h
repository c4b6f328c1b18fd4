// The packed matmul's inner loops in AVX-512 BF16: a tile's codes become bf16 pairs by one permute
// each and are multiplied in registers.

#pragma once

#include <algorithm>
#include <vector>

#include "packed_args.h"

namespace nybble {

// total + scale · (sum − zero · Σx): one group's part of one tile of one row.
inline Floats add_group(const PackedArgs& a, const float* group_sums, int64_t row, int64_t tile,
                        int64_t group, Floats sum, Floats total) {
    const int64_t at = (tile * a.groups + group) * 16;
    if (a.zeros)
        sum = fnma(load_scales(a.zeros, at, a.scale_type),
                   broadcast(group_sums[row * a.groups + group]), sum);
    return fma(load_scales(a.scales, at, a.scale_type), sum, total);
}

// Rows [row, row + R) of tiles [tile, tile + T). The order of the additions for one output does not
// depend on R or T, so a row's result does not depend on the batch it is computed in.
template <int R, int T>
void packed_block(const PackedArgs& a, const float* group_sums, __m512i levels, int64_t row,
                  int64_t tile) {
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
                total[r][t] = add_group(a, group_sums, row + r, tile + t, group, {sum[r][t]}, total[r][t]);
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) store_tile(a, row + r, tile + t, total[r][t]);
}

class Product {
   public:
    Product(const PackedArgs& args, int) : a(args) {
        if (a.zeros) sum_groups();
        alignas(64) bf16 table[32];  // the sixteen levels, twice
        for (int i = 0; i < 32; ++i) table[i] = to_bf16(a.levels[i & 15]);
        levels_ = _mm512_load_si512(table);
    }

    // All is done in registers.
    int64_t buffer_size() const { return 0; }

    void tiles(int64_t tile, int64_t count, float*) const {
        int64_t row = 0;
        for (; row + 10 <= a.rows; row += 10) rows<10>(row, tile, count);
        switch (a.rows - row) {
            case 9: return rows<9>(row, tile, count);
            case 8: return rows<8>(row, tile, count);
            case 7: return rows<7>(row, tile, count);
            case 6: return rows<6>(row, tile, count);
            case 5: return rows<5>(row, tile, count);
            case 4: return rows<4>(row, tile, count);
            case 3: return rows<3>(row, tile, count);
            case 2: return rows<2>(row, tile, count);
            case 1: return rows<1>(row, tile, count);
            default: return;
        }
    }

   private:
    const PackedArgs a;
    __m512i levels_;
    std::vector<float> group_sums_;  // (rows, groups) sums of x, if there are zeros

    void sum_groups() {
        group_sums_.resize(a.rows * a.groups);
        const int64_t width = a.octets_per_group * 8;
        for (int64_t r = 0; r < a.rows; ++r)
            for (int64_t g = 0; g < a.groups; ++g) {
                const int64_t end = std::min(a.columns, (g + 1) * width);
                Floats total = zero();
                int64_t k = g * width;
                for (; k + 16 <= end; k += 16) total = total + load_bf16(a.x + r * a.columns + k);
                float rest = sum(total);
                for (; k < end; ++k) rest += to_float(a.x[r * a.columns + k]);
                group_sums_[r * a.groups + g] = rest;
            }
    }

    template <int R>
    void rows(int64_t row, int64_t tile, int64_t count) const {
        constexpr int T = R <= 2 ? 4 : 2;
        int64_t t = 0;
        for (; t + T <= count; t += T) packed_block<R, T>(a, group_sums_.data(), levels_, row, tile + t);
        for (; t < count; ++t) packed_block<R, 1>(a, group_sums_.data(), levels_, row, tile + t);
    }
};

}  // namespace nybble
