// CPU kernels for AVX-512 with BF16. Plain C ABI; every array is contiguous unless a stride is given.
// Arithmetic: bf16 in and out, products of bf16 pairs accumulated in fp32.
//
// What each function computes is defined by kernels/reference.py, the tiled layout by
// kernels/layout.py.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

using bf16 = uint16_t;

inline float to_float(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

inline bf16 to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits += 0x7FFF + (bits >> 16 & 1);  // round to nearest even
    return static_cast<bf16>(bits >> 16);
}

inline __m512 load_bf16(const bf16* source) {
    __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

inline void store_bf16(bf16* target, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

// How scales and zeros are stored; the Python side passes the number.
enum ScaleType { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

inline __m512 load_scales(const void* base, int64_t index, int type) {
    switch (type) {
        case kFloat16:
            return _mm512_cvtph_ps(_mm256_loadu_si256(
                reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(base) + index)));
        case kBFloat16:
            return load_bf16(static_cast<const bf16*>(base) + index);
        default:
            return _mm512_loadu_ps(static_cast<const float*>(base) + index);
    }
}

struct PackedArgs {
    const bf16* x;           // (rows, columns), columns padded to a multiple of 8 with zeros
    const float* group_sums; // (rows, groups) sums of x, where there are zeros
    const uint8_t* codes;    // (tiles, octets, 64)
    const void* scales;      // (tiles, groups, 16)
    const void* zeros;       // as scales, or null
    const float* bias;       // (tiles * 16) or null
    bf16* out;               // (rows, outputs)
    int64_t rows, outputs, columns, octets, groups, octets_per_group;
    int scale_type;
    __m512i levels;          // 16 bf16 levels, twice
};

// Rows [row, row + R) of tiles [tile, tile + T). The order of the additions for one output does not
// depend on R or T, so a row's result does not depend on the batch it is computed in.
template <int R, int T>
void packed_block(const PackedArgs& a, int64_t row, int64_t tile) {
    __m512 total[R][T];
    for (auto& r : total)
        for (auto& t : r) t = _mm512_setzero_ps();
    const uint8_t* codes[T];
    for (int t = 0; t < T; ++t) codes[t] = a.codes + (tile + t) * a.octets * 64;
    const bf16* x = a.x + row * a.columns;

    for (int64_t group = 0; group < a.groups; ++group) {
        __m512 sum[R][T];
        for (auto& r : sum)
            for (auto& t : r) t = _mm512_setzero_ps();
        const int64_t first = group * a.octets_per_group;
        const int64_t last = std::min(a.octets, first + a.octets_per_group);
        for (int64_t octet = first; octet < last; ++octet) {
            __m512i packed[T];
            for (int t = 0; t < T; ++t) {
                packed[t] = _mm512_loadu_si512(codes[t] + octet * 64);
                // Far enough ahead to cover memory latency at one cache line per octet.
                if (R <= 4) _mm_prefetch(reinterpret_cast<const char*>(codes[t] + octet * 64 + 1536), _MM_HINT_T0);
            }
#define NYBBLE_PAIR(s)                                                                          \
    {                                                                                           \
        __m512bh w[T];                                                                          \
        for (int t = 0; t < T; ++t)                                                             \
            w[t] = reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(                         \
                s ? _mm512_srli_epi32(packed[t], 4 * (s)) : packed[t], a.levels));              \
        for (int r = 0; r < R; ++r) {                                                           \
            int32_t pair;                                                                       \
            std::memcpy(&pair, x + r * a.columns + octet * 8 + 2 * (s), sizeof pair);           \
            __m512bh v = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));                   \
            for (int t = 0; t < T; ++t) sum[r][t] = _mm512_dpbf16_ps(sum[r][t], w[t], v);       \
        }                                                                                       \
    }
            NYBBLE_PAIR(0)
            NYBBLE_PAIR(1)
            NYBBLE_PAIR(2)
            NYBBLE_PAIR(3)
#undef NYBBLE_PAIR
        }
        for (int t = 0; t < T; ++t) {
            const int64_t at = ((tile + t) * a.groups + group) * 16;
            const __m512 scale = load_scales(a.scales, at, a.scale_type);
            if (a.zeros) {
                const __m512 zero = load_scales(a.zeros, at, a.scale_type);
                for (int r = 0; r < R; ++r) {
                    __m512 xs = _mm512_set1_ps(a.group_sums[(row + r) * a.groups + group]);
                    sum[r][t] = _mm512_fnmadd_ps(zero, xs, sum[r][t]);
                }
            }
            for (int r = 0; r < R; ++r) total[r][t] = _mm512_fmadd_ps(scale, sum[r][t], total[r][t]);
        }
    }
    for (int t = 0; t < T; ++t) {
        const int64_t first = (tile + t) * 16;
        const int64_t count = std::min<int64_t>(16, a.outputs - first);
        const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
        for (int r = 0; r < R; ++r) {
            __m512 value = total[r][t];
            if (a.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, a.bias + first));
            _mm256_mask_storeu_epi16(a.out + (row + r) * a.outputs + first, mask,
                                     reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
        }
    }
}

