// The packed matmul's inner loops by products of pairs of 16-bit integers; see spans.h.

#pragma once

#include <algorithm>

#include "ints.h"
#include "spans.h"

namespace nybble {

// Levels of which an octet's lanes give pairs of 16-bit numbers.
struct IntegerCodes : IntegerLevels {
    using IntegerLevels::IntegerLevels;

    Ints mask = broadcast_int(0x000F000F);

    using Octet = Ints;
    Octet load(const uint8_t* octet, int64_t) const { return load_ints(octet); }

    // Columns 2S and 2S + 1 of an octet, less the offset.
    template <int S>
    Ints pair(const Octet& octet) const {
        return shift_right<4 * S>(octet) & mask;
    }
};

struct ByteCodes : ByteLevels {
    using ByteLevels::ByteLevels;

    Ints lower = broadcast_int(0x0F0F0F0F), mask = broadcast_int(0x00FF00FF);

    struct Octet {
        Ints even, odd;  // bytes of each lane: columns 0, 4, 1, 5, and 2, 6, 3, 7
    };
    Octet load(const uint8_t* octet, int64_t digit) const {
        const Ints high = load_ints(octet), low = load_ints(octet + digit);
        return {(low & lower) | shift_left<4>(high & lower),
                (shift_right<4>(low) & lower) | and_not(lower, high)};
    }

    template <int S>
    Ints pair(const Octet& octet) const {
        const Ints& bytes = S % 2 ? octet.odd : octet.even;
        return (S < 2 ? bytes : shift_right<8>(bytes)) & mask;
    }
};

struct LevelCodes : RoundedLevels {
    using Octet = Ints;
    Octet load(const uint8_t* octet, int64_t) const { return load_ints(octet); }

#if defined(__aarch64__)
    uint8x16_t low, high;  // the bytes of the levels

    explicit LevelCodes(const float* levels) : RoundedLevels(levels) {
        uint8_t bytes[2][16];
        for (int i = 0; i < 16; ++i) {
            const auto level = static_cast<uint16_t>(rounded(levels[i]));
            bytes[0][i] = static_cast<uint8_t>(level);
            bytes[1][i] = static_cast<uint8_t>(level >> 8);
        }
        low = vld1q_u8(bytes[0]);
        high = vld1q_u8(bytes[1]);
    }
    template <int S>
    Ints pair(const Octet& octet) const {
        return four_ints([&](int i) {
            // Bytes 0 and 2 of a lane are pair S % 2, bytes 1 and 3 the pair two further on.
            const uint8x16_t lanes = vreinterpretq_u8_s32(octet.v[i]);
            const uint8x16_t codes =
                S % 2 ? vshrq_n_u8(lanes, 4) : vandq_u8(lanes, vdupq_n_u8(0x0F));
            const uint8x16_t lows = vqtbl1q_u8(low, codes), highs = vqtbl1q_u8(high, codes);
            return vreinterpretq_s32_u8(S < 2 ? vtrn1q_u8(lows, highs) : vtrn2q_u8(lows, highs));
        });
    }
#elif defined(__AVX512BW__)
    Ints table;  // the levels, twice

    explicit LevelCodes(const float* levels) : RoundedLevels(levels) {
        int16_t all[32];
        for (int i = 0; i < 32; ++i) all[i] = rounded(levels[i & 15]);
        table = load_ints(all);
    }
    template <int S>
    Ints pair(const Octet& octet) const {
        // The permute reads the lowest five bits.
        return {_mm512_permutexvar_epi16(shift_right<4 * S>(octet).v, table.v)};
    }
#else
    __m256i low, high;  // the bytes of the levels, twice

    explicit LevelCodes(const float* levels) : RoundedLevels(levels) {
        uint8_t bytes[2][32];
        for (int i = 0; i < 32; ++i) {
            const auto level = static_cast<uint16_t>(rounded(levels[i & 15]));
            bytes[0][i] = static_cast<uint8_t>(level);
            bytes[1][i] = static_cast<uint8_t>(level >> 8);
        }
        low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes[0]));
        high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes[1]));
    }
    template <int S>
    __m256i pair(__m256i lanes) const {
        // Bytes 0 and 2 of a lane now have pair S % 2, bytes 1 and 3 the pair two further on.
        const __m256i codes = _mm256_and_si256(_mm256_srli_epi32(lanes, 4 * (S % 2)),
                                               _mm256_set1_epi8(0x0F));
        const __m256i lows = _mm256_shuffle_epi8(low, codes);
        const __m256i highs = _mm256_shuffle_epi8(high, codes);
        if (S < 2)
            return _mm256_or_si256(_mm256_and_si256(lows, _mm256_set1_epi16(0x00FF)),
                                   _mm256_slli_epi16(highs, 8));
        return _mm256_or_si256(_mm256_srli_epi16(lows, 8),
                               _mm256_andnot_si256(_mm256_set1_epi16(0x00FF), highs));
    }
    template <int S>
    Ints pair(const Octet& octet) const {
        return {pair<S>(octet.low), pair<S>(octet.high)};
    }
