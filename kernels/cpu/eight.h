// Eight floats at a time, for what is transposed in blocks of eight by eight.

#pragma once

#include "simd.h"

namespace nybble {

#if defined(__aarch64__)

struct Eight {
    float32x4_t low, high;
};

inline Eight load_eight(const bf16* source) {
    return {widen_bf16(vld1_u16(source)), widen_bf16(vld1_u16(source + 4))};
}
inline Eight load_eight(const int8_t* source) {
    const int16x8_t all = vmovl_s8(vld1_s8(source));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(all))), vcvtq_f32_s32(vmovl_high_s16(all))};
}

// Four rows of four become four columns, `stride` apart.
inline void transpose(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d, float* target,
                      int64_t stride) {
    const auto by_twos = [](float32x4_t x) { return vreinterpretq_f64_f32(x); };
    const auto ab0 = by_twos(vtrn1q_f32(a, b)), ab1 = by_twos(vtrn2q_f32(a, b));
    const auto cd0 = by_twos(vtrn1q_f32(c, d)), cd1 = by_twos(vtrn2q_f32(c, d));
    const auto put = [&](int64_t i, float64x2_t column) {
        vst1q_f32(target + i * stride, vreinterpretq_f32_f64(column));
    };
    put(0, vtrn1q_f64(ab0, cd0));
    put(1, vtrn1q_f64(ab1, cd1));
    put(2, vtrn2q_f64(ab0, cd0));
    put(3, vtrn2q_f64(ab1, cd1));
}
// Eight rows of eight become eight columns, `stride` apart.
inline void transpose(const Eight (&rows)[8], float* target, int64_t stride) {
    for (int i = 0; i < 8; i += 4) {
        const Eight &a = rows[i], &b = rows[i + 1], &c = rows[i + 2], &d = rows[i + 3];
        transpose(a.low, b.low, c.low, d.low, target + i, stride);
        transpose(a.high, b.high, c.high, d.high, target + 4 * stride + i, stride);
    }
}

#else

using Eight = __m256;

inline Eight load_eight(const bf16* source) {
    const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16));
}
inline Eight load_eight(const int8_t* source) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(source));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
}

// Eight rows of eight become eight columns, `stride` apart.
inline void transpose(const Eight (&rows)[8], float* target, int64_t stride) {
    __m256 pairs[8], fours[8];
    for (int i = 0; i < 4; ++i) {
        pairs[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        const __m256 *low = pairs + 4 * i, *high = low + 2;
        fours[4 * i] = _mm256_shuffle_ps(low[0], high[0], 0x44);
        fours[4 * i + 1] = _mm256_shuffle_ps(low[0], high[0], 0xEE);
        fours[4 * i + 2] = _mm256_shuffle_ps(low[1], high[1], 0x44);
        fours[4 * i + 3] = _mm256_shuffle_ps(low[1], high[1], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(target + i * stride, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
        _mm256_storeu_ps(target + (i + 4) * stride,
                         _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
    }
}

#endif

}  // namespace nybble