template <int R>
void packed_rows(const PackedArgs& a, int64_t row, int64_t tile, int64_t tiles) {
    constexpr int T = R <= 2 ? 4 : 2;
    int64_t t = 0;
    for (; t + T <= tiles; t += T) packed_block<R, T>(a, row, tile + t);
    for (; t < tiles; ++t) packed_block<R, 1>(a, row, tile + t);
}

void packed_tiles(const PackedArgs& a, int64_t tile, int64_t tiles) {
    int64_t row = 0;
    for (; row + 10 <= a.rows; row += 10) packed_rows<10>(a, row, tile, tiles);
    switch (a.rows - row) {
        case 9: packed_rows<9>(a, row, tile, tiles); break;
        case 8: packed_rows<8>(a, row, tile, tiles); break;
        case 7: packed_rows<7>(a, row, tile, tiles); break;
        case 6: packed_rows<6>(a, row, tile, tiles); break;
        case 5: packed_rows<5>(a, row, tile, tiles); break;
        case 4: packed_rows<4>(a, row, tile, tiles); break;
        case 3: packed_rows<3>(a, row, tile, tiles); break;
        case 2: packed_rows<2>(a, row, tile, tiles); break;
        case 1: packed_rows<1>(a, row, tile, tiles); break;
        default: break;
    }
}

// One key against the queries that share its KV head: dot products of `dim` bf16 (a multiple of 32).
inline float dot_bf16(const bf16* a, const bf16* b, int64_t dim) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < dim; i += 32)
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(a + i)),
                               reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + i)));
    return _mm512_reduce_add_ps(sum);
}

}  // namespace

extern "C" {

// out = x · Wᵀ + bias. Work is shared out in chunks of 4 tiles (64 outputs).
void nybble_packed_matmul(const bf16* x, const uint8_t* codes, const void* scales,
                          const void* zeros, const float* levels, const float* bias, bf16* out,
                          int64_t rows, int64_t outputs, int64_t columns, int64_t groups,
                          int64_t octets_per_group, int scale_type, int threads) {
    PackedArgs a{x, nullptr, codes, scales, zeros, bias, out, rows, outputs, columns, columns / 8,
                 groups, octets_per_group, scale_type, _mm512_setzero_si512()};
    alignas(64) bf16 table[32];
    for (int i = 0; i < 32; ++i) table[i] = to_bf16(levels[i & 15]);
    a.levels = _mm512_load_si512(table);
    std::vector<float> sums;
    if (zeros) {
        sums.resize(rows * groups);
        const int64_t width = octets_per_group * 8;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t end = std::min(columns, (g + 1) * width);
                __m512 sum = _mm512_setzero_ps();
                int64_t k = g * width;
                for (; k + 16 <= end; k += 16) sum = _mm512_add_ps(sum, load_bf16(x + r * columns + k));
                float rest = _mm512_reduce_add_ps(sum);
                for (; k < end; ++k) rest += to_float(x[r * columns + k]);
                sums[r * groups + g] = rest;
            }
        a.group_sums = sums.data();
    }
    const int64_t tiles = (outputs + 15) / 16;
    constexpr int64_t kChunk = 4;
    const int64_t chunks = (tiles + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
        packed_tiles(a, chunk * kChunk, std::min(kChunk, tiles - chunk * kChunk));
}

// normed = rms_norm(x + residual) · weight; residual (may be null) is updated in place to the sum.
void nybble_rms_norm(const bf16* x, bf16* residual, const bf16* weight, bf16* out, int64_t rows,
                     int64_t width, float eps) {
    for (int64_t r = 0; r < rows; ++r) {
        const bf16* row = x + r * width;
        if (residual) {
            bf16* sum = residual + r * width;
            for (int64_t i = 0; i < width; i += 16)
                store_bf16(sum + i, _mm512_add_ps(load_bf16(row + i), load_bf16(sum + i)));
            row = sum;
        }
        __m512 squares = _mm512_setzero_ps();
        for (int64_t i = 0; i < width; i += 16) {
            __m512 v = load_bf16(row + i);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        const __m512 inverse =
            _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps));
        for (int64_t i = 0; i < width; i += 16) {
            bf16* target = out + r * width + i;
            store_bf16(target, _mm512_mul_ps(load_bf16(row + i), inverse));
            store_bf16(target, _mm512_mul_ps(load_bf16(target), load_bf16(weight + i)));
        }
    }
}

