// The packed matmul's inner loops on AMX: a span's codes become tiles of bf16 in a buffer, once for all
// rows, and tiles of 16 rows are multiplied with them.

#pragma once

#include "matmul_bf16.h"
#include "status.h"
#include "threads.h"

namespace nybble {

// AMX's instructions are written as assembler by the compiler's headers, which do not say what memory
// they read. Behind this all that was stored is in memory.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// The shapes of the registers: sums in 0 to 3 and activations in 4 have as many rows as are multiplied
// at once, weights in 5 and 6 have 16; rows have 64 bytes.
class TileShapes {
 public:
    // Until the end of its scope, the registers are this thread's.
    ~TileShapes() { _tile_release(); }

    void set_rows(int64_t rows) {
        if (rows == rows_) return;
        rows_ = rows;
        alignas(64) Config config{};
        config.palette = 1;
        for (int i = 0; i < 7; ++i) {
            config.row_bytes[i] = 64;
            config.rows[i] = i < 5 ? static_cast<uint8_t>(rows) : 16;
        }
        finish_stores();
        _tile_loadconfig(&config);
    }

 private:
    struct Config {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    };
    static_assert(sizeof(Config) == 64);

    int64_t rows_ = 0;
};

// Results below the least normal float are zero, as in tdpbf16ps, until the end of its scope.
class FlushesToZero {
 public:
    FlushesToZero() { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
    ~FlushesToZero() { _mm_setcsr(before_); }

 private:
    const unsigned before_ = _mm_getcsr();
};

// Spans of at most 128 columns of one group are added up at a time: in one product of tiles for each step
// of 32 columns. A row's sums are the same in any tile.
template <class Codes>
class TileProduct {
 public:
    TileProduct(const PackedArgs& args, int threads)
        : a(args), decoder_(args.levels), spans_(spans_of(args, kSpanOctets)) {
        int64_t steps = 0;
        first_steps_.reserve(spans_.size());
        for (const Span& span : spans_) {
            first_steps_.push_back(steps);
            steps += steps_of(span);
        }
        x_ = buffers(1, steps * a.rows * 16);
        if (a.zeros) span_sums_.resize(spans_.size() * a.rows);
        parallel_for_small(a.rows, a.rows > 8 ? threads : 1, [&](int64_t row, int) {
            for (size_t s = 0; s < spans_.size(); ++s) take_row(row, s);
        });
    }

    int64_t buffer_size() const { return 2 * kWeights + kSums + kTiles * 16 * row_block(); }

    void tiles(int64_t tile, int64_t count, float* buffer) const {
        const FlushesToZero flushes;
        if (a.rows == 1) {
            if (count == 4) return one_row<4>(tile);
            for (int64_t t = 0; t < count; ++t) one_row<1>(tile + t);
            return;
        }
        TileShapes shapes;
        for (int64_t row = 0; row < a.rows; row += row_block()) {
            const int64_t rows = std::min(row_block(), a.rows - row);
            switch (count) {
                case 4: block<4>(row, rows, tile, buffer, shapes); break;
                case 3: block<3>(row, rows, tile, buffer, shapes); break;
                case 2: block<2>(row, rows, tile, buffer, shapes); break;
                default: block<1>(row, rows, tile, buffer, shapes);
            }
        }
    }

 private:
    static constexpr int64_t kTiles = 4, kSpanOctets = 16, kStepOctets = 4;
    // Of a buffer, in floats: a span's weights, and sums of 16 rows, of all tiles.
    static constexpr int64_t kWeights = kTiles * kSpanOctets * 64, kSums = kTiles * 16 * 16;

    const PackedArgs a;
    const Codes decoder_;
    const std::vector<Span> spans_;
    std::vector<int64_t> first_steps_;  // of the spans, among all steps
    Buffers x_;                     // bf16 (steps, rows, 32): what a step reads is in one piece
    std::vector<float> span_sums_;  // (spans, rows) sums of x, if there are zeros

    // Rows whose totals are kept at a time: they stay in the second cache.
    int64_t row_block() const { return std::min<int64_t>(a.rows, 128); }

    static int64_t steps_of(const Span& span) {
        return (span.octets + kStepOctets - 1) / kStepOctets;
    }

    bf16* step_of(int64_t step, int64_t row) const {
        return reinterpret_cast<bf16*>(x_.get()) + (step * a.rows + row) * 32;
    }

