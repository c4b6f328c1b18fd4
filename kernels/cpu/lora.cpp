// Adds the LoRA terms of a batch; kernels/lora.py defines them and the shapes.
//
// Two passes over the adapted rows, grouped by adapter: h = a · x, then out += b · h. The
// order of the additions for one value does not depend on how many rows or outputs are computed at
// once, so a row's result does not depend on its batch.

#include <algorithm>
#include <vector>

#include "simd.h"
#include "status.h"

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

constexpr int kRows = 4;       // rows of x computed together
constexpr int kRanks = 8;      // ranks per work item of the shrink pass
constexpr int kOutputs = 512;  // outputs per work item of the expand pass

struct Args {
    bf16* out;             // (tokens, outputs)
    const bf16* x;         // (tokens, inputs)
    const bf16* a;         // (slots, parts * max_rank, inputs)
    const bf16* b;         // (slots, max_rank, outputs)
    const int32_t* order;  // the adapted rows
    float* h;              // (adapted rows, parts * max_rank)
    int64_t parts, max_rank, inputs, outputs;
};

// Up to kRows rows of one adapter.
struct Block {
    int64_t slot, first, count, rank;
};

// Computes h of R rows for N ranks, whose rows of `a` begin at `ranks`. The rows of `a` at `ahead`
// are prefetched, because they are needed next.
template <int R, int N>
void shrink(const Args& p, const Block& block, const bf16* const* ranks, const int64_t* at,
            const bf16* ahead) {
    const bf16* x[R];
    for (int r = 0; r < R; ++r) x[r] = p.x + p.order[block.first + r] * p.inputs;
    Floats total[R][N];
    for (auto& row : total)
        for (auto& value : row) value = zero();
    for (int64_t k = 0; k < p.inputs; k += 32) {
        Columns v[R];
        for (int r = 0; r < R; ++r) v[r] = load_columns(x[r] + k, p.inputs - k);
        for (int n = 0; n < N; ++n) {
            const Columns w = load_columns(ranks[n] + k, p.inputs - k);
            prefetch(ahead + n * p.inputs + k);
            for (int r = 0; r < R; ++r) total[r][n] = dot_add(v[r], w, total[r][n]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n)
            p.h[(block.first + r) * p.parts * p.max_rank + at[n]] = rounded(sum(total[r][n]));
}

// The row of `a` for the n-th rank of a block, with ranks counted through all parts.
const bf16* rank_row(const Args& p, const Block& block, int64_t n) {
    const int64_t row = block.slot * p.parts * p.max_rank + n / block.rank * p.max_rank;
    return p.a + (row + n % block.rank) * p.inputs;
}

template <int R>
void shrink_ranks(const Args& p, const Block& block, int64_t first, int64_t last,
                  const bf16* ahead) {
    constexpr int N = R == 1 ? kVectors : kVectors / 2;
    const bf16* ranks[N];
    int64_t at[N];
    auto locate = [&](int64_t n, int i) {
        at[i] = n / block.rank * p.max_rank + n % block.rank;
        ranks[i] = rank_row(p, block, n);
    };
    for (; first + N <= last; first += N) {
        for (int i = 0; i < N; ++i) locate(first + i, i);
        shrink<R, N>(p, block, ranks, at, first + N < last ? ranks[N - 1] + p.inputs : ahead);
    }
    for (; first < last; ++first) {
        locate(first, 0);
        shrink<R, 1>(p, block, ranks, at, ahead);
    }
}

// Adds to the 16 · T outputs from `first` on, for R rows. Only `count` of the last 16 exist.
template <int R, int T>
void expand(const Args& p, const Block& block, int64_t part, int64_t first, int64_t count) {
    const bf16* b = p.b + block.slot * p.max_rank * p.outputs + first;
    const float* h = p.h + (block.first * p.parts + part) * p.max_rank;
    Floats total[R][T];
    for (auto& row : total)
        for (auto& value : row) value = zero();
    for (int64_t rank = 0; rank < block.rank; ++rank, b += p.outputs) {
        for (int t = 0; t < T; ++t) {
            const Floats w = t + 1 < T ? load_bf16(b + 16 * t) : load_bf16_first(b + 16 * t, count);
            if (t % 2 == 0) prefetch(b + 16 * (T + t));
            for (int r = 0; r < R; ++r)
                total[r][t] = fma(w, broadcast(h[r * p.parts * p.max_rank + rank]), total[r][t]);
        }
    }
    for (int r = 0; r < R; ++r) {
        bf16* out = p.out + p.order[block.first + r] * p.outputs + first;
        for (int t = 0; t + 1 < T; ++t)
            store_bf16(out + 16 * t, load_bf16(out + 16 * t) + total[r][t]);
        bf16* last = out + 16 * (T - 1);
        store_bf16_first(last, load_bf16_first(last, count) + total[r][T - 1], count);
    }
}

template <int R>
void expand_outputs(const Args& p, const Block& block, int64_t part, int64_t first, int64_t last) {
    constexpr int T = R == 1 ? kVectors : kVectors / 2;
    for (; first + 16 * T <= last; first += 16 * T) expand<R, T>(p, block, part, first, 16);
    for (; first < last; first += 16)
        expand<R, 1>(p, block, part, first, std::min<int64_t>(16, last - first));
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

extern "C" int nybble_lora_add(bf16* out, const bf16* x, const bf16* a, const bf16* b,
                               const int32_t* ranks, const int32_t* order, const int32_t* starts,
                               const int32_t* slots, const int64_t* offsets, int64_t segments,
                               int64_t parts, int64_t max_rank, int64_t inputs, int threads) try {
    std::vector<float> h(starts[segments] * parts * max_rank);
    const Args p{out, x, a, b, order, h.data(), parts, max_rank, inputs, offsets[parts]};
    std::vector<Block> blocks;
    std::vector<Item> shrinks, expands;
    for (int64_t s = 0; s < segments; ++s) {
        const int64_t rank = ranks[slots[s]];
        if (rank == 0) continue;
        for (int64_t first = starts[s]; first < starts[s + 1]; first += kRows) {
            const int32_t index = static_cast<int32_t>(blocks.size());
            blocks.push_back({slots[s], first, std::min<int64_t>(kRows, starts[s + 1] - first), rank});
            for (int64_t n = 0; n < parts * rank; n += kRanks)
                shrinks.push_back({index, 0, n, std::min(n + kRanks, parts * rank)});
            for (int32_t part = 0; part < parts; ++part)
                for (int64_t o = offsets[part]; o < offsets[part + 1]; o += kOutputs)
                    expands.push_back({index, part, o, std::min(o + kOutputs, offsets[part + 1])});
        }
    }
    const int64_t shrink_count = static_cast<int64_t>(shrinks.size());
    const int64_t expand_count = static_cast<int64_t>(expands.size());
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < shrink_count; ++i) {
            const Item& item = shrinks[i];
            const Block& block = blocks[item.block];
            const Item& next = shrinks[std::min(i + 1, shrink_count - 1)];
            const bf16* ahead = rank_row(p, blocks[next.block], next.first);
            NYBBLE_BY_ROWS(shrink_ranks, p, block, item.first, item.last, ahead)
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < expand_count; ++i) {
            const Item& item = expands[i];
            const Block& block = blocks[item.block];
            NYBBLE_BY_ROWS(expand_outputs, p, block, item.part, item.first, item.last)
        }
    }
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
