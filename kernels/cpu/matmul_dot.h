// The packed matmul's inner loops by ARM's products of bytes; see spans.h. An activation of 16 bits is
// two bytes, and so is a level that is no small integer. Of one row they are dot products of four
// columns (dotprod), of two rows products of matrices with eight (i8mm).

#pragma once

#include <algorithm>
#include <vector>

#include "spans.h"
#include "threads.h"

namespace nybble {

// Bytes of x for an octet: the low ones of columns 0, 4, 1, 5, 2, 6, 3 and 7, then the high ones.
// That is the order of the codes in a lane's low nibbles, then in its high ones.
inline uint8x16_t to_planes(int16x8_t x) {
    const uint8x16_t order = {0, 8, 2, 10, 4, 12, 6, 14, 1, 9, 3, 11, 5, 13, 7, 15};
    return vqtbl1q_u8(vreinterpretq_u8_s16(x), order);
}

inline int32x4_t shifted(int32x4_t sum, int bits) { return vshlq_s32(sum, vdupq_n_s32(bits)); }

inline int8x16_t as_signed(uint8x16_t bytes) { return vreinterpretq_s8_u8(bytes); }

// Four (H is 0 for low nibbles, 1 for high ones) of the columns of one row.
template <int H>
struct FourColumns {
    uint8x16_t x;

    int32x4_t low(int32x4_t sum, uint8x16_t w) const {
        return vreinterpretq_s32_u32(vdotq_laneq_u32(vreinterpretq_u32_s32(sum), w, x, H));
    }
    int32x4_t low(int32x4_t sum, int8x16_t w) const {
        return vdotq_laneq_s32(sum, w, as_signed(x), H);
    }
    int32x4_t high(int32x4_t sum, int8x16_t w) const {
        return vdotq_laneq_s32(sum, w, as_signed(x), H + 2);
    }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)
// All columns of an octet of two rows.
struct TwoRows {
    uint8x16_t lows, highs;

    TwoRows(uint8x16_t first, uint8x16_t second)
        : lows(zip<1>(first, second)), highs(zip<2>(first, second)) {}

    int32x4_t low(int32x4_t sum, uint8x16_t w) const {
        return vreinterpretq_s32_u32(vmmlaq_u32(vreinterpretq_u32_s32(sum), w, lows));
    }
    int32x4_t low(int32x4_t sum, int8x16_t w) const {
        return vmmlaq_s32(sum, w, as_signed(lows));
    }
    int32x4_t high(int32x4_t sum, int8x16_t w) const {
        return vmmlaq_s32(sum, w, as_signed(highs));
    }

   private:
    template <int Half>
    static uint8x16_t zip(uint8x16_t a, uint8x16_t b) {
        const uint64x2_t x = vreinterpretq_u64_u8(a), y = vreinterpretq_u64_u8(b);
        return vreinterpretq_u8_u64(Half == 1 ? vzip1q_u64(x, y) : vzip2q_u64(x, y));
    }
};
#endif

// Nibbles: the low ones if H is 0, the high ones if it is 1.
template <int H>
uint8x16_t nibbles(uint8x16_t bytes) {
    return H ? vshrq_n_u8(bytes, 4) : vandq_u8(bytes, vdupq_n_u8(0x0F));
}

// What the codes of four outputs are multiplied as: `unpack` gives the columns of half H. There are
// kSums sums for each output, which `total` puts together; `add` adds to them.

struct IntegerCodes : IntegerLevels {
    using IntegerLevels::IntegerLevels;
    static constexpr int kSums = 2, kRows = 3;
    static constexpr bool kSignedLow = false;

    using Weights = uint8x16_t;
    template <int H>
    Weights unpack(const uint8_t* codes, int64_t) const {
        return nibbles<H>(vld1q_u8(codes));
    }
    template <class X>
    static void add(int32x4_t (&sums)[kSums], Weights w, const X& x) {
        sums[0] = x.low(sums[0], w);
        sums[1] = x.high(sums[1], as_signed(w));
    }
    static int32x4_t total(const int32x4_t (&sums)[kSums], int32_t) {
        return vaddq_s32(sums[0], shifted(sums[1], 8));
    }
};

struct ByteCodes : ByteLevels {
    using ByteLevels::ByteLevels;
    static constexpr int kSums = 2, kRows = 3;
    static constexpr bool kSignedLow = false;

    using Weights = uint8x16_t;
    template <int H>
    Weights unpack(const uint8_t* codes, int64_t digit) const {
        const uint8x16_t high = nibbles<H>(vld1q_u8(codes));
        return vsliq_n_u8(nibbles<H>(vld1q_u8(codes + digit)), high, 4);
    }
    // High bytes of x have a sign: the code has one too, less 128.
    template <class X>
    static void add(int32x4_t (&sums)[kSums], Weights w, const X& x) {
        sums[0] = x.low(sums[0], w);
        sums[1] = x.high(sums[1], as_signed(veorq_u8(w, vdupq_n_u8(0x80))));
    }
    static int32x4_t total(const int32x4_t (&sums)[kSums], int32_t of_highs) {
        const int32x4_t high = vaddq_s32(sums[1], vdupq_n_s32(128 * of_highs));
        return vaddq_s32(sums[0], shifted(high, 8));
    }
};

struct LevelCodes : RoundedLevels {
    static constexpr int kSums = 3, kRows = 2;
    static constexpr bool kSignedLow = true;

