// Sixteen floats at a time, on AVX-512 (with BF16 or without), on AVX2 with FMA and F16C, or on NEON;
// bf16 conversions. All compute the same values, except for the order of additions in a sum.

#pragma once

#if !defined(__aarch64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace nybble {

using bf16 = uint16_t;

inline float to_float(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<bf16>(bits >> 16 | 0x40);  // NaN
    bits += 0x7FFF + (bits >> 16 & 1);  // round to nearest even
    return static_cast<bf16>(bits >> 16);
}

// For what is chosen in a loop whose vectors are to stay in registers: around a call they do not.
#define NYBBLE_INLINE inline __attribute__((always_inline))

// Memory of which the CPU does not foresee that it is read soon.
inline void prefetch(const void* line) { __builtin_prefetch(line); }
// The same, into the second-level cache alone.
inline void prefetch_later(const void* line) { __builtin_prefetch(line, 0, 2); }

}  // namespace nybble

#if defined(__aarch64__)
#include "simd_neon.h"
#endif

namespace nybble {

#if defined(__aarch64__)

// In simd_neon.h.

#elif defined(__AVX512BW__)

struct Floats {
    __m512 v;
};

inline Floats broadcast(float value) { return {_mm512_set1_ps(value)}; }
inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats load(const float* source) { return {_mm512_loadu_ps(source)}; }
inline void store(float* target, Floats a) { _mm512_storeu_ps(target, a.v); }

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// a · b + c and c − a · b, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats nearest(Floats a) { return {_mm512_roundscale_ps(a.v, 8)}; }
// a · 2ⁿ for whole n between −126 and 127.
inline Floats times_power_of_two(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }

inline __mmask16 first_lanes(int64_t count) {
    return static_cast<__mmask16>(count >= 16 ? 0xFFFF : (1u << count) - 1);
}
// The first `count` lanes, zero in the others.
inline Floats keep_first(Floats a, int64_t count) {
    return {_mm512_maskz_mov_ps(first_lanes(count), a.v)};
}
inline Floats load_first(const float* source, int64_t count) {
    return {_mm512_maskz_loadu_ps(first_lanes(count), source)};
}

inline Floats load_bf16(const bf16* source) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}
inline Floats load_int8(const int8_t* source) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(all))};
}
// 2^(source − 127): an exponent is in its place 23 bits up, but for that of a subnormal number.
inline Floats load_e8m0(const uint8_t* source) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu8_epi32(all), 23);
    return {_mm512_castsi512_ps(_mm512_max_epi32(bits, _mm512_set1_epi32(1 << 22)))};
}
inline Floats load_fp16(const uint16_t* source) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))};
}
#if defined(__AVX512BF16__)
inline __m256i round_to_bf16(Floats a) {
    return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v));
}
#else
inline __m256i round_to_bf16(Floats a) {
    const __m512i bits = _mm512_castps_si512(a.v), upper = _mm512_srli_epi32(bits, 16);
    const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_or_epi32(rounded, is_nan, upper, _mm512_set1_epi32(0x40)));
}
#endif
inline void store_bf16(bf16* target, Floats a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), round_to_bf16(a));
}
inline void store_bf16_first(bf16* target, Floats a, int64_t count) {
    _mm256_mask_storeu_epi16(target, first_lanes(count), round_to_bf16(a));
}

#else

struct Floats {
    __m256 low, high;
};

inline Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats load(const float* source) {
    return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)};
}
inline void store(float* target, Floats a) {
    _mm256_storeu_ps(target, a.low);
    _mm256_storeu_ps(target + 8, a.high);
}

#define NYBBLE_BINARY(name, intrinsic)                                     \
    inline Floats name(Floats a, Floats b) {                               \
        return {intrinsic(a.low, b.low), intrinsic(a.high, b.high)};       \
    }
