// Low-rank additions for AVX-512 with BF16: see kernels/lora.py for what is computed and the shapes.
//
// Two passes over the adapted rows, those of one adapter together: h = a · x, then out += b · h. The
// order of the additions for one value does not depend on how many rows or outputs are computed at
// once, so a row's result does not depend on its batch.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;

inline __m512 widen(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline float rounded(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u;  // to bf16, nearest even
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

constexpr int kRows = 4;       // rows of x computed together
constexpr int kRanks = 8;      // ranks of one shrinking item
constexpr int kOutputs = 512;  // outputs of one expanding item

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

// h of R rows for N ranks whose rows of `a` begin at `ranks`.
template <int R, int N>
void shrink(const Args& p, const Block& block, const bf16* const* ranks, const int64_t* at) {
    const bf16* x[R];
    for (int r = 0; r < R; ++r) x[r] = p.x + p.order[block.first + r] * p.inputs;
    __m512 sum[R][N];
    for (auto& row : sum)
        for (auto& value : row) value = _mm512_setzero_ps();
    for (int64_t k = 0; k < p.inputs; k += 32) {
        const __mmask32 mask =
            p.inputs - k >= 32 ? ~0u : (1u << (p.inputs - k)) - 1;
        __m512bh v[R];
        for (int r = 0; r < R; ++r)
            v[r] = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, x[r] + k));
        for (int n = 0; n < N; ++n) {
            const __m512bh w = reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, ranks[n] + k));
            for (int r = 0; r < R; ++r) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], v[r], w);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n)
            p.h[(block.first + r) * p.parts * p.max_rank + at[n]] = rounded(_mm512_reduce_add_ps(sum[r][n]));
}

template <int R>
void shrink_ranks(const Args& p, const Block& block, int64_t first, int64_t last) {
    constexpr int N = R == 1 ? kRanks : kRanks / 2;
    const bf16* slot = p.a + block.slot * p.parts * p.max_rank * p.inputs;
    const bf16* ranks[N];
    int64_t at[N];
    auto locate = [&](int64_t n, int i) {
        at[i] = n / block.rank * p.max_rank + n % block.rank;
        ranks[i] = slot + at[i] * p.inputs;
    };
    for (; first + N <= last; first += N) {
        for (int i = 0; i < N; ++i) locate(first + i, i);
        shrink<R, N>(p, block, ranks, at);
    }
    for (; first < last; ++first) {
        locate(first, 0);
        shrink<R, 1>(p, block, ranks, at);
    }
}

// out of R rows for the 16 · T outputs from `first` on, the last of them masked.
template <int R, int T>
void expand(const Args& p, const Block& block, int64_t part, int64_t first, __mmask16 mask) {
    const bf16* b = p.b + block.slot * p.max_rank * p.outputs + first;
    const float* h = p.h + (block.first * p.parts + part) * p.max_rank;
    __m512 sum[R][T];
    for (auto& row : sum)
        for (auto& value : row) value = _mm512_setzero_ps();
    for (int64_t rank = 0; rank < block.rank; ++rank, b += p.outputs) {
        for (int t = 0; t < T; ++t) {
            const __m256i halves =
                t + 1 < T ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 16 * t))
                          : _mm256_maskz_loadu_epi16(mask, b + 16 * t);
            const __m512 w = widen(halves);
            for (int r = 0; r < R; ++r) {
                const __m512 scale = _mm512_set1_ps(h[r * p.parts * p.max_rank + rank]);
                sum[r][t] = _mm512_fmadd_ps(w, scale, sum[r][t]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        bf16* out = p.out + p.order[block.first + r] * p.outputs + first;
        for (int t = 0; t < T; ++t) {
            const __mmask16 valid = t + 1 < T ? static_cast<__mmask16>(0xFFFF) : mask;
            const __m512 before = widen(_mm256_maskz_loadu_epi16(valid, out + 16 * t));
            _mm256_mask_storeu_epi16(
                out + 16 * t, valid,
                reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_add_ps(before, sum[r][t]))));
        }
    }
}

template <int R>
void expand_outputs(const Args& p, const Block& block, int64_t part, int64_t first, int64_t last) {
    constexpr int T = R == 1 ? 8 : 4;
    for (; first + 16 * T <= last; first += 16 * T) expand<R, T>(p, block, part, first, 0xFFFF);
    for (; first < last; first += 16) {
        const int64_t left = last - first;
        expand<R, 1>(p, block, part, first,
                     static_cast<__mmask16>(left >= 16 ? 0xFFFF : (1u << left) - 1));
    }
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

extern "C" void nybble_lora_add(bf16* out, const bf16* x, const bf16* a, const bf16* b,
                                const int32_t* ranks, const int32_t* order, const int32_t* starts,
                                const int32_t* slots, const int64_t* offsets, int64_t segments,
                                int64_t parts, int64_t max_rank, int64_t inputs, int threads) {
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
            NYBBLE_BY_ROWS(shrink_ranks, p, block, item.first, item.last)
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < expand_count; ++i) {
            const Item& item = expands[i];
            const Block& block = blocks[item.block];
            NYBBLE_BY_ROWS(expand_outputs, p, block, item.part, item.first, item.last)
        }
    }
}