    uint8x16_t lows, highs;  // the levels' bytes, both with a sign

    explicit LevelCodes(const float* levels) : RoundedLevels(levels) {
        uint8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) {
            const int level = rounded(levels[i]);
            bytes[0][i] = static_cast<uint8_t>(level);
            bytes[1][i] = static_cast<uint8_t>((level + 128) >> 8);
        }
        lows = vld1q_u8(bytes[0]);
        highs = vld1q_u8(bytes[1]);
    }

    struct Weights {
        uint8x16_t low, high;
    };
    template <int H>
    Weights unpack(const uint8_t* codes, int64_t) const {
        const uint8x16_t each = nibbles<H>(vld1q_u8(codes));
        return {vqtbl1q_u8(lows, each), vqtbl1q_u8(highs, each)};
    }
    template <class X>
    static void add(int32x4_t (&sums)[kSums], const Weights& w, const X& x) {
        sums[0] = x.low(sums[0], as_signed(w.low));
        sums[1] = x.low(sums[1], as_signed(w.high));
        sums[1] = x.high(sums[1], as_signed(w.low));
        sums[2] = x.high(sums[2], as_signed(w.high));
    }
    static int32x4_t total(const int32x4_t (&sums)[kSums], int32_t) {
        const int32x4_t upper = vaddq_s32(sums[1], shifted(sums[2], 8));
        return vaddq_s32(sums[0], shifted(upper, 8));
    }
};

template <class Codes>
class Product {
   public:
    Product(const PackedArgs& args, int threads)
        : a(args), codes_(args.levels), spans_(args, codes_, threads),
          of_highs_(args.rows * spans_.size()) {
        parallel_for_small(spans_.size(), a.rows > 8 ? threads : 1, [&](int64_t index, int) {
            for (int64_t row = 0; row < a.rows; ++row)
                of_highs_[index * a.rows + row] = split(spans_.x(spans_[index], row),
                                                        spans_[index].octets);
        });
    }

    // All is done in registers.
    int64_t buffer_size() const { return 0; }

    void tiles(int64_t tile, int64_t count, float*) const {
        // Rows that stay in the second-level cache meanwhile.
        constexpr int64_t kRowsAtATime = 64;
        for (int64_t first = 0; first < a.rows; first += kRowsAtATime)
            for (int64_t t = tile; t < tile + count; ++t)
                rows(first, std::min(a.rows, first + kRowsAtATime), t);
    }

   private:
    const PackedArgs a;
    const Codes codes_;
    Spans spans_;
    std::vector<int32_t> of_highs_;  // (spans, rows) sums of the high bytes of x

    // Of a row's columns of a span their bytes, in place; the sum of the high ones.
    static int32_t split(int16_t* x, int64_t octets) {
        const uint8x16_t sign = vcombine_u8(vdup_n_u8(0x80), vdup_n_u8(0));
        int32x4_t sum = vdupq_n_s32(0);
        for (int64_t i = 0; i < octets; ++i) {
            int16x8_t eight = vld1q_s16(x + 8 * i);
            // If the low byte has a sign, the high one is rounded to the nearest.
            if (Codes::kSignedLow) eight = vaddq_s16(eight, vdupq_n_s16(128));
            sum = vaddq_s32(sum, vpaddlq_s16(vshrq_n_s16(eight, 8)));
            uint8x16_t planes = to_planes(eight);
            if (Codes::kSignedLow) planes = veorq_u8(planes, sign);
            vst1q_s16(x + 8 * i, vreinterpretq_s16_u8(planes));
        }
        return vaddvq_s32(sum);
    }

    const uint8_t* planes(const Span& span, int64_t row) const {
        return reinterpret_cast<const uint8_t*>(spans_.x(span, row));
    }

    void rows(int64_t row, int64_t end, int64_t tile) const {
#if defined(__ARM_FEATURE_MATMUL_INT8)
        for (; row + 2 <= end; row += 2) two_rows(row, tile);
#endif
        constexpr int R = Codes::kRows;
        for (; row + R <= end; row += R) some_rows<R>(row, tile);
        if (R > 2 && row + 2 <= end) {
            some_rows<2>(row, tile);
            row += 2;
        }
        if (row < end) some_rows<1>(row, tile);
    }

    void prefetch_ahead(const uint8_t* codes, int64_t octet) const {
        Prefetch<1, Codes::kDigits>(octet, a.octets)(codes + octet * 64);
    }