#endif

};

template <class Codes>
class Product {
    // Rows that weights are unpacked for once, or twice: with more it is better to keep them unpacked.
#if defined(__AVX512BW__)
    static constexpr int64_t kRowsUnpacking = 8, kFewRows = 8;
#else
    static constexpr int64_t kRowsUnpacking = 6, kFewRows = 12;
#endif

   public:
    Product(const PackedArgs& args, int threads)
        : a(args), codes_(args.levels), spans_(args, codes_, threads) {}

    // Floats that `tiles` needs a buffer of: a span of one tile, unpacked, and the totals of some.
    int64_t buffer_size() const {
        return a.rows <= kFewRows ? 0 : kPairs * 16 + kTiles * kRowsAtATime * 16;
    }

    static constexpr int64_t kTiles = 4;  // the most that `tiles` is asked for

    void tiles(int64_t tile, int64_t count, float* buffer) const {
        if (a.rows <= kFewRows) return few_rows(tile, count);
        for (int64_t row = 0; row < a.rows; row += kRowsAtATime)
            many_rows(row, std::min(kRowsAtATime, a.rows - row), tile, count, buffer);
    }

   private:
    static constexpr int64_t kPairs = Codes::kSpanOctets * 4;
    // Their columns of one span stay in the second-level cache.
    static constexpr int64_t kRowsAtATime = 256;

    const PackedArgs a;
    const Codes codes_;
    const Spans spans_;

    static Ints pair_of(const int16_t* x) {
        int32_t both;
        std::memcpy(&both, x, sizeof both);
        return broadcast_int(both);
    }

    // No more at once than there are registers for.
    void few_rows(int64_t tile, int64_t count) const {
        evenly(a.rows, kRowsUnpacking, [&](int64_t row, int64_t rows) {
            some_rows(row, rows, tile, count);
        });
    }

    // Calls `part(first row, rows)` for parts of at most so many rows that differ by one at most: a
    // small part takes nearly as long as a full one.
    template <class Part>
    static void evenly(int64_t rows, int64_t most, Part part) {
        const int64_t parts = (rows + most - 1) / most;
        for (int64_t i = 0, row = 0; i < parts; ++i) {
            const int64_t size = rows / parts + (i < rows % parts);
            part(row, size);
            row += size;
        }
    }

    void some_rows(int64_t row, int64_t rows, int64_t tile, int64_t count) const {
        switch (rows) {
            case 1: return some_rows<1>(row, tile, count);
            case 2: return some_rows<2>(row, tile, count);
            case 3: return some_rows<3>(row, tile, count);
            case 4: return some_rows<4>(row, tile, count);
            case 5: return some_rows<5>(row, tile, count);
            case 6: return some_rows<6>(row, tile, count);
            case 7: return some_rows<7>(row, tile, count);
            case 8: return some_rows<8>(row, tile, count);
            default: return;
        }
    }

    template <int R>
    void some_rows(int64_t row, int64_t tile, int64_t count) const {
        // Sums that wait for each other are as many as keep the multipliers busy.
#if defined(__AVX512BW__)
        constexpr int T = R <= 2 ? 4 : R <= 4 ? 2 : 1;
#elif defined(NYBBLE_VNNI_256)
        constexpr int T = R <= 2 ? 2 : 1;
#else
        constexpr int T = 1;
#endif
        for (; count >= T; tile += T, count -= T) unpack_and_multiply<R, T>(row, tile);
        for (; count > 0; ++tile, --count) unpack_and_multiply<R, 1>(row, tile);
    }

