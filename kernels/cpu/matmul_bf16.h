// The packed matmul's inner loops in AVX-512 BF16: a tile's codes become pairs of bf16 and are
// multiplied in registers.

#pragma once

#include <algorithm>
#include <vector>

#include "packed_args.h"

namespace nybble {

inline float sum_of(const bf16* x, int64_t count) {
    Floats total = zero();
    int64_t k = 0;
    for (; k + 16 <= count; k += 16) total = total + load_bf16(x + k);
    float rest = sum(total);
    for (; k < count; ++k) rest += to_float(x[k]);
    return rest;
}

// Codes of 4 bits, which stand for any levels.
struct LevelCodes {
    static constexpr int kDigits = 1;

    __m512i levels;  // in bf16, twice

    explicit LevelCodes(const float* values) {
        alignas(64) bf16 table[32];
        for (int i = 0; i < 32; ++i) table[i] = to_bf16(values[i & 15]);
        levels = _mm512_load_si512(table);
    }

    struct Octet {
        __m512i codes;
    };
    Octet load(const uint8_t* octet, int64_t) const { return {_mm512_loadu_si512(octet)}; }

    // Columns 2S and 2S + 1 of an octet.
    template <int S>
    __m512bh pair(const Octet& octet) const {
        const __m512i shifted = S ? _mm512_srli_epi32(octet.codes, 4 * S) : octet.codes;
        return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(shifted, levels));
    }
};

// Codes of two digits: whole numbers, which bf16 holds exactly once kByteCenter is subtracted.
struct ByteCodes {
    static constexpr int kDigits = 2;

    explicit ByteCodes(const float*) {}

    struct Octet {
        __m512i even, odd;  // bytes of each lane: columns 0, 4, 1, 5, and 2, 6, 3, 7
    };
    Octet load(const uint8_t* octet, int64_t digit) const {
        const __m512i high = _mm512_loadu_si512(octet), low = _mm512_loadu_si512(octet + digit);
        const __m512i lower = _mm512_set1_epi8(0x0F);
        constexpr int kSelect = 0xCA;  // the second where the first has ones, else the third
        return {_mm512_ternarylogic_epi32(lower, low, _mm512_slli_epi32(high, 4), kSelect),
                _mm512_ternarylogic_epi32(lower, _mm512_srli_epi32(low, 4), high, kSelect)};
    }

    template <int S>
    __m512bh pair(const Octet& octet) const {
        const __m512i bytes = S % 2 ? octet.odd : octet.even;
        constexpr int kByte = S / 2;
        const __m512i first = centered<kByte>(bytes);
        const __m512i second = centered<kByte>(_mm512_srli_epi32(bytes, 16));
        // The lower halves of these floats are zero.
        return reinterpret_cast<__m512bh>(_mm512_or_si512(_mm512_srli_epi32(first, 16), second));
    }

   private:
    // Byte 0 or 1 of each lane as a float, less kByteCenter. It is made the last bits before the
    // point of a float whose other bits are those of a power of two, which is subtracted too.
    template <int Byte>
    static __m512i centered(__m512i lanes) {
        constexpr float kPower = Byte ? 1 << 15 : 1 << 23;
        constexpr int kOrAnd = 0xF8;  // the first, or both the second and the third
        const __m512i power = _mm512_castps_si512(_mm512_set1_ps(kPower));
        const __m512i mask = _mm512_set1_epi32(0xFF << 8 * Byte);
        const __m512i sum = _mm512_ternarylogic_epi32(power, lanes, mask, kOrAnd);
        return _mm512_castps_si512(
            _mm512_sub_ps(_mm512_castsi512_ps(sum), _mm512_set1_ps(kPower + kByteCenter)));
    }
};

// Rows [row, row + R) of tiles [tile, tile + T). The order of the additions for one output does not
// depend on R or T, so a row's result does not depend on the batch it is computed in.
template <int R, int T, class Codes>
void packed_block(const PackedArgs& a, const float* group_sums, const Codes& decoder, int64_t row,
                  int64_t tile) {
    Floats total[R][T];
    for (auto& r : total)
        for (auto& t : r) t = zero();
    const uint8_t* codes[T];
    for (int t = 0; t < T; ++t) codes[t] = a.codes_of(tile + t);
    const bf16* x = a.x + row * a.columns;
    const int64_t digit = a.octets * 64;

    for (int64_t group = 0; group < a.groups; ++group) {
        __m512 sum[R][T];
        for (auto& r : sum)
            for (auto& t : r) t = _mm512_setzero_ps();
        const int64_t first = group * a.octets_per_group;
        const int64_t last = std::min(a.octets, first + a.octets_per_group);
        for (int64_t octet = first; octet < last; ++octet) {
            typename Codes::Octet packed[T];
            const Prefetch<T, Codes::kDigits> fetch(octet, a.octets);
            for (int t = 0; t < T; ++t) {
                const uint8_t* at_octet = codes[t] + octet * 64;
                packed[t] = decoder.load(at_octet, digit);
                fetch(at_octet);
            }
#define NYBBLE_PAIR(s)                                                                          \
    {                                                                                           \
        __m512bh w[T];                                                                          \
        for (int t = 0; t < T; ++t) w[t] = decoder.template pair<s>(packed[t]);                 \
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
        // total + scale · (sum − zero · Σx). Unrolled, or else GCC takes the sums to memory for it.
        Scaling scaling[T];
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) scaling[t] = a.scaling(tile + t, group);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            if (a.zeros) {
                const Floats of_x = broadcast(group_sums[(row + r) * a.groups + group]);
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t) sum[r][t] = fnma(scaling[t].zero, of_x, {sum[r][t]}).v;
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) total[r][t] = fma(scaling[t].scale, {sum[r][t]}, total[r][t]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) store_tile(a, row + r, tile + t, total[r][t]);
}

template <class Codes>
class Product {
   public:
    Product(const PackedArgs& args, int) : a(args), decoder_(args.levels) {
        if (a.zeros) sum_groups();
    }

    // All is done in registers.
    int64_t buffer_size() const { return 0; }

    void tiles(int64_t tile, int64_t count, float*) const {
        int64_t row = 0;
        for (; row + 8 <= a.rows; row += 8) rows<8>(row, tile, count);
        switch (a.rows - row) {
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
    const Codes decoder_;
    std::vector<float> group_sums_;  // (rows, groups) sums of x, if there are zeros

    void sum_groups() {
        group_sums_.resize(a.rows * a.groups);
        const int64_t width = a.octets_per_group * 8;
        for (int64_t r = 0; r < a.rows; ++r)
            for (int64_t g = 0; g < a.groups; ++g) {
                const int64_t first = g * width, end = std::min(a.columns, first + width);
                group_sums_[r * a.groups + g] = sum_of(a.x + r * a.columns + first, end - first);
            }
    }

    template <int R>
    void rows(int64_t row, int64_t tile, int64_t count) const {
        constexpr int T = R <= 2 ? 4 : 2;
        int64_t t = 0;
        for (; t + T <= count; t += T)
            packed_block<R, T>(a, group_sums_.data(), decoder_, row, tile + t);
        for (; t < count; ++t) packed_block<R, 1>(a, group_sums_.data(), decoder_, row, tile + t);
    }
};

}  // namespace nybble