    // Columns of the last step behind the span's are zeros; so are subnormal numbers, which tdpbf16ps
    // takes for zeros.
    void take_row(int64_t row, size_t s) {
        const Span& span = spans_[s];
        const int64_t columns = span.octets * 8;
        const bf16* x = a.x + row * a.columns + span.first * 8;
        for (int64_t k = 0; k < columns; k += 32) {
            bf16* target = step_of(first_steps_[s] + k / 32, row);
            const int64_t some = std::min<int64_t>(32, columns - k);
            for (int64_t i = 0; i < some; ++i) target[i] = x[k + i] & 0x7F80 ? x[k + i] : 0;
            std::fill(target + some, target + 32, bf16{0});
        }
        if (a.zeros) span_sums_[s * a.rows + row] = sum_of(x, columns);
    }

    // Rows [row, row + rows) of tiles [tile, tile + T).
    template <int T>
    void block(int64_t row, int64_t rows, int64_t tile, float* buffer, TileShapes& shapes) const {
        float* const weights[2] = {buffer, buffer + kWeights};
        float* sums = buffer + 2 * kWeights;
        float* totals = sums + kSums;
        std::fill(totals, totals + rows * T * 16, 0.0f);
        const auto count = static_cast<int64_t>(spans_.size());
        unpack<T>(tile, spans_[0], weights[0]);
        for (int64_t s = 0; s < count; ++s) {
            const Span& span = spans_[s];
            Scaling scaling[T];
            for (int t = 0; t < T; ++t) scaling[t] = a.scaling(tile + t, span.group);
            for (int64_t r = 0; r < rows; r += 16) {
                const int64_t some = std::min<int64_t>(16, rows - r);
                shapes.set_rows(some);
                multiply<T>(row + r, s, weights[s % 2], sums);
                // Before the sums are waited for.
                if (r == 0 && s + 1 < count) unpack<T>(tile, spans_[s + 1], weights[(s + 1) % 2]);
                const float* of_x = a.zeros ? &span_sums_[s * a.rows + row + r] : nullptr;
                for (int64_t i = 0; i < some; ++i)
                    for (int t = 0; t < T; ++t) {
                        Floats sum = load(sums + (t * 16 + i) * 16);
                        if (of_x) sum = fnma(scaling[t].zero, broadcast(of_x[i]), sum);
                        float* total = totals + ((r + i) * T + t) * 16;
                        store(total, fma(scaling[t].scale, sum, load(total)));
                    }
            }
        }
        for (int64_t i = 0; i < rows; ++i)
            for (int t = 0; t < T; ++t)
                store_tile(a, row + i, tile + t, load(totals + (i * T + t) * 16));
    }

    // One row without tiles, for which weights would be written to memory and read again. The order of
    // the sums is that of tdpbf16ps: even and odd columns of a step apart, then both, then all.
    template <int T>
    void one_row(int64_t tile) const {
        Floats totals[T];
        for (auto& total : totals) total = zero();
        const int64_t digit = a.octets * 64;
        const __m512i evens = _mm512_set1_epi32(0xFFFF);
        for (size_t s = 0; s < spans_.size(); ++s) {
            const Span& span = spans_[s];
            const bf16* x = step_of(first_steps_[s], 0);  // the row's steps follow one another
            Floats sums[T];
            for (auto& sum : sums) sum = zero();
            for (int64_t first = 0; first < span.octets; first += kStepOctets) {
                __m512 even[T], odd[T];
                for (int t = 0; t < T; ++t) even[t] = odd[t] = _mm512_setzero_ps();
                const int64_t last = std::min(span.octets, first + kStepOctets);
                for (int64_t o = first; o < last; ++o) {
                    const int64_t octet = span.first + o;
                    const Prefetch<T, Codes::kDigits> fetch(octet, a.octets);
                    typename Codes::Octet packed[T];
                    for (int t = 0; t < T; ++t) {
                        const uint8_t* at_octet = a.codes_of(tile + t) + octet * 64;
                        packed[t] = decoder_.load(at_octet, digit);
                        fetch(at_octet);
                    }
                    add_pair<0, T>(packed, x + o * 8, evens, even, odd);
                    add_pair<1, T>(packed, x + o * 8, evens, even, odd);
                    add_pair<2, T>(packed, x + o * 8, evens, even, odd);
                    add_pair<3, T>(packed, x + o * 8, evens, even, odd);
                }
                for (int t = 0; t < T; ++t) sums[t] = sums[t] + (Floats{even[t]} + Floats{odd[t]});
            }
#pragma GCC unroll 4
            for (int t = 0; t < T; ++t) {
                const Scaling scaling = a.scaling(tile + t, span.group);
                if (a.zeros) sums[t] = fnma(scaling.zero, broadcast(span_sums_[s]), sums[t]);
                totals[t] = fma(scaling.scale, sums[t], totals[t]);
            }
        }
        for (int t = 0; t < T; ++t) store_tile(a, 0, tile + t, totals[t]);
    }

