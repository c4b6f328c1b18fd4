// The sixteen levels of a packed weight as a table in registers.

#pragma once

#include "simd.h"

namespace nybble {

// Bit at which column c of an octet lies in its lane.
constexpr int shift_of(int column) { return 4 * (column / 2) + 16 * (column % 2); }

#if defined(__aarch64__)

struct Levels {
    uint8x16x4_t all;

    explicit Levels(const float* levels) {
        for (int i = 0; i < 4; ++i) all.val[i] = vreinterpretq_u8_f32(vld1q_f32(levels + 4 * i));
    }

    // Those of four codes.
    float32x4_t of(uint32x4_t codes) const {
        // Four codes become the numbers of their levels' bytes in the table.
        const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), codes, vdupq_n_u32(0x04040404));
        return vreinterpretq_f32_u8(vqtbl4q_u8(all, vreinterpretq_u8_u32(bytes)));
    }

    // The sixteen columns of two octets of one output, whose lanes are given.
    Floats of_octets(uint32_t first, uint32_t second) const {
        return four([&](int i) {
            const int32x4_t right = i % 2 ? int32x4_t{-shift_of(4), -shift_of(5), -shift_of(6), -shift_of(7)}
                                          : int32x4_t{-shift_of(0), -shift_of(1), -shift_of(2), -shift_of(3)};
            const uint32x4_t lane = vdupq_n_u32(i < 2 ? first : second);
            return of(vandq_u32(vshlq_u32(lane, right), vdupq_n_u32(15)));
        });
    }
};

#elif defined(__AVX512BW__)

struct Levels {
    __m512 all;

    explicit Levels(const float* levels) : all(_mm512_loadu_ps(levels)) {}

    // The sixteen columns of two octets of one output, whose lanes are given.
    Floats of_octets(uint32_t first, uint32_t second) const {
        const __m512i shifts = _mm512_setr_epi32(
            shift_of(0), shift_of(1), shift_of(2), shift_of(3), shift_of(4), shift_of(5),
            shift_of(6), shift_of(7), shift_of(0), shift_of(1), shift_of(2), shift_of(3),
            shift_of(4), shift_of(5), shift_of(6), shift_of(7));
        const __m512i lanes = _mm512_mask_set1_epi32(
            _mm512_set1_epi32(static_cast<int>(first)), 0xFF00, static_cast<int>(second));
        // The permute reads the lowest four bits.
        return {_mm512_permutexvar_ps(_mm512_srlv_epi32(lanes, shifts), all)};
    }
};

#else

struct Levels {
    __m256 low, high;  // levels 0–7 and 8–15

    explicit Levels(const float* levels)
        : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}

    // Lane i's level for the code in bits [4n, 4n + 4) of lane i, given shifted down by 4n.
    __m256 of(__m256i codes) const {
        // The permute reads the lowest three bits, the blend the sign.
        const __m256 fourth = _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, codes),
                                _mm256_permutevar8x32_ps(high, codes), fourth);
    }

    __m256 of_octet(uint32_t lane) const {
        const __m256i shifts =
            _mm256_setr_epi32(shift_of(0), shift_of(1), shift_of(2), shift_of(3), shift_of(4),
                              shift_of(5), shift_of(6), shift_of(7));
        return of(_mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(lane)), shifts));
    }

    // The sixteen columns of two octets of one output, whose lanes are given.
    Floats of_octets(uint32_t first, uint32_t second) const {
        return {of_octet(first), of_octet(second)};
    }
};

#endif

}  // namespace nybble
