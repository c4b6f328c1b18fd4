// The packed matmul's inner loops in integers, for CPUs that do not multiply bf16: activations are
// rounded to 16 bits by spans of columns, multiplied with codes and added up without error; only
// the sums of spans are floats. What a row's result is does not depend on the other rows.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "ints.h"
#include "packed_args.h"

namespace nybble {

// Codes of consecutive whole numbers, the first level `offset` (of at most 15 in size).
struct IntegerCodes {
    // Activations of up to 2^15 times codes of up to 15 in up to 128 columns stay below 2^31.
    static constexpr int kBits = 15;
    static constexpr int64_t kSpanOctets = 16;

    static constexpr int kDigits = 1;

    int32_t offset;
    Ints mask = broadcast_int(0x000F000F);

    explicit IntegerCodes(const float* levels) : offset(static_cast<int32_t>(levels[0])) {}

    using Octet = Ints;
    Octet load(const uint8_t* octet, int64_t) const { return load_ints(octet); }

    float unit() const { return 1; }
    // Columns 2S and 2S + 1 of an octet, less the offset.
    template <int S>
    Ints pair(const Octet& octet) const {
        return shift_right<4 * S>(octet) & mask;
    }

    static bool fits(const float* levels) {
        if (std::fabs(levels[0]) > 15 || levels[0] != std::nearbyint(levels[0])) return false;
        for (int i = 1; i < 16; ++i)
            if (levels[i] != levels[0] + i) return false;
        return true;
    }
};

// Codes of two digits, of which kByteCenter is subtracted.
struct ByteCodes {
    // Activations of up to 2^15 times codes of up to 255 in up to 128 columns stay below 2^31, and
    // so they do less the offset.
    static constexpr int kBits = 15;
    static constexpr int64_t kSpanOctets = 16;
    static constexpr int kDigits = 2;
    static constexpr int32_t offset = -kByteCenter;

    Ints lower = broadcast_int(0x0F0F0F0F), mask = broadcast_int(0x00FF00FF);

    explicit ByteCodes(const float*) {}

    struct Octet {
        Ints even, odd;  // bytes of each lane: columns 0, 4, 1, 5, and 2, 6, 3, 7
    };
    Octet load(const uint8_t* octet, int64_t digit) const {
        const Ints high = load_ints(octet), low = load_ints(octet + digit);
        return {(low & lower) | shift_left<4>(high & lower),
                (shift_right<4>(low) & lower) | and_not(lower, high)};
    }

    float unit() const { return 1; }
    template <int S>
    Ints pair(const Octet& octet) const {
        const Ints& bytes = S % 2 ? octet.odd : octet.even;
        return (S < 2 ? bytes : shift_right<8>(bytes)) & mask;
    }
};

// Any sixteen levels, rounded to multiples of a 2047th of the largest.
struct LevelCodes {
    // 2^14 times 2047 in 64 columns stays below 2^31.
    static constexpr int kBits = 14;
    static constexpr int64_t kSpanOctets = 8;
    static constexpr int kDigits = 1;
    static constexpr int32_t offset = 0;

    using Octet = Ints;
    Octet load(const uint8_t* octet, int64_t) const { return load_ints(octet); }

    float step;

    float unit() const { return step; }

#if defined(__AVX512BW__)
    Ints table;  // the levels, twice