    template <int H, int R>
    void add_half(const uint8_t* codes, const uint8x16_t (&x)[R],
                  int32x4_t (&sums)[R][4][Codes::kSums]) const {
        for (int i = 0; i < 4; ++i) {
            const auto w = codes_.template unpack<H>(codes + 16 * i, a.octets * 64);
            for (int r = 0; r < R; ++r) Codes::add(sums[r][i], w, FourColumns<H>{x[r]});
        }
    }

    template <int R>
    void some_rows(int64_t row, int64_t tile) const {
        Floats total[R];
        for (auto& each : total) each = zero();
        const uint8_t* codes = a.codes_of(tile);
        for (int64_t index = 0; index < spans_.size(); ++index) {
            const Span& span = spans_[index];
            const uint8_t* bytes = planes(span, row);
            int32x4_t sums[R][4][Codes::kSums];
            for (auto& r : sums)
                for (auto& i : r)
                    for (auto& each : i) each = vdupq_n_s32(0);
            for (int64_t octet = 0; octet < span.octets; ++octet) {
                uint8x16_t x[R];
                for (int r = 0; r < R; ++r) x[r] = vld1q_u8(bytes + (r * span.octets + octet) * 16);
                const uint8_t* at = codes + (span.first + octet) * 64;
                prefetch_ahead(codes, span.first + octet);
                add_half<0>(at, x, sums);
                add_half<1>(at, x, sums);
            }
            const Scaling scaling = a.scaling(tile, span.group);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const int32_t of_highs = of_highs_[index * a.rows + row + r];
                const Ints sum =
                    four_ints([&](int i) { return Codes::total(sums[r][i], of_highs); });
                total[r] = spans_.add(index, row + r, scaling, sum, total[r]);
            }
        }
        for (int r = 0; r < R; ++r) store_tile(a, row + r, tile, total[r]);
    }

#if defined(__ARM_FEATURE_MATMUL_INT8)
    // Eight columns of two outputs: the first two of four if Half is 1, the last two if it is 2.
    template <int Half>
    static uint8x16_t zip(uint8x16_t low, uint8x16_t high) {
        const uint32x4_t x = vreinterpretq_u32_u8(low), y = vreinterpretq_u32_u8(high);
        return vreinterpretq_u8_u32(Half == 1 ? vzip1q_u32(x, y) : vzip2q_u32(x, y));
    }
    template <int Half>
    static LevelCodes::Weights zip(const LevelCodes::Weights& low,
                                   const LevelCodes::Weights& high) {
        return {zip<Half>(low.low, high.low), zip<Half>(low.high, high.high)};
    }

    void two_rows(int64_t row, int64_t tile) const {
        Floats total[2] = {zero(), zero()};
        const uint8_t* codes = a.codes_of(tile);
        for (int64_t index = 0; index < spans_.size(); ++index) {
            const Span& span = spans_[index];
            const uint8_t *first = planes(span, row), *second = planes(span, row + 1);
            int32x4_t sums[8][Codes::kSums];  // of two outputs and both rows
            for (auto& pair : sums)
                for (auto& each : pair) each = vdupq_n_s32(0);
            for (int64_t octet = 0; octet < span.octets; ++octet) {
                const TwoRows x(vld1q_u8(first + octet * 16), vld1q_u8(second + octet * 16));
                const uint8_t* at = codes + (span.first + octet) * 64;
                prefetch_ahead(codes, span.first + octet);
                for (int i = 0; i < 4; ++i) {
                    const auto low = codes_.template unpack<0>(at + 16 * i, a.octets * 64);
                    const auto high = codes_.template unpack<1>(at + 16 * i, a.octets * 64);
                    Codes::add(sums[2 * i], zip<1>(low, high), x);
                    Codes::add(sums[2 * i + 1], zip<2>(low, high), x);
                }
            }
            const int32_t* of_highs = &of_highs_[index * a.rows + row];
            int32x4_t both[2][4];
            for (int i = 0; i < 4; ++i) {
                int32x4_t rows[2][Codes::kSums];
                for (int s = 0; s < Codes::kSums; ++s) {
                    rows[0][s] = vuzp1q_s32(sums[2 * i][s], sums[2 * i + 1][s]);
                    rows[1][s] = vuzp2q_s32(sums[2 * i][s], sums[2 * i + 1][s]);
                }
                for (int r = 0; r < 2; ++r) both[r][i] = Codes::total(rows[r], of_highs[r]);
            }
            const Scaling scaling = a.scaling(tile, span.group);
            for (int r = 0; r < 2; ++r) {
                const Ints sum = four_ints([&](int i) { return both[r][i]; });
                total[r] = spans_.add(index, row + r, scaling, sum, total[r]);
            }
        }
        for (int r = 0; r < 2; ++r) store_tile(a, row + r, tile, total[r]);
    }
#endif
};

}  // namespace nybble