    // R rows of T tiles, unpacked as they are multiplied.
    template <int R, int T>
    void unpack_and_multiply(int64_t row, int64_t tile) const {
        Floats total[R][T];
        for (auto& r : total)
            for (auto& t : r) t = zero();
        const uint8_t* codes[T];
        for (int t = 0; t < T; ++t) codes[t] = a.codes_of(tile + t);
        const int64_t digit = a.octets * 64;
        for (int64_t index = 0; index < spans_.size(); ++index) {
            const Span& span = spans_[index];
            const int16_t* x = spans_.x(span, row);
            Ints sum[R][T];
            for (auto& r : sum)
                for (auto& t : r) t = broadcast_int(0);
            for (int64_t octet = 0; octet < span.octets; ++octet) {
                typename Codes::Octet packed[T];
                const Prefetch<T, Codes::kDigits> fetch(span.first + octet, a.octets);
                for (int t = 0; t < T; ++t) {
                    const uint8_t* at_octet = codes[t] + (span.first + octet) * 64;
                    packed[t] = codes_.load(at_octet, digit);
                    fetch(at_octet);
                }
                add_pairs<0, R, T>(packed, x + octet * 8, span.octets * 8, sum);
                add_pairs<2, R, T>(packed, x + octet * 8, span.octets * 8, sum);
                add_pairs<1, R, T>(packed, x + octet * 8, span.octets * 8, sum);
                add_pairs<3, R, T>(packed, x + octet * 8, span.octets * 8, sum);
            }
            // Unrolled, or else GCC takes the sums to memory for it.
            Scaling scaling[T];
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) scaling[t] = a.scaling(tile + t, span.group);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int t = 0; t < T; ++t)
                    total[r][t] = spans_.add(index, row + r, scaling[t], sum[r][t], total[r][t]);
        }
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r) store_tile(a, row + r, tile + t, total[r][t]);
    }

    // Columns 2S and 2S + 1 of an octet.
    template <int S, int R, int T>
    void add_pairs(const typename Codes::Octet (&packed)[T], const int16_t* x, int64_t stride,
                   Ints (&sum)[R][T]) const {
        Ints pairs[T];
        for (int t = 0; t < T; ++t) pairs[t] = codes_.template pair<S>(packed[t]);
        for (int r = 0; r < R; ++r) {
            const Ints both = pair_of(x + r * stride + 2 * S);
            for (int t = 0; t < T; ++t) sum[r][t] = add_products(sum[r][t], pairs[t], both);
        }
    }

    // Each span of a tile is unpacked once for all rows.
    void many_rows(int64_t row, int64_t rows, int64_t tile, int64_t count, float* buffer) const {
        float* totals = buffer + kPairs * 16;
        std::fill(totals, totals + count * rows * 16, 0.0f);
        for (int64_t index = 0; index < spans_.size(); ++index) {
            const Span& span = spans_[index];
            for (int64_t t = 0; t < count; ++t) {
                unpack(span, tile + t, buffer);
                const Scaling scaling = a.scaling(tile + t, span.group);
                float* of_tile = totals + t * rows * 16;
                evenly(rows, kBlock, [&](int64_t r, int64_t size) {
                    block<kBlock>(size, index, row + r, scaling, buffer, of_tile + r * 16);
                });
            }
        }
        for (int64_t t = 0; t < count; ++t)
            for (int64_t r = 0; r < rows; ++r)
                store_tile(a, row + r, tile + t, load(totals + (t * rows + r) * 16));
    }

    void unpack(const Span& span, int64_t tile, float* pairs) const {
        const uint8_t* codes = a.codes_of(tile) + span.first * 64;
        for (int64_t octet = 0; octet < span.octets; ++octet) {
            const auto packed = codes_.load(codes + octet * 64, a.octets * 64);
            float* target = pairs + octet * 64;
            store_ints(target, codes_.template pair<0>(packed));
            store_ints(target + 16, codes_.template pair<1>(packed));
            store_ints(target + 32, codes_.template pair<2>(packed));
            store_ints(target + 48, codes_.template pair<3>(packed));
        }
    }

#if defined(__AVX512BW__)
    static constexpr int kBlock = 12;
#else
    static constexpr int kBlock = 6;
#endif

    // At most R rows against an unpacked span (pairs, 16), added to totals (rows, 16).
    template <int R>
    void block(int64_t rows, int64_t index, int64_t row, const Scaling& scaling,
               const float* pairs, float* totals) const {
        if constexpr (R > 1)
            if (rows < R) return block<R - 1>(rows, index, row, scaling, pairs, totals);
        block<R>(index, row, scaling, pairs, totals);
    }

    template <int R>
    void block(int64_t index, int64_t row, const Scaling& scaling, const float* pairs,
               float* totals) const {
        const Span& span = spans_[index];
        Ints sum[R];
        for (auto& r : sum) r = broadcast_int(0);
        const int16_t* x = spans_.x(span, row);
        const int64_t stride = span.octets * 8, count = span.octets * 4;
        for (int64_t k = 0; k < count; ++k) {
            const Ints w = load_ints(pairs + k * 16);
            for (int r = 0; r < R; ++r)
                sum[r] = add_products(sum[r], w, pair_of(x + r * stride + 2 * k));
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            store(totals + r * 16,
                  spans_.add(index, row + r, scaling, sum[r], load(totals + r * 16)));
    }
};

}  // namespace nybble