// silu(gate) · up. exp by Cephes' polynomial after reduction by powers of two.
static inline __m512 exp_ps(__m512 x) {
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

void nybble_silu_mul(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 8)
    for (int64_t r = 0; r < rows; ++r) {
        const bf16 *gate = gate_up + r * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += 16) {
            const __m512 g = load_bf16(gate + i);
            const __m512 one = _mm512_set1_ps(1.0f);
            const __m512 e = exp_ps(_mm512_sub_ps(_mm512_setzero_ps(), g));
            bf16* target = out + r * width + i;
            // The activation is rounded before the product, as two separate operations would.
            store_bf16(target, _mm512_div_ps(g, _mm512_add_ps(one, e)));
            store_bf16(target, _mm512_mul_ps(load_bf16(target), load_bf16(up + i)));
        }
    }
}

// Rotates q in place and stores rotated k and v. Row strides are in elements.
void nybble_rotary_store(bf16* q, const bf16* k, const bf16* v, const float* cos, const float* sin,
                         bf16* k_cache, bf16* v_cache, const int64_t* slots, int64_t tokens,
                         int64_t q_heads, int64_t kv_heads, int64_t dim, int64_t block_size,
                         int64_t q_stride, int64_t k_stride, int64_t v_stride) {
    const int64_t half = dim / 2;
    auto rotate = [&](const bf16* in, bf16* out, const float* c, const float* s) {
        for (int64_t i = 0; i < half; i += 16) {
            const __m512 low = load_bf16(in + i), high = load_bf16(in + half + i);
            const __m512 a = _mm512_fnmadd_ps(high, _mm512_loadu_ps(s + i),
                                              _mm512_mul_ps(low, _mm512_loadu_ps(c + i)));
            const __m512 b = _mm512_fmadd_ps(low, _mm512_loadu_ps(s + half + i),
                                             _mm512_mul_ps(high, _mm512_loadu_ps(c + half + i)));
            store_bf16(out + i, a);
            store_bf16(out + half + i, b);
        }
    };
    for (int64_t t = 0; t < tokens; ++t) {
        const float *c = cos + t * dim, *s = sin + t * dim;
        for (int64_t h = 0; h < q_heads; ++h) {
            bf16* head = q + t * q_stride + h * dim;
            rotate(head, head, c, s);
        }
        if (slots[t] < 0) continue;
        const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t at = ((block * kv_heads + h) * block_size + offset) * dim;
            rotate(k + t * k_stride + h * dim, k_cache + at, c, s);
            std::memcpy(v_cache + at, v + t * v_stride + h * dim, dim * sizeof(bf16));
        }
    }
}

