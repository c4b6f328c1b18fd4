// The packed matmul's inner loops with activations in 8 bits, if they are asked for: a row's columns of
// a span are whole numbers of at most 127 in size times a factor. Products and their sums are exact;
// what a row's result is does not depend on the other rows, nor on the instructions.

#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "bytes.h"
#include "ints.h"
#include "packed_args.h"
#include "threads.h"

namespace nybble {

// What codes stand for: whole numbers below 256 times `step`, and `base` added.

struct IntegerBytes {
    static constexpr int kDigits = 1;

    float base;
    Ints mask = broadcast_int(0x0F0F0F0F);

    explicit IntegerBytes(const float* levels) : base(levels[0]) {}

    float step() const { return 1; }
    // Four columns of each output: 0, 4, 1 and 5 of an octet if H is 0, 2, 6, 3 and 7 if it is 1.
    template <int H>
    Ints four(const uint8_t* octet, int64_t) const {
        return shift_right<4 * H>(load_ints(octet)) & mask;
    }
};

#if defined(NYBBLE_LARGE_BYTES)

struct ByteBytes {
    static constexpr int kDigits = 2;
    static constexpr float base = -kByteCenter;

    Ints lower = broadcast_int(0x0F0F0F0F);

    explicit ByteBytes(const float*) {}

    float step() const { return 1; }
    template <int H>
    Ints four(const uint8_t* octet, int64_t digit) const {
        const Ints high = load_ints(octet), low = load_ints(octet + digit);
        return H ? (shift_right<4>(low) & lower) | and_not(lower, high)
                 : (low & lower) | shift_left<4>(high & lower);
    }
};

// Any sixteen levels, rounded to 255ths of their range.
struct LevelBytes {
    static constexpr int kDigits = 1;

    float base, range;
    ByteTable table;
    Ints mask = broadcast_int(0x0F0F0F0F);

    explicit LevelBytes(const float* levels)
        : base(*std::min_element(levels, levels + 16)),
          range(*std::max_element(levels, levels + 16) - base), table(bytes_of(levels)) {}

    float step() const { return range > 0 ? range / 255 : 1; }
    template <int H>
    Ints four(const uint8_t* octet, int64_t) const {
        return table.of(shift_right<4 * H>(load_ints(octet)) & mask);
    }

   private:
    ByteTable bytes_of(const float* levels) const {
        uint8_t bytes[16];
        for (int i = 0; i < 16; ++i)
            bytes[i] = static_cast<uint8_t>(std::lrint((levels[i] - base) / step()));
        return ByteTable(bytes);
    }
};

#endif

// Rows of x in bytes, by spans of at most 128 columns of one group.
class RowsInBytes {
   public:
    RowsInBytes(const PackedArgs& args, int threads)
        : a(args), spans_(spans_of(args, kMostOctets)), factors_(new float[args.rows * size()]),
          sums_(new float[args.rows * size()]), x_(new int8_t[args.rows * args.columns]) {
        parallel_for_small(a.rows, a.rows > 8 ? threads : 1, [&](int64_t row, int) {
            for (int64_t index = 0; index < size(); ++index) round(row, index);
        });
    }

    int64_t size() const { return static_cast<int64_t>(spans_.size()); }
    const Span& operator[](int64_t index) const { return spans_[index]; }

    // A row's bytes; those of an octet are its columns 0, 4, 1, 5, 2, 6, 3 and 7.
    const int8_t* row(int64_t row) const { return x_.get() + row * a.columns; }

    // What a span's bytes are multiples of, and the sum of what they stand for.
    float factor(int64_t row, int64_t index) const { return factors_[row * size() + index]; }
    float sum(int64_t row, int64_t index) const { return sums_[row * size() + index]; }

   private:
    static constexpr int64_t kMostOctets = 16;

    const PackedArgs a;
    const std::vector<Span> spans_;
    std::unique_ptr<float[]> factors_, sums_;  // (rows, spans)
    std::unique_ptr<int8_t[]> x_;              // (rows, columns)