    explicit LevelCodes(const float* levels) : step(step_of(levels)) {
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

    explicit LevelCodes(const float* levels) : step(step_of(levels)) {
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

   private:
    static float step_of(const float* levels) {
        float largest = 0;
        for (int i = 0; i < 16; ++i) largest = std::max(largest, std::fabs(levels[i]));
        return largest > 0 ? largest / 2047 : 1;
    }
    int16_t rounded(float level) const {
        return static_cast<int16_t>(std::lrint(std::clamp(level / step, -2047.0f, 2047.0f)));
    }
};

// A row's columns of one span: rounded[i] · factor is x[i], to half a factor; sum is that of
// `rounded`. The factor is a power of two, so that most of x is exact: all that is not below
// 2^(8 − bits) of the span's largest. It is NaN if x has an infinity or NaN.
inline void round_span(const bf16* x, int64_t octets, int bits, int16_t* rounded, float* factor,
                       int32_t* sum) {
    __m128i largest = _mm_setzero_si128();
    for (int64_t i = 0; i < octets; ++i) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * i));
        largest = _mm_max_epu16(largest, _mm_and_si128(eight, _mm_set1_epi16(0x7FFF)));
    }
    // The minimum is that of the complements.
    const int top = 0xFFFF - _mm_extract_epi16(
        _mm_minpos_epu16(_mm_xor_si128(largest, _mm_set1_epi16(-1))), 0);
    // |x| < 2^(biased − 126); neither the factor nor its inverse may be subnormal.
    const int biased = top >> 7, exponent = std::max(biased - 126 - bits, -126);
    *factor = biased == 255 ? std::nanf("") : std::ldexp(1.0f, exponent);
    const __m256 inverse = _mm256_set1_ps(std::ldexp(1.0f, -exponent));
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < octets; ++i) {
        const __m256i bits32 = _mm256_slli_epi32(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * i))), 16);
        const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(bits32), inverse));
        total = _mm256_add_epi32(total, whole);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(rounded + 8 * i),
                         _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                         _mm256_extracti128_si256(whole, 1)));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    *sum = _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
}

// A span is as much of a group as an int32 can add up.
struct Span {
    int64_t group, first, octets;  // first and octets of the row's
};

template <class Codes>
class Product {
   public:
    Product(const PackedArgs& args, int threads)
        : a(args), codes_(args.levels), spans_(spans_of(args)),
          factors_(new float[args.rows * spans_.size()]),
          sums_(new int32_t[args.rows * spans_.size()]),
          x_(new int16_t[args.rows * args.columns]) {
        const auto spans = static_cast<int64_t>(spans_.size());
#pragma omp parallel for schedule(static) num_threads(threads) if (a.rows > kFewRows)
        for (int64_t index = 0; index < spans; ++index)
            for (int64_t row = 0; row < a.rows; ++row)
                round_span(a.x + row * a.columns + spans_[index].first * 8, spans_[index].octets,
                           Codes::kBits, x_.get() + at(spans_[index], row),
                           &factors_[index * a.rows + row], &sums_[index * a.rows + row]);
    }

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
    static constexpr int64_t kFewRows = 8;
    static constexpr int64_t kPairs = Codes::kSpanOctets * 4;
    // Their columns of one span stay in the second-level cache.
    static constexpr int64_t kRowsAtATime = 256;

    const PackedArgs a;
    const Codes codes_;
    const std::vector<Span> spans_;
    std::unique_ptr<float[]> factors_;  // (spans, rows)
    std::unique_ptr<int32_t[]> sums_;   // (spans, rows)
    std::unique_ptr<int16_t[]> x_;      // by spans, each (rows, columns of the span)

    static std::vector<Span> spans_of(const PackedArgs& a) {
        std::vector<Span> spans;
        for (int64_t group = 0; group < a.groups; ++group) {
            int64_t first = group * a.octets_per_group;
            const int64_t end = std::min(a.octets, first + a.octets_per_group);
            for (; first < end; first += Codes::kSpanOctets)
                spans.push_back({group, first, std::min(Codes::kSpanOctets, end - first)});
        }
        return spans;
    }

    // Where a row's columns of a span begin.
    int64_t at(const Span& span, int64_t row) const {
        return (span.first * a.rows + row * span.octets) * 8;
    }

    static Ints pair_of(const int16_t* x) {
        int32_t both;
        std::memcpy(&both, x, sizeof both);
        return broadcast_int(both);
    }

    // total + scale · (Σ (code + offset) · x − zero · Σx), of one span of one tile of one row.
    Floats add_span(size_t index, int64_t row, int64_t tile, Ints sum,
                    Floats total) const {
        const int64_t group = spans_[index].group;
        const int32_t of_x = sums_[index * a.rows + row];
        const float factor = factors_[index * a.rows + row];
        if (codes_.offset) sum = sum + broadcast_int(codes_.offset * of_x);
        Floats value = to_floats(sum) * broadcast(factor * codes_.unit());
        if (a.zeros)
            value = fnma(a.zero_point(tile, group),
                         broadcast(static_cast<float>(of_x) * factor), value);
        return fma(a.scale(tile, group), value, total);
    }