// Causal attention over paged keys and values, two passes over the scores of one query row at a
// time: the queries that share a KV head go together, so each key and value is read once for them.
void nybble_paged_attention(const bf16* q, const bf16* k_cache, const bf16* v_cache,
                            const int32_t* query_start, const int32_t* context_lens,
                            const int32_t* block_tables, bf16* out, int64_t seqs,
                            int64_t max_blocks, int64_t q_heads, int64_t kv_heads, int64_t dim,
                            int64_t block_size, int64_t q_stride, float scale, int threads) {
    const int64_t share = q_heads / kv_heads;
    const int64_t tokens = query_start[seqs];
    int32_t longest = 0;
    std::vector<int32_t> owner(tokens);
    for (int64_t s = 0; s < seqs; ++s) {
        longest = std::max(longest, context_lens[s]);
        for (int32_t t = query_start[s]; t < query_start[s + 1]; ++t) owner[t] = static_cast<int32_t>(s);
    }
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(share * ((longest + 15) / 16 * 16));
        std::vector<float> sum(share * dim);
        const int64_t stride = (longest + 15) / 16 * 16;
#pragma omp for schedule(dynamic, 4)
        for (int64_t item = 0; item < tokens * kv_heads; ++item) {
            // Neighbouring items are the tokens of one KV head: its keys stay in cache.
            const int64_t head = item / tokens, token = item % tokens, s = owner[token];
            const int64_t visible =
                context_lens[s] - (query_start[s + 1] - query_start[s]) + (token - query_start[s]) + 1;
            const int32_t* table = block_tables + s * max_blocks;
            const bf16* queries = q + token * q_stride + head * share * dim;
            for (int64_t first = 0; first < visible; first += block_size) {
                const bf16* keys =
                    k_cache + (table[first / block_size] * kv_heads + head) * block_size * dim;
                const int64_t count = std::min(block_size, visible - first);
                for (int64_t j = 0; j < count; ++j)
                    for (int64_t h = 0; h < share; ++h)
                        scores[h * stride + first + j] = dot_bf16(queries + h * dim, keys + j * dim, dim);
            }
            for (int64_t h = 0; h < share; ++h) {
                float* row = scores.data() + h * stride;
                float top = row[0];
                for (int64_t i = 1; i < visible; ++i) top = std::max(top, row[i]);
                for (int64_t i = visible; i < (visible + 15) / 16 * 16; ++i) row[i] = -INFINITY;
                __m512 total = _mm512_setzero_ps();
                const __m512 factor = _mm512_set1_ps(scale), peak = _mm512_set1_ps(top * scale);
                for (int64_t i = 0; i < visible; i += 16) {
                    const __mmask16 mask = static_cast<__mmask16>(
                        visible - i >= 16 ? 0xFFFF : (1u << (visible - i)) - 1);
                    const __m512 e = _mm512_maskz_mov_ps(
                        mask, exp_ps(_mm512_fmsub_ps(_mm512_loadu_ps(row + i), factor, peak)));
                    _mm512_storeu_ps(row + i, e);
                    total = _mm512_add_ps(total, e);
                }
                const float inverse = 1.0f / _mm512_reduce_add_ps(total);
                for (int64_t i = 0; i < visible; i += 16)
                    _mm512_storeu_ps(row + i,
                                     _mm512_mul_ps(_mm512_loadu_ps(row + i), _mm512_set1_ps(inverse)));
            }
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t first = 0; first < visible; first += block_size) {
                const bf16* values =
                    v_cache + (table[first / block_size] * kv_heads + head) * block_size * dim;
                const int64_t count = std::min(block_size, visible - first);
                for (int64_t h = 0; h < share; ++h)
                    for (int64_t i = 0; i < dim; i += 16) {
                        __m512 part = _mm512_loadu_ps(sum.data() + h * dim + i);
                        for (int64_t j = 0; j < count; ++j)
                            part = _mm512_fmadd_ps(_mm512_set1_ps(scores[h * stride + first + j]),
                                                   load_bf16(values + j * dim + i), part);
                        _mm512_storeu_ps(sum.data() + h * dim + i, part);
                    }
            }
            bf16* target = out + (token * q_heads + head * share) * dim;
            for (int64_t i = 0; i < share * dim; i += 16)
                store_bf16(target + i, _mm512_loadu_ps(sum.data() + i));
        }
    }
}

}  // extern "C"
