// Sixteen floats at a time on 64-bit ARM, in four vectors of NEON; part of simd.h. Sums are taken
// in the order of AVX2.

#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace nybble {

struct Floats {
    float32x4_t v[4];
};

// The vectors that `of` makes of the numbers 0 to 3.
template <class Of>
inline Floats four(Of of) {
    return {{of(0), of(1), of(2), of(3)}};
}

inline Floats broadcast(float value) {
    return four([=](int) { return vdupq_n_f32(value); });
}
inline Floats zero() { return broadcast(0); }
inline Floats load(const float* source) {
    return four([=](int i) { return vld1q_f32(source + 4 * i); });
}
inline void store(float* target, Floats a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(target + 4 * i, a.v[i]);
}

inline Floats operator+(Floats a, Floats b) {
    return four([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline Floats operator-(Floats a, Floats b) {
    return four([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline Floats operator*(Floats a, Floats b) {
    return four([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline Floats operator/(Floats a, Floats b) {
    return four([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
// a · b + c and c − a · b, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) {
    return four([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline Floats fnma(Floats a, Floats b, Floats c) {
    return four([&](int i) { return vfmsq_f32(c.v[i], a.v[i], b.v[i]); });
}
// If one operand is NaN they return the second, as on x86.
inline Floats min(Floats a, Floats b) {
    return four([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline Floats max(Floats a, Floats b) {
    return four([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); });
}
inline Floats nearest(Floats a) {
    return four([&](int i) { return vrndnq_f32(a.v[i]); });
}
// a · 2ⁿ for whole n between −126 and 127.
inline Floats times_power_of_two(Floats a, Floats n) {
    return four([&](int i) {
        const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127));
        return vmulq_f32(a.v[i], vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
    });
}
inline float sum(Floats a) {
    const float32x4_t all =
        vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(all), vget_high_f32(all));
    return vget_lane_f32(vpadd_f32(two, two), 0);
}

// The first `count` lanes, zero in the others.
inline Floats keep_first(Floats a, int64_t count) {
    const int32x4_t lanes = {0, 1, 2, 3};
    return four([&](int i) {
        const int32x4_t end = vdupq_n_s32(static_cast<int>(count) - 4 * i);
        return vreinterpretq_f32_u32(
            vandq_u32(vreinterpretq_u32_f32(a.v[i]), vcltq_s32(lanes, end)));
    });
}
inline Floats load_first(const float* source, int64_t count) {
    if (count >= 16) return load(source);
    float all[16] = {};
    if (count > 0) std::memcpy(all, source, count * sizeof(float));
    return load(all);
}

inline float32x4_t widen_bf16(uint16x4_t halves) {
    return vreinterpretq_f32_u32(vshll_n_u16(halves, 16));
}
inline Floats load_bf16(const bf16* source) {
    return four([=](int i) { return widen_bf16(vld1_u16(source + 4 * i)); });
}
inline Floats load_int8(const int8_t* source) {
    const int8x16_t all = vld1q_s8(source);
    const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_high_s8(all);
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
}
// 2^(source − 127): an exponent is in its place 23 bits up, but for that of a subnormal number.
inline Floats load_e8m0(const uint8_t* source) {
    const uint8x16_t all = vld1q_u8(source);
    const uint16x8_t low = vmovl_u8(vget_low_u8(all)), high = vmovl_high_u8(all);
    const auto value = [](uint16x4_t exponents) {
        const uint32x4_t bits = vshlq_n_u32(vmovl_u16(exponents), 23);
        return vreinterpretq_f32_u32(vmaxq_u32(bits, vdupq_n_u32(1 << 22)));
    };
    return {{value(vget_low_u16(low)), value(vget_high_u16(low)), value(vget_low_u16(high)),
             value(vget_high_u16(high))}};
}
inline Floats load_fp16(const uint16_t* source) {
    return four([=](int i) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source + 4 * i)));
    });
}
inline uint16x4_t round_to_bf16(float32x4_t a) {
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return vreinterpret_u16_bf16(vcvt_bf16_f32(a));
#else
    const uint32x4_t bits = vreinterpretq_u32_f32(a), upper = vshrq_n_u32(bits, 16);
    const uint32x4_t half = vaddq_u32(vandq_u32(upper, vdupq_n_u32(1)), vdupq_n_u32(0x7FFF));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, half), 16);
    const uint32x4_t nan = vorrq_u32(upper, vdupq_n_u32(0x40));
    return vmovn_u32(vbslq_u32(vceqq_f32(a, a), rounded, nan));
#endif
}
inline void store_bf16(bf16* target, Floats a) {
    for (int i = 0; i < 4; ++i) vst1_u16(target + 4 * i, round_to_bf16(a.v[i]));
}
inline void store_bf16_first(bf16* target, Floats a, int64_t count) {
    if (count >= 16) return store_bf16(target, a);
    bf16 all[16];
    store_bf16(all, a);
    std::memcpy(target, all, count * sizeof(bf16));
}

}  // namespace nybble