NYBBLE_BINARY(operator+, _mm256_add_ps)
NYBBLE_BINARY(operator-, _mm256_sub_ps)
NYBBLE_BINARY(operator*, _mm256_mul_ps)
NYBBLE_BINARY(operator/, _mm256_div_ps)
NYBBLE_BINARY(min, _mm256_min_ps)
NYBBLE_BINARY(max, _mm256_max_ps)
#undef NYBBLE_BINARY
inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats fnma(Floats a, Floats b, Floats c) {
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats nearest(Floats a) {
    return {_mm256_round_ps(a.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(a.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline __m256 power_of_two(__m256 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}
inline Floats times_power_of_two(Floats a, Floats n) {
    return {_mm256_mul_ps(a.low, power_of_two(n.low)), _mm256_mul_ps(a.high, power_of_two(n.high))};
}
inline float sum(Floats a) {
    const __m256 eight = _mm256_add_ps(a.low, a.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline __m256i first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Floats keep_first(Floats a, int64_t count) {
    return {_mm256_and_ps(a.low, _mm256_castsi256_ps(first_lanes(count))),
            _mm256_and_ps(a.high, _mm256_castsi256_ps(first_lanes(count - 8)))};
}
inline Floats load_first(const float* source, int64_t count) {
    return {_mm256_maskload_ps(source, first_lanes(count)),
            _mm256_maskload_ps(source + 8, first_lanes(count - 8))};
}

inline __m256 widen_bf16(__m128i halves) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Floats load_bf16(const bf16* source) {
    const auto* halves = reinterpret_cast<const __m128i*>(source);
    return {widen_bf16(_mm_loadu_si128(halves)), widen_bf16(_mm_loadu_si128(halves + 1))};
}
inline Floats load_int8(const int8_t* source) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(all)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(all, 8)))};
}
inline __m256 widen_e8m0(__m128i exponents) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(exponents), 23);
    return _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_set1_epi32(1 << 22)));
}
// 2^(source − 127): an exponent is in its place 23 bits up, but for that of a subnormal number.
inline Floats load_e8m0(const uint8_t* source) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return {widen_e8m0(all), widen_e8m0(_mm_srli_si128(all, 8))};
}
inline Floats load_fp16(const uint16_t* source) {
    const auto* halves = reinterpret_cast<const __m128i*>(source);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
}
inline __m256i round_to_bf16(__m256 a) {
    const __m256i bits = _mm256_castps_si256(a), upper = _mm256_srli_epi32(bits, 16);
    const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
    const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const __m256i nan = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(rounded, nan, is_nan);
}
inline void store_bf16(bf16* target, Floats a) {
    const __m256i mixed = _mm256_packus_epi32(round_to_bf16(a.low), round_to_bf16(a.high));
    // The pack works within 128-bit halves; this puts its quarters in order.
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permute4x64_epi64(mixed, 0xD8));
}
inline void store_bf16_first(bf16* target, Floats a, int64_t count) {
    bf16 all[16];
    store_bf16(all, a);
    std::memcpy(target, all, count * sizeof(bf16));
}

#endif

// exp by Cephes' polynomial after reduction by powers of two; inputs that would overflow or
// underflow are clamped.
inline Floats exp(Floats x) {
    // If one operand is NaN, the instructions return the second: x, so that NaN stays NaN.
    x = min(broadcast(88.3f), max(broadcast(-87.3f), x));
    const Floats n = nearest(x * broadcast(1.44269504f));
    Floats r = fnma(n, broadcast(0.693359375f), x);
    r = fnma(n, broadcast(-2.12194440e-4f), r);
    Floats p = broadcast(1.9875691500e-4f);
    p = fma(p, r, broadcast(1.3981999507e-3f));
    p = fma(p, r, broadcast(8.3334519073e-3f));
    p = fma(p, r, broadcast(4.1665795894e-2f));
    p = fma(p, r, broadcast(1.6666665459e-1f));
    p = fma(p, r, broadcast(0.5f));
    p = fma(p * r, r, r + broadcast(1.0f));
    return times_power_of_two(p, n);
}

// Error at most 10⁻⁷.
inline Floats tanh(Floats x) {
    return broadcast(1.0f) - broadcast(2.0f) / (broadcast(1.0f) + exp(x + x));
}

}  // namespace nybble
