// What the inner loops of the packed matmul work on; see kernels/layout.py for the tiles.

#pragma once

#include "simd.h"

namespace nybble {

// How scales and zeros are stored; the Python side passes the number.
enum ScaleType { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

inline Floats load_scales(const void* base, int64_t index, int type) {
    switch (type) {
        case kFloat16: return load_fp16(static_cast<const uint16_t*>(base) + index);
        case kBFloat16: return load_bf16(static_cast<const bf16*>(base) + index);
        default: return load(static_cast<const float*>(base) + index);
    }
}

struct PackedArgs {
    const bf16* x;            // (rows, columns), columns padded to a multiple of 8 with zeros
    const uint8_t* codes;     // (tiles, octets, 64)
    const void* scales;       // (tiles, groups, 16)
    const void* zeros;        // as scales, or null
    const float* levels;      // (16)
    const float* bias;        // (outputs) or null
    bf16* out;                // (rows, outputs)
    int64_t rows, outputs, columns, octets, groups, octets_per_group;
    int scale_type;
};

inline void store_tile(const PackedArgs& a, int64_t row, int64_t tile, Floats total) {
    const int64_t first = tile * 16, count = a.outputs - first < 16 ? a.outputs - first : 16;
    if (a.bias) total = total + load_first(a.bias + first, count);
    store_bf16_first(a.out + row * a.outputs + first, total, count);
}

}  // namespace nybble