    // No more at once than there are registers for.
    void few_rows(int64_t tile, int64_t count) const {
#if defined(__AVX512BW__)
        constexpr int64_t most = 8;
#else
        constexpr int64_t most = 6;
#endif
        const int64_t first = a.rows <= most ? a.rows : a.rows / 2;
        some_rows(0, first, tile, count);
        some_rows(first, a.rows - first, tile, count);
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
        for (size_t index = 0; index < spans_.size(); ++index) {
            const Span& span = spans_[index];
            const int16_t* x = x_.get() + at(span, row);
            Ints sum[R][T];
            for (auto& r : sum)
                for (auto& t : r) t = broadcast_int(0);
            for (int64_t octet = 0; octet < span.octets; ++octet) {
                typename Codes::Octet packed[T];
                const int64_t ahead =
                    prefetched<T, Codes::kDigits>(span.first + octet, a.octets);
                for (int t = 0; t < T; ++t) {
                    const uint8_t* at_octet = codes[t] + (span.first + octet) * 64;
                    packed[t] = codes_.load(at_octet, digit);
                    for (int d = 0; d < Codes::kDigits; ++d) prefetch(at_octet + d * digit + ahead);
                }
                add_pairs<0, R, T>(packed, x + octet * 8, span.octets * 8, sum);
                add_pairs<2, R, T>(packed, x + octet * 8, span.octets * 8, sum);
                add_pairs<1, R, T>(packed, x + octet * 8, span.octets * 8, sum);
                add_pairs<3, R, T>(packed, x + octet * 8, span.octets * 8, sum);
            }
            for (int t = 0; t < T; ++t)
                for (int r = 0; r < R; ++r)
                    total[r][t] = add_span(index, row + r, tile + t, sum[r][t], total[r][t]);
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
        for (size_t index = 0; index < spans_.size(); ++index) {
            const Span& span = spans_[index];
            for (int64_t t = 0; t < count; ++t) {
                unpack(span, tile + t, buffer);
                float* of_tile = totals + t * rows * 16;
                int64_t r = 0;
                for (; r + kBlock <= rows; r += kBlock)
                    block<kBlock>(index, row + r, tile + t, buffer, of_tile + r * 16);
                for (; r + 2 <= rows; r += 2)
                    block<2>(index, row + r, tile + t, buffer, of_tile + r * 16);
                for (; r < rows; ++r)
                    block<1>(index, row + r, tile + t, buffer, of_tile + r * 16);
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

    // R rows against an unpacked span (pairs, 16), added to totals (R, 16).
    template <int R>
    void block(size_t index, int64_t row, int64_t tile, const float* pairs,
               float* totals) const {
        const Span& span = spans_[index];
        Ints sum[R];
        for (auto& r : sum) r = broadcast_int(0);
        const int16_t* x = x_.get() + at(span, row);
        const int64_t stride = span.octets * 8, count = span.octets * 4;
        for (int64_t k = 0; k < count; ++k) {
            const Ints w = load_ints(pairs + k * 16);
            for (int r = 0; r < R; ++r)
                sum[r] = add_products(sum[r], w, pair_of(x + r * stride + 2 * k));
        }
        for (int r = 0; r < R; ++r)
            store(totals + r * 16,
                  add_span(index, row + r, tile, sum[r], load(totals + r * 16)));
    }
};

// Calls `use` with a tag of the Product that computes with such levels and digits.
template <class Use>
void with_product(const float* levels, int digits, Use use) {
    if (digits == 2)
        use(Tag<Product<ByteCodes>>{});
    else if (IntegerCodes::fits(levels))
        use(Tag<Product<IntegerCodes>>{});
    else
        use(Tag<Product<LevelCodes>>{});
}

}  // namespace nybble
