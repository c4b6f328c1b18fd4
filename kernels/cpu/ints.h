// Sixteen 32-bit integers at a time, or as many pairs of 16-bit ones, on AVX-512, AVX2 or NEON.

#pragma once

#include "simd.h"

// AVX-VNNI; or its instructions as AVX-512 encodes them, by which CPUs without it can test it.
#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define NYBBLE_VNNI_256
#endif
#if defined(__AVXVNNI__)
#define NYBBLE_VEX "%{vex%} "  // the encoding of AVX-VNNI, not that of AVX-512
#else
#define NYBBLE_VEX
#endif

// An instruction that adds to `total` what it makes of a and b, or one that adds. The intrinsics say the
// same, but GCC then copies totals from register to register in each step of a loop, and spills some.
// Registers: "v", or "x" for those that AVX2 has too.
#define NYBBLE_ADD_PRODUCTS(registers, instruction, total, a, b) \
    asm(instruction " %2, %1, %0" : "+" registers(total) : registers(a), registers(b))
#define NYBBLE_ADD(registers, instruction, total, value) \
    asm(instruction " %1, %0, %0" : "+" registers(total) : registers(value))

namespace nybble {

#if defined(__aarch64__)

struct Ints {
    int32x4_t v[4];
};

// The vectors that `of` makes of the numbers 0 to 3.
template <class Of>
inline Ints four_ints(Of of) {
    return {{of(0), of(1), of(2), of(3)}};
}

inline Ints broadcast_int(int32_t value) {
    return four_ints([=](int) { return vdupq_n_s32(value); });
}
inline Ints load_ints(const void* source) {
    const auto* bytes = static_cast<const uint8_t*>(source);  // which need no alignment
    return four_ints([=](int i) { return vreinterpretq_s32_u8(vld1q_u8(bytes + 16 * i)); });
}
inline void store_ints(void* target, Ints a) {
    auto* bytes = static_cast<uint8_t*>(target);
    for (int i = 0; i < 4; ++i) vst1q_u8(bytes + 16 * i, vreinterpretq_u8_s32(a.v[i]));
}
inline Ints operator+(Ints a, Ints b) {
    return four_ints([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline Ints operator&(Ints a, Ints b) {
    return four_ints([&](int i) { return vandq_s32(a.v[i], b.v[i]); });
}
inline Ints operator|(Ints a, Ints b) {
    return four_ints([&](int i) { return vorrq_s32(a.v[i], b.v[i]); });
}
inline Ints and_not(Ints mask, Ints a) {
    return four_ints([&](int i) { return vbicq_s32(a.v[i], mask.v[i]); });
}
template <int Bits>
Ints shift_left(Ints a) {
    return four_ints([&](int i) { return vshlq_n_s32(a.v[i], Bits); });
}
template <int Bits>
Ints shift_right(Ints a) {
    if constexpr (Bits == 0) return a;
    return four_ints([&](int i) {
        constexpr int kBits = Bits ? Bits : 1;  // NEON has no shift by 0
        return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[i]), kBits));
    });
}
inline Floats to_floats(Ints a) {
    return four([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}

// total + the products of the pairs, of 16 bits with sign, added up in each lane.
inline Ints add_products(Ints total, Ints a, Ints b) {
    return four_ints([&](int i) {
        const int16x8_t left = vreinterpretq_s16_s32(a.v[i]), right = vreinterpretq_s16_s32(b.v[i]);
        const int32x4_t low = vmull_s16(vget_low_s16(left), vget_low_s16(right));
        return vaddq_s32(total.v[i], vpaddq_s32(low, vmull_high_s16(left, right)));
    });
}

#elif defined(__AVX512BW__)

struct Ints {
    __m512i v;
};

inline Ints broadcast_int(int32_t value) { return {_mm512_set1_epi32(value)}; }
inline Ints load_ints(const void* source) { return {_mm512_loadu_si512(source)}; }
inline void store_ints(void* target, Ints a) { _mm512_storeu_si512(target, a.v); }
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
inline Ints and_not(Ints mask, Ints a) { return {_mm512_andnot_si512(mask.v, a.v)}; }
template <int Bits>
Ints shift_left(Ints a) {
    return {_mm512_slli_epi32(a.v, Bits)};
}
template <int Bits>
Ints shift_right(Ints a) {
    return {_mm512_srli_epi32(a.v, Bits)};
}
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }

// total + the products of the pairs, of 16 bits with sign, added up in each lane.
inline Ints add_products(Ints total, Ints a, Ints b) {
#if defined(__AVX512VNNI__)
    NYBBLE_ADD_PRODUCTS("v", "vpdpwssd", total.v, a.v, b.v);
#else
    NYBBLE_ADD("v", "vpaddd", total.v, _mm512_madd_epi16(a.v, b.v));
#endif
    return total;
}

#else

struct Ints {
    __m256i low, high;
};

inline Ints broadcast_int(int32_t value) {
    return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)};
}
inline Ints load_ints(const void* source) {
    const auto* halves = static_cast<const __m256i*>(source);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
}
inline void store_ints(void* target, Ints a) {
    auto* halves = static_cast<__m256i*>(target);
    _mm256_storeu_si256(halves, a.low);
    _mm256_storeu_si256(halves + 1, a.high);
}
inline Ints operator+(Ints a, Ints b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
inline Ints operator&(Ints a, Ints b) {
    return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
}
inline Ints operator|(Ints a, Ints b) {
    return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
inline Ints and_not(Ints mask, Ints a) {
    return {_mm256_andnot_si256(mask.low, a.low), _mm256_andnot_si256(mask.high, a.high)};
}
template <int Bits>
Ints shift_left(Ints a) {
    return {_mm256_slli_epi32(a.low, Bits), _mm256_slli_epi32(a.high, Bits)};
}
template <int Bits>
Ints shift_right(Ints a) {
    return {_mm256_srli_epi32(a.low, Bits), _mm256_srli_epi32(a.high, Bits)};
}
inline Floats to_floats(Ints a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

inline __m256i add_products(__m256i total, __m256i a, __m256i b) {
#if defined(NYBBLE_VNNI_256)
    NYBBLE_ADD_PRODUCTS("x", NYBBLE_VEX "vpdpwssd", total, a, b);
#else
    NYBBLE_ADD("x", "vpaddd", total, _mm256_madd_epi16(a, b));
#endif
    return total;
}
// total + the products of the pairs, of 16 bits with sign, added up in each lane.
inline Ints add_products(Ints total, Ints a, Ints b) {
    return {add_products(total.low, a.low, b.low), add_products(total.high, a.high, b.high)};
}

#endif

}  // namespace nybble
