// Adds the LoRA terms of a batch; kernels/lora.py defines them and the shapes.
//
// Two passes over the adapted rows, grouped by adapter: h = a · x, then out += b · h. The
// order of the additions for one value does not depend on how many rows or outputs are computed at
// once, so a row's result does not depend on its batch.
//
// Matrices in 8 bits are widened as they are read: all that is different is how many bytes are read,
// and the scales of their rows.

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

namespace {

inline float rounded(float value) { return to_float(to_bf16(value)); }

#if defined(__AVX512BF16__)

constexpr int kVectors = 8;  // accumulators that fit in registers beside the operands

using Columns = __m512bh;  // 32 columns
inline Columns load_columns(const bf16* source, int64_t count) {
    const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
    return reinterpret_cast<Columns>(_mm512_maskz_loadu_epi16(mask, source));
}
inline Columns load_columns(const int8_t* source, int64_t count) {
    const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1;
    const __m256i codes = _mm256_maskz_loadu_epi8(mask, source);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    return _mm512_cvtne2ps_pbh(high, low);  // exact: bfloat16 has every integer up to 256
}
inline Floats dot_add(Columns a, Columns b, Floats c) { return {_mm512_dpbf16_ps(c.v, a, b)}; }

inline Floats load_bf16_first(const bf16* source, int64_t count) {
    const __m256i halves = _mm256_maskz_loadu_epi16(first_lanes(count), source);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16))};
}

#else

constexpr int kVectors = 4;

struct Columns {
    Floats low, high;
};
inline Columns load_columns(const bf16* source, int64_t count) {
    bf16 padded[32] = {};
    if (count < 32) {
        std::memcpy(padded, source, count * sizeof(bf16));
        source = padded;
    }
    return {load_bf16(source), load_bf16(source + 16)};
}
inline Columns load_columns(const int8_t* source, int64_t count) {
    int8_t padded[32] = {};
    if (count < 32) {
        std::memcpy(padded, source, count);
        source = padded;
    }
    return {load_int8(source), load_int8(source + 16)};
}
inline Floats dot_add(Columns a, Columns b, Floats c) {
    return fma(a.high, b.high, fma(a.low, b.low, c));
}

inline Floats load_bf16_first(const bf16* source, int64_t count) {
    if (count >= 16) return load_bf16(source);
    bf16 padded[16] = {};
    std::memcpy(padded, source, count * sizeof(bf16));
    return load_bf16(padded);
}

#endif

inline Floats load_some(const bf16* source, int64_t count) {
    return count >= 16 ? load_bf16(source) : load_bf16_first(source, count);
}
inline Floats load_some(const int8_t* source, int64_t count) {
    if (count >= 16) return load_int8(source);
    int8_t padded[16] = {};
    std::memcpy(padded, source, count);
    return load_int8(padded);
}

constexpr int kRows = 4;       // rows of x computed together
constexpr int kRanks = 8;      // ranks per work item of the shrink pass
constexpr int kOutputs = 512;  // outputs per work item of the expand pass

struct Args {
    bf16* out;               // (tokens, outputs)
    const bf16* x;           // (tokens, inputs)
    const int64_t* a;        // (slots, parts), addresses of (rank, inputs)
    const int64_t* b;        // (slots, parts), addresses of (rank, outputs of the part)
    const int64_t* ranks;    // (slots, parts)
    const int64_t* scales;   // (slots, parts), addresses of (2, rank); 0 for bf16
    const int32_t* order;    // the adapted rows
    const int64_t* offsets;  // where each part's outputs begin, then their number
    float* h;                // of each block (rows, ranks of all parts)
    int64_t parts, inputs;
};

// Up to kRows rows of one adapter.
struct Block {
    int64_t slot, first, count;
    int64_t ranks;  // of all parts together
    int64_t h;      // where its part of h begins
    bool int8;      // whether its matrices are in 8 bits
};

// A row of `a`, and the scales of it and of the row of `b` with the same number.
template <typename Weight>
struct Rank {
    const Weight* a;
    float a_scale, b_scale;
};