    template <int S, int T>
    void add_pair(const typename Codes::Octet (&packed)[T], const bf16* x, __m512i evens,
                  __m512 (&even)[T], __m512 (&odd)[T]) const {
        const __m512 first = _mm512_set1_ps(to_float(x[2 * S]));
        const __m512 second = _mm512_set1_ps(to_float(x[2 * S + 1]));
        for (int t = 0; t < T; ++t) {
            const auto w = reinterpret_cast<__m512i>(decoder_.template pair<S>(packed[t]));
            const __m512 lower = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
            const __m512 upper = _mm512_castsi512_ps(_mm512_andnot_si512(evens, w));
            even[t] = _mm512_fmadd_ps(lower, first, even[t]);
            odd[t] = _mm512_fmadd_ps(upper, second, odd[t]);
        }
    }

    // A span's weights: for each tile and each two columns the pairs of 16 outputs.
    template <int T>
    void unpack(int64_t tile, const Span& span, float* target) const {
        for (int t = 0; t < T; ++t) unpack_tile<T>(tile + t, span, target + t * steps_of(span) * 256);
    }

    template <int T>
    void unpack_tile(int64_t tile, const Span& span, float* target) const {
        const uint8_t* codes = a.codes_of(tile);
        const int64_t digit = a.octets * 64;
        const auto put = [&](__m512bh pairs) {
            _mm512_store_si512(target, reinterpret_cast<__m512i>(pairs));
            target += 16;
        };
        for (int64_t octet = span.first; octet < span.first + span.octets; ++octet) {
            const uint8_t* at_octet = codes + octet * 64;
            const Prefetch<T, Codes::kDigits> fetch(octet, a.octets);
            fetch(at_octet);
            const auto packed = decoder_.load(at_octet, digit);
            put(decoder_.template pair<0>(packed));
            put(decoder_.template pair<1>(packed));
            put(decoder_.template pair<2>(packed));
            put(decoder_.template pair<3>(packed));
        }
        const int64_t all = steps_of(span) * kStepOctets;
        std::fill(target, target + (all - span.octets) * 64, 0.0f);
    }

    // Products of as many rows as the registers have, from `row` on, with a span's weights.
    template <int T>
    void multiply(int64_t row, int64_t s, const float* weights, float* sums) const {
        const int64_t steps = steps_of(spans_[s]), tile = steps * 256;
        finish_stores();
        _tile_zero(0);
        if constexpr (T > 1) _tile_zero(1);
        if constexpr (T > 2) _tile_zero(2);
        if constexpr (T > 3) _tile_zero(3);
        for (int64_t step = 0; step < steps; ++step) {
            const float* w = weights + step * 256;
            _tile_loadd(4, step_of(first_steps_[s] + step, row), 64);
            _tile_loadd(5, w, 64);
            _tile_dpbf16ps(0, 4, 5);
            if constexpr (T > 1) {
                _tile_loadd(6, w + tile, 64);
                _tile_dpbf16ps(1, 4, 6);
            }
            if constexpr (T > 2) {
                _tile_loadd(5, w + 2 * tile, 64);
                _tile_dpbf16ps(2, 4, 5);
            }
            if constexpr (T > 3) {
                _tile_loadd(6, w + 3 * tile, 64);
                _tile_dpbf16ps(3, 4, 6);
            }
        }
        _tile_stored(0, sums, 64);
        if constexpr (T > 1) _tile_stored(1, sums + 256, 64);
        if constexpr (T > 2) _tile_stored(2, sums + 512, 64);
        if constexpr (T > 3) _tile_stored(3, sums + 768, 64);
    }
};

}  // namespace nybble
