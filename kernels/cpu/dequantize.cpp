// A packed weight as a dense matrix. PackedWeight.dequantize in kernels/packed.py defines the
// result, and these kernels give the same bits.

#include <algorithm>

#include "levels.h"
#include "packed_args.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

namespace {

struct Packed {
    const uint8_t* codes;  // (tiles, octets, 64)
    int64_t octets, groups, octets_per_group;
};

// Decodes one output, row `lane` of a tile, in stored column order. scales and zeros are those of
// the tile, (groups, 16). `target` must have room for one octet more than the weight has.
void decode(const Packed& w, const Levels& levels, int64_t tile, int64_t lane, const float* scales,
            const float* zeros, float* target) {
    const uint8_t* codes = w.codes + tile * w.octets * 64 + lane * 4;
    auto load_lane = [&](int64_t octet) {
        uint32_t bits;
        std::memcpy(&bits, codes + octet * 64, sizeof bits);
        return bits;
    };
    for (int64_t group = 0; group < w.groups; ++group) {
        const Floats scale = broadcast(scales[group * 16 + lane]);
        const Floats zero_point = broadcast(zeros[group * 16 + lane]);
        const int64_t first = group * w.octets_per_group;
        const int64_t last = std::min(w.octets, first + w.octets_per_group);
        // Octets are decoded in pairs. If a group has an odd number, its last octet is paired with
        // the next group's first, which is decoded again later with its own scale.
        for (int64_t octet = first; octet < last; octet += 2) {
            const Floats level = levels.of_octets(load_lane(octet),
                                                  load_lane(std::min(octet + 1, w.octets - 1)));
            store(target + octet * 8, (level - zero_point) * scale);
        }
    }
}

}  // namespace

// out is (outputs, inputs), float or bf16. perm may be null; columns of the same feature are added.
extern "C" int nybble_dequantize(const uint8_t* codes, const void* scales, const void* zeros,
                                 const float* levels, const int32_t* perm, void* out,
                                 int64_t outputs, int64_t inputs, int64_t columns, int64_t groups,
                                 int64_t octets_per_group, int scale_type, int as_bf16,
                                 int threads) try {
    const int64_t octets = (columns + 7) / 8;
    const Packed w{codes, octets, groups, std::min(octets, octets_per_group)};
    const Levels table(levels);
    const int64_t tiles = (outputs + 15) / 16;
    // Each thread's buffer holds a tile's scales and zeros, one row of it in stored column order,
    // and that row in the order of features if there is a permutation.
    const int64_t row_size = w.octets * 8 + 8;
    const int64_t size = groups * 32 + row_size + (perm ? inputs : 0);
    const auto all_buffers = buffers(threads, size);
    parallel_for(tiles, threads, [&](int64_t tile, int thread) {
        float* tile_scales = all_buffers.get() + thread * size;
        float* tile_zeros = tile_scales + groups * 16;
        float* stored = tile_zeros + groups * 16;
        float* features = stored + row_size;
        if (!zeros) std::fill(tile_zeros, stored, 0.0f);
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t at = (tile * groups + group) * 16;
            store(tile_scales + group * 16, load_scales(scales, at, scale_type));
            if (zeros) store(tile_zeros + group * 16, load_scales(zeros, at, scale_type));
        }
        const int64_t lanes = std::min<int64_t>(16, outputs - tile * 16);
        for (int64_t lane = 0; lane < lanes; ++lane) {
            decode(w, table, tile, lane, tile_scales, tile_zeros, stored);
            const float* row = stored;
            if (perm) {
                std::fill(features, features + inputs, 0.0f);
                for (int64_t k = 0; k < columns; ++k) features[perm[k]] += stored[k];
                row = features;
            }
            const int64_t at = (tile * 16 + lane) * inputs;
            if (as_bf16) {
                // Not the conversion instruction, which turns subnormal numbers into zeros.
                bf16* target = static_cast<bf16*>(out) + at;
                for (int64_t k = 0; k < inputs; ++k) target[k] = to_bf16(row[k]);
            } else {
                std::memcpy(static_cast<float*>(out) + at, row, inputs * sizeof(float));
            }
        }
    });
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
