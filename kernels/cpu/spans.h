// Activations in integers, for CPUs that do not multiply bf16: they are rounded to 16 bits by spans of
// columns, multiplied with codes and added up without error; only the sums of spans are floats. What
// a row's result is does not depend on the other rows, nor on the instructions.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "ints.h"
#include "packed_args.h"
#include "threads.h"

namespace nybble {

// Codes of consecutive whole numbers, the first level `offset` (of at most 15 in size).
struct IntegerLevels {
    // Activations of up to 2^15 times codes of up to 15 in up to 128 columns stay below 2^31.
    static constexpr int kBits = 15;
    static constexpr int64_t kSpanOctets = 16;
    static constexpr int kDigits = 1;

    int32_t offset;

    explicit IntegerLevels(const float* levels) : offset(static_cast<int32_t>(levels[0])) {}

    float unit() const { return 1; }
};

// Codes of two digits, of which kByteCenter is subtracted.
struct ByteLevels {
    // Activations of up to 2^15 times codes of up to 255 in up to 128 columns stay below 2^31, and
    // so they do less the offset.
    static constexpr int kBits = 15;
    static constexpr int64_t kSpanOctets = 16;
    static constexpr int kDigits = 2;
    static constexpr int32_t offset = -kByteCenter;

    explicit ByteLevels(const float*) {}

    float unit() const { return 1; }
};

// Any sixteen levels, rounded to multiples of a 2047th of the largest.
struct RoundedLevels {
    // 2^14 times 2047 in 64 columns stays below 2^31.
    static constexpr int kBits = 14;
    static constexpr int64_t kSpanOctets = 8;
    static constexpr int kDigits = 1;
    static constexpr int32_t offset = 0;

    float step;

    explicit RoundedLevels(const float* levels) {
        float largest = 0;
        for (int i = 0; i < 16; ++i) largest = std::max(largest, std::fabs(levels[i]));
        step = largest > 0 ? largest / 2047 : 1;
    }

    float unit() const { return step; }
    int16_t rounded(float level) const {
        return static_cast<int16_t>(std::lrint(std::clamp(level / step, -2047.0f, 2047.0f)));
    }
};

// The largest |x| of some octets, as bits of bf16.
inline int largest_of(const bf16* x, int64_t octets) {
#if defined(__aarch64__)
    uint16x8_t largest = vdupq_n_u16(0);
    for (int64_t i = 0; i < octets; ++i)
        largest = vmaxq_u16(largest, vandq_u16(vld1q_u16(x + 8 * i), vdupq_n_u16(0x7FFF)));
    return vmaxvq_u16(largest);
#else
    __m128i largest = _mm_setzero_si128();
    for (int64_t i = 0; i < octets; ++i) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * i));
        largest = _mm_max_epu16(largest, _mm_and_si128(eight, _mm_set1_epi16(0x7FFF)));
    }
    // The minimum is that of the complements.
    return 0xFFFF - _mm_extract_epi16(
        _mm_minpos_epu16(_mm_xor_si128(largest, _mm_set1_epi16(-1))), 0);
#endif
}

// x · inverse as whole numbers, and their sum.
inline int32_t scale_and_round(const bf16* x, int64_t octets, float inverse, int16_t* rounded) {
#if defined(__aarch64__)
    int32x4_t total = vdupq_n_s32(0);
    for (int64_t i = 0; i < 8 * octets; i += 4) {
        const int32x4_t whole = vcvtnq_s32_f32(vmulq_n_f32(widen_bf16(vld1_u16(x + i)), inverse));
        total = vaddq_s32(total, whole);
        vst1_s16(rounded + i, vqmovn_s32(whole));
    }
    return vaddvq_s32(total);
#else
    const __m256 by = _mm256_set1_ps(inverse);
    __m256i total = _mm256_setzero_si256();
    for (int64_t i = 0; i < octets; ++i) {
        const __m256i bits32 = _mm256_slli_epi32(
            _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + 8 * i))), 16);
        const __m256i whole = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(bits32), by));
        total = _mm256_add_epi32(total, whole);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(rounded + 8 * i),
                         _mm_packs_epi32(_mm256_castsi256_si128(whole),
                                         _mm256_extracti128_si256(whole, 1)));
    }
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
#endif
}

// A row's columns of one span: rounded[i] · factor is x[i], to half a factor; sum is that of
// `rounded`. The factor is a power of two, so that most of x is exact: all that is not below
// 2^(8 − bits) of the span's largest. It is NaN if x has an infinity or NaN.
inline void round_span(const bf16* x, int64_t octets, int bits, int16_t* rounded, float* factor,
                       int32_t* sum) {
    // |x| < 2^(biased − 126); neither the factor nor its inverse may be subnormal.
    const int biased = largest_of(x, octets) >> 7, exponent = std::max(biased - 126 - bits, -126);
    *factor = biased == 255 ? std::nanf("") : std::ldexp(1.0f, exponent);
    *sum = scale_and_round(x, octets, std::ldexp(1.0f, -exponent), rounded);
}

// The rows of x, rounded by spans: as much of a group as an int32 can add up.
class Spans {
   public:
    template <class Levels>
    Spans(const PackedArgs& args, const Levels& levels, int threads)
        : a(args), spans_(spans_of(args, Levels::kSpanOctets)),
          of_rows_(new OfRow[args.rows * spans_.size()]),
          x_(new int16_t[args.rows * args.columns]) {
        const float unit = levels.unit();
        const int32_t offset = levels.offset;
        parallel_for_small(size(), a.rows > 8 ? threads : 1, [&](int64_t index, int) {
            const Span& span = spans_[index];
            for (int64_t row = 0; row < a.rows; ++row) {
                float factor;
                int32_t sum;
                round_span(a.x + row * a.columns + span.first * 8, span.octets, Levels::kBits,
                           x(span, row), &factor, &sum);
                of_rows_[index * a.rows + row] = {offset * sum, factor * unit,
                                                  static_cast<float>(sum) * factor};
            }
        });
    }

    int64_t size() const { return static_cast<int64_t>(spans_.size()); }
    const Span& operator[](int64_t index) const { return spans_[index]; }

    // A row's columns of a span; the next row's follow.
    const int16_t* x(const Span& span, int64_t row) const { return x_.get() + at(span, row); }
    int16_t* x(const Span& span, int64_t row) { return x_.get() + at(span, row); }

    // total + scale · (Σ (code + offset) · x − zero · Σx), of one span of one tile of one row; `sum`
    // is Σ code · x.
    Floats add(int64_t index, int64_t row, const Scaling& scaling, Ints sum, Floats total) const {
        const OfRow& of = of_rows_[index * a.rows + row];
        Floats value = to_floats(sum + broadcast_int(of.offset)) * broadcast(of.factor);
        if (a.zeros) value = fnma(scaling.zero, broadcast(of.sum), value);
        return fma(scaling.scale, value, total);
    }

 private:
    // What the sum of one span's products becomes: `offset` is added, and that times `factor` is
    // Σ (code + offset) · x; `sum` is Σx.
    struct OfRow {
        int32_t offset;
        float factor, sum;
    };

    const PackedArgs a;
    const std::vector<Span> spans_;
    std::unique_ptr<OfRow[]> of_rows_;  // (spans, rows)
    std::unique_ptr<int16_t[]> x_;      // by spans, each (rows, columns of the span)

    // Where a row's columns of a span begin.
    int64_t at(const Span& span, int64_t row) const {
        return (span.first * a.rows + row * span.octets) * 8;
    }
};

}  // namespace nybble