// Computes h of R rows for N ranks, of which the first is number `at`. The rows of `a` at `ahead` are
// prefetched, because they are needed next.
template <int R, int N, typename Weight>
void shrink(const Args& p, const Block& block, const Rank<Weight>* ranks, int64_t at,
            const Weight* ahead) {
    const bf16* x[R];
    for (int r = 0; r < R; ++r) x[r] = p.x + p.order[block.first + r] * p.inputs;
    Floats total[R][N];
    for (auto& row : total)
        for (auto& value : row) value = zero();
    for (int64_t k = 0; k < p.inputs; k += 32) {
        Columns v[R];
        for (int r = 0; r < R; ++r) v[r] = load_columns(x[r] + k, p.inputs - k);
        for (int n = 0; n < N; ++n) {
            const Columns w = load_columns(ranks[n].a + k, p.inputs - k);
            prefetch(ahead + n * p.inputs + k);
            for (int r = 0; r < R; ++r) total[r][n] = dot_add(v[r], w, total[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n)
            p.h[block.h + r * block.ranks + at + n] =
                rounded(sum(total[r][n]) * ranks[n].a_scale) * ranks[n].b_scale;
}

// The n-th rank of a block, with ranks counted through all parts.
template <typename Weight>
Rank<Weight> rank_of(const Args& p, const Block& block, int64_t n) {
    const int64_t* ranks = p.ranks + block.slot * p.parts;
    int64_t part = 0;
    for (; n >= ranks[part]; ++part) n -= ranks[part];
    const int64_t at = block.slot * p.parts + part;
    const auto* a = reinterpret_cast<const Weight*>(p.a[at]) + n * p.inputs;
    if (!p.scales[at]) return {a, 1, 1};
    const auto* scales = reinterpret_cast<const float*>(p.scales[at]);
    return {a, scales[n], scales[ranks[part] + n]};
}

template <int R, int N, typename Weight>
void shrink_next(const Args& p, const Block& block, int64_t& first, int64_t last,
                 const Weight* ahead) {
    Rank<Weight> ranks[N];
    for (; first + N <= last; first += N) {
        for (int i = 0; i < N; ++i) ranks[i] = rank_of<Weight>(p, block, first + i);
        shrink<R, N>(p, block, ranks, first,
                     first + N < last ? ranks[N - 1].a + p.inputs : ahead);
    }
}

template <int R, typename Weight>
void shrink_some(const Args& p, const Block& block, int64_t first, int64_t last,
                 const Block& next, int64_t next_first) {
    const Weight* ahead = rank_of<Weight>(p, next, next_first).a;
    if (R == 1) shrink_next<R, kVectors>(p, block, first, last, ahead);
    shrink_next<R, kVectors / 2>(p, block, first, last, ahead);
    shrink_next<R, 1>(p, block, first, last, ahead);
}

// `next` and its rank number `next_first` are needed after this one's.
template <int R>
void shrink_ranks(const Args& p, const Block& block, int64_t first, int64_t last,
                  const Block& next, int64_t next_first) {
    if (block.int8)
        shrink_some<R, int8_t>(p, block, first, last, next, next_first);
    else
        shrink_some<R, bf16>(p, block, first, last, next, next_first);
}

// What one part of a block adds: its `b`, and where its h and its outputs begin.
struct Part {
    int64_t b;  // address of (rank, outputs)
    int64_t rank, h, offset, outputs;
};

Part part_of(const Args& p, const Block& block, int64_t part) {
    const int64_t* ranks = p.ranks + block.slot * p.parts;
    int64_t h = block.h;
    for (int64_t before = 0; before < part; ++before) h += ranks[before];
    return {p.b[block.slot * p.parts + part], ranks[part], h, p.offsets[part],
            p.offsets[part + 1] - p.offsets[part]};
}

// Adds K ranks of a part to `count` outputs of R rows, whose sums so far are `total`. The next K
// ranks are prefetched: what is read of each is short.
template <int R, int K, typename Weight>
void add_ranks(const Weight* b, int64_t outputs, const float* h, int64_t ranks, int64_t count,
               float (*total)[kOutputs]) {
    for (int64_t o = 0; o < count; o += 16) {
        Floats w[K];
        for (int k = 0; k < K; ++k) {
            const Weight* from = b + k * outputs + o;
            w[k] = load_some(from, count - o);
            if (o % 32 == 0) prefetch(from + K * outputs);
        }
        for (int r = 0; r < R; ++r) {
            Floats value = load(total[r] + o);
            for (int k = 0; k < K; ++k) value = fma(w[k], broadcast(h[r * ranks + k]), value);
            store(total[r] + o, value);
        }
    }
}

// Adds to the outputs of a part from `first` to `last`, at most kOutputs, for R rows.
template <int R, typename Weight>
void expand_some(const Args& p, const Block& block, const Part& part, int64_t first,
                    int64_t last) {
    constexpr int K = 4;
    const int64_t count = last - first;
    alignas(64) float total[R][kOutputs] = {};
    const Weight* b = reinterpret_cast<const Weight*>(part.b) + first;
    const float* h = p.h + part.h;
    int64_t rank = 0;
    for (; rank + K <= part.rank; rank += K)
        add_ranks<R, K>(b + rank * part.outputs, part.outputs, h + rank, block.ranks, count, total);
    for (; rank < part.rank; ++rank)
        add_ranks<R, 1>(b + rank * part.outputs, part.outputs, h + rank, block.ranks, count, total);
    for (int r = 0; r < R; ++r) {
        const int64_t row = p.order[block.first + r] * p.offsets[p.parts];
        bf16* out = p.out + row + part.offset + first;
        for (int64_t o = 0; o < count; o += 16) {
            const Floats value = load(total[r] + o);
            if (count - o >= 16)
                store_bf16(out + o, load_bf16(out + o) + value);
            else
                store_bf16_first(out + o, load_bf16_first(out + o, count - o) + value, count - o);
        }
    }
}

template <int R>
void expand_outputs(const Args& p, const Block& block, const Part& part, int64_t first,
                    int64_t last) {
    if (block.int8)
        expand_some<R, int8_t>(p, block, part, first, last);
    else
        expand_some<R, bf16>(p, block, part, first, last);
}

struct Item {
    int32_t block, part;
    int64_t first, last;
};

#define NYBBLE_BY_ROWS(function, ...)         \
    switch (block.count) {                    \
        case 1: function<1>(__VA_ARGS__); break; \
        case 2: function<2>(__VA_ARGS__); break; \
        case 3: function<3>(__VA_ARGS__); break; \
        default: function<4>(__VA_ARGS__);    \
    }

}  // namespace

extern "C" int nybble_lora_add(bf16* out, const bf16* x, const int64_t* a, const int64_t* b,
                               const int64_t* ranks, const int64_t* scales,
                               const int32_t* order, const int32_t* starts, const int32_t* slots,
                               const int64_t* offsets, int64_t segments, int64_t parts,
                               int64_t inputs, int threads) try {
    std::vector<Block> blocks;
    std::vector<Item> shrinks, expands;
    int64_t h_size = 0;
    for (int64_t s = 0; s < segments; ++s) {
        if (starts[s] == starts[s + 1]) continue;
        const int64_t* own = ranks + slots[s] * parts;
        int64_t all = 0;
        bool int8 = false;
        for (int64_t part = 0; part < parts; ++part) {
            all += own[part];
            int8 |= own[part] && scales[slots[s] * parts + part];
        }
        if (all == 0) continue;
        for (int64_t first = starts[s]; first < starts[s + 1]; first += kRows) {
            const int32_t index = static_cast<int32_t>(blocks.size());
            const int64_t count = std::min<int64_t>(kRows, starts[s + 1] - first);
            blocks.push_back({slots[s], first, count, all, h_size, int8});
            h_size += count * all;
            for (int64_t n = 0; n < all; n += kRanks)
                shrinks.push_back({index, 0, n, std::min(n + kRanks, all)});
            for (int32_t part = 0; part < parts; ++part) {
                if (own[part] == 0) continue;
                const int64_t outputs = offsets[part + 1] - offsets[part];
                for (int64_t o = 0; o < outputs; o += kOutputs)
                    expands.push_back({index, part, o, std::min(o + kOutputs, outputs)});
            }
        }
    }
    std::vector<float> h(h_size);
    const Args p{out, x, a, b, ranks, scales, order, offsets, h.data(), parts, inputs};
    const int64_t shrink_count = static_cast<int64_t>(shrinks.size());
    const int64_t expand_count = static_cast<int64_t>(expands.size());
    parallel_for_small(shrink_count, threads, [&](int64_t i, int) {
        const Item& item = shrinks[i];
        const Block& block = blocks[item.block];
        const Item& next = shrinks[std::min(i + 1, shrink_count - 1)];
        NYBBLE_BY_ROWS(shrink_ranks, p, block, item.first, item.last, blocks[next.block],
                       next.first)
    });
    parallel_for_small(expand_count, threads, [&](int64_t i, int) {
        const Item& item = expands[i];
        const Block& block = blocks[item.block];
        const Part part = part_of(p, block, item.part);
        NYBBLE_BY_ROWS(expand_outputs, p, block, part, item.first, item.last)
    });
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
