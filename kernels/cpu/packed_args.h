// What the inner loops of the packed matmul work on; see kernels/layout.py for the tiles.

#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace nybble {

// How scales and zeros are stored; the Python side passes the number.
enum ScaleType { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kExponents = 3 };

// What the kernels subtract from a code of two digits, which has no zero of its own: 16 · 8 + 8.
constexpr int kByteCenter = 136;

NYBBLE_INLINE Floats load_scales(const void* base, int64_t index, int type) {
    switch (type) {
        case kFloat16: return load_fp16(static_cast<const uint16_t*>(base) + index);
        case kBFloat16: return load_bf16(static_cast<const bf16*>(base) + index);
        case kExponents: return load_e8m0(static_cast<const uint8_t*>(base) + index);
        default: return load(static_cast<const float*>(base) + index);
    }
}

// What the codes of a group of a tile stand for: scale · (code − zero).
struct Scaling {
    Floats scale, zero;
};

// If an 8-bit weight is computed in one pass, its high and low digits are not columns of their own:
// `digits` is 2, and columns, octets and groups are those of one digit.
struct PackedArgs {
    const bf16* x;            // (rows, columns), columns padded to a multiple of 8 with zeros
    const uint8_t* codes;     // (tiles, digits, octets, 64)
    const void* scales;       // (tiles, digits, groups, 16)
    const void* zeros;        // as scales, or null
    const float* levels;      // (16)
    const float* bias;        // (outputs) or null
    bf16* out;                // (rows, outputs)
    int64_t rows, outputs, columns, octets, groups, octets_per_group;
    int scale_type;
    int digits;

    const uint8_t* codes_of(int64_t tile) const { return codes + tile * digits * octets * 64; }

    // The scale of a whole code is that of its low digit.
    NYBBLE_INLINE Floats scale(int64_t tile, int64_t group) const {
        return load_scales(scales, at(tile, digits - 1, group), scale_type);
    }

    // What is to be subtracted from a code; a code of two digits is less kByteCenter already.
    NYBBLE_INLINE Floats zero_point(int64_t tile, int64_t group) const {
        const Floats low = load_scales(zeros, at(tile, digits - 1, group), scale_type);
        if (digits == 1) return low;
        const Floats high = load_scales(zeros, at(tile, 0, group), scale_type);
        return fma(high, broadcast(16), low) - broadcast(kByteCenter);
    }

    // For all rows of a block at once. The zero is 0 if there are none.
    NYBBLE_INLINE Scaling scaling(int64_t tile, int64_t group) const {
        Scaling scaling{scale(tile, group), zero()};
        if (zeros) scaling.zero = zero_point(tile, group);
        return scaling;
    }

   private:
    int64_t at(int64_t tile, int64_t digit, int64_t group) const {
        return ((tile * digits + digit) * groups + group) * 16;
    }
};

// Columns of one group that are added up before they are scaled.
struct Span {
    int64_t group, first, octets;  // first and octets of the row's
};

// The groups' columns in spans of at most so many octets.
inline std::vector<Span> spans_of(const PackedArgs& a, int64_t most_octets) {
    std::vector<Span> spans;
    spans.reserve(a.groups);
    for (int64_t group = 0; group < a.groups; ++group) {
        int64_t first = group * a.octets_per_group;
        const int64_t end = std::min(a.octets, first + a.octets_per_group);
        for (; first < end; first += most_octets)
            spans.push_back({group, first, std::min(most_octets, end - first)});
    }
    return spans;
}

inline void store_tile(const PackedArgs& a, int64_t row, int64_t tile, Floats total) {
    const int64_t first = tile * 16, count = a.outputs - first < 16 ? a.outputs - first : 16;
    if (a.bias) total = total + load_first(a.bias + first, count);
    store_bf16_first(a.out + row * a.outputs + first, total, count);
}

// Fetches from memory what T tiles, which are read side by side, have behind an octet: in the next T
// tiles if there are no more octets in these. What is needed in a moment goes to the first-level cache,
// whose requests are too few for memory; what is needed later, to the second. Of tiles as short as a
// small model's, processors do not foresee enough by themselves.
template <int T, int Digits>
class Prefetch {
   public:
    Prefetch(int64_t octet, int64_t octets)
        : digit_(octets * 64), soon_(after(octet, octets, std::min(kSoon, octets))),
          later_(after(octet, octets, std::min(kLater, octets))) {}

    void operator()(const uint8_t* octet) const {
        for (int d = 0; d < Digits; ++d) {
            prefetch(octet + d * digit_ + soon_);
            prefetch_later(octet + d * digit_ + later_);
        }
    }

   private:
    // In octets; the second is 24 KiB of all tiles.
    static constexpr int64_t kSoon = 8, kLater = (24 << 10) / (64 * T * Digits);

    const int64_t digit_, soon_, later_;

    // Bytes to what is read so many octets later.
    static int64_t after(int64_t octet, int64_t octets, int64_t distance) {
        const int64_t skipped = octet + distance < octets ? 0 : (T * Digits - 1) * octets;
        return (distance + skipped) * 64;
    }
};

// Whether levels are consecutive whole numbers, the first of at most 15 in size.
inline bool are_integers(const float* levels) {
    if (std::fabs(levels[0]) > 15 || levels[0] != std::nearbyint(levels[0])) return false;
    for (int i = 1; i < 16; ++i)
        if (levels[i] != levels[0] + i) return false;
    return true;
}

// Stands for a type in a call.
template <class Type>
struct Tag {
    using type = Type;
};

}  // namespace nybble