    void round(int64_t row, int64_t index) {
        const Span& span = spans_[index];
        const bf16* x = a.x + row * a.columns + span.first * 8;
        const int64_t count = span.octets * 8;
        uint16_t top = 0;
        for (int64_t i = 0; i < count; ++i)
            top = std::max(top, static_cast<uint16_t>(x[i] & 0x7FFF));
        // The least has a finite inverse.
        float factor = std::max(to_float(top) / 127, 0x1p-126f);
        if (top >= 0x7F80) factor = std::nanf("");  // x has an infinity or NaN
        const float inverse = top >= 0x7F80 ? 0 : 1 / factor;
        int8_t* target = x_.get() + row * a.columns + span.first * 8;
        constexpr int kPlace[8] = {0, 2, 4, 6, 1, 3, 5, 7};
        int32_t total = 0;
        for (int64_t octet = 0; octet < span.octets; ++octet)
            for (int c = 0; c < 8; ++c) {
                const auto value = static_cast<int32_t>(
                    std::nearbyint(to_float(x[octet * 8 + c]) * inverse));
                target[octet * 8 + kPlace[c]] = static_cast<int8_t>(value);
                total += value;
            }
        factors_[row * size() + index] = factor;
        sums_[row * size() + index] = static_cast<float>(total) * factor;
    }
};

template <class Codes>
class ByteProduct {
   public:
    ByteProduct(const PackedArgs& args, int threads)
        : a(args), codes_(args.levels), x_(args, threads) {}

    // All is done in registers.
    int64_t buffer_size() const { return 0; }

    void tiles(int64_t tile, int64_t count, float*) const {
        int64_t row = 0;
        for (; row + 4 <= a.rows; row += 4) some_rows<4>(row, tile, count);
        for (; row + 2 <= a.rows; row += 2) some_rows<2>(row, tile, count);
        if (row < a.rows) some_rows<1>(row, tile, count);
    }

   private:
#if defined(__AVX512BW__)
    static constexpr int kTiles = 2, kTilesOfOne = 4;
#else
    static constexpr int kTiles = 1, kTilesOfOne = 1;
#endif

    const PackedArgs a;
    const Codes codes_;
    const RowsInBytes x_;

    template <int R>
    void some_rows(int64_t row, int64_t tile, int64_t count) const {
        constexpr int T = R == 1 ? kTilesOfOne : kTiles;
        for (; count >= T; tile += T, count -= T) block<R, T>(row, tile);
        for (; count > 0; ++tile, --count) block<R, 1>(row, tile);
    }

    static Ints four_of(const int8_t* x) {
        int32_t all;
        std::memcpy(&all, x, sizeof all);
        return broadcast_int(all);
    }

    template <int R, int T>
    void block(int64_t row, int64_t tile) const {
        Floats total[R][T];
        for (auto& r : total)
            for (auto& t : r) t = zero();
        const uint8_t* codes[T];
        for (int t = 0; t < T; ++t) codes[t] = a.codes_of(tile + t);
        const int64_t digit = a.octets * 64;
        const int8_t* x = x_.row(row);
        for (int64_t index = 0; index < x_.size(); ++index) {
            const Span& span = x_[index];
            ByteSums<R * T> sums;
            for (int64_t octet = span.first; octet < span.first + span.octets; ++octet) {
                const Prefetch<T, Codes::kDigits> fetch(octet, a.octets);
                for (int t = 0; t < T; ++t) fetch(codes[t] + octet * 64);
                half<0, R, T>(codes, octet, digit, x, sums);
                half<1, R, T>(codes, octet, digit, x, sums);
                sums.next();
            }
            sums.finish();
            add_span<R, T>(row, tile, index, span.group, sums, total);
        }
        for (int t = 0; t < T; ++t)
            for (int r = 0; r < R; ++r) store_tile(a, row + r, tile + t, total[r][t]);
    }

    template <int H, int R, int T>
    void half(const uint8_t* const (&codes)[T], int64_t octet, int64_t digit, const int8_t* x,
              ByteSums<R * T>& sums) const {
        Ints w[T];
        for (int t = 0; t < T; ++t) w[t] = codes_.template four<H>(codes[t] + octet * 64, digit);
        for (int r = 0; r < R; ++r) {
            const Ints four = four_of(x + r * a.columns + octet * 8 + 4 * H);
            for (int t = 0; t < T; ++t) sums.add(r * T + t, w[t], four);
        }
    }

    // total + scale · (Σ (step · code + base) · x − zero · Σx), of one span.
    template <int R, int T>
    void add_span(int64_t row, int64_t tile, int64_t index, int64_t group,
                  const ByteSums<R * T>& sums, Floats (&total)[R][T]) const {
        // Unrolled, or else GCC takes the sums to memory for it.
#pragma GCC unroll 4
        for (int t = 0; t < T; ++t) {
            const Scaling scaling = a.scaling(tile + t, group);
            const Floats base = broadcast(codes_.base) - scaling.zero;
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Floats factor = broadcast(x_.factor(row + r, index) * codes_.step());
                const Floats of_x = broadcast(x_.sum(row + r, index));
                const Floats value = fma(base, of_x, to_floats(sums[r * T + t]) * factor);
                total[r][t] = fma(scaling.scale, value, total[r][t]);
            }
        }
    }
};

}  // namespace nybble
