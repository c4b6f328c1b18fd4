// Causal attention over paged keys and values; kernels/reference.py defines it.

#include <algorithm>
#include <iterator>
#include <numeric>
#include <type_traits>
#include <vector>

#include "eight.h"
#include "kernels.h"
#include "simd.h"
#include "status.h"
#include "threads.h"

using namespace nybble;

namespace {

// Keys whose scores are computed at once, one in each lane; and values converted at once.
constexpr int64_t kKeys = 16, kValues = 32;

// Query rows in a tile: each key and value is read and converted once for all of them. The scores
// of a tile should stay in the second-level cache.
constexpr int64_t kRows = 32, kScores = 1 << 18;

// So many rows' scores or values are added up at once, the values in so many vectors of each row, as
// keep the multipliers busy and have registers.
#if defined(__AVX512BW__)
constexpr int kScoreRows = 8, kMixRows = 4;
constexpr int mix_vectors(int) { return 4; }
#elif defined(__aarch64__)
constexpr int kScoreRows = 2, kMixRows = 4;
constexpr int mix_vectors(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#else
constexpr int kScoreRows = 3, kMixRows = 4;
constexpr int mix_vectors(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
#endif

// What a score is added up from: products of pairs of bf16 if the CPU has them, of floats if not.
// Keys and queries come in as many units; to move pairs about, they are taken for floats.
#if defined(__AVX512BF16__)
constexpr int64_t kElements = 2;
// Eight units of a key; int8 is exact in bf16.
inline Eight load_units(const bf16* source) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(source));
}
inline Eight load_units(const int8_t* source) {
    return _mm256_castsi256_ps(round_to_bf16(load_int8(source)));
}
inline void store_query(float* target, const bf16* query, int64_t dim) {
    std::memcpy(target, query, dim * sizeof(bf16));
}
inline Floats add_product(Floats a, Floats b, Floats c) {
    return {_mm512_dpbf16_ps(c.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
}
#else
constexpr int64_t kElements = 1;
inline Eight load_units(const bf16* source) { return load_eight(source); }
inline Eight load_units(const int8_t* source) { return load_eight(source); }
inline void store_query(float* target, const bf16* query, int64_t dim) {
    for (int64_t i = 0; i < dim; i += 16) store(target + i, load_bf16(query + i));
}
inline Floats add_product(Floats a, Floats b, Floats c) { return fma(a, b, c); }
#endif

// Sixteen elements of a value, times its scale if it has one.
inline Floats load_value(const bf16* source, const float*, int64_t) { return load_bf16(source); }
inline Floats load_value(const int8_t* source, const float* scales, int64_t row) {
    return load_int8(source) * broadcast(scales[row]);
}

struct Shape {
    int64_t dim, share, block_size, kv_heads;
};

// Query tokens of one sequence which go together, with what they may see.
struct Tile {
    int64_t seq, token, tokens;  // the first token, among those of the batch
    int64_t end;                 // of what the first token sees; each further one sees one more
    int64_t window;

    int64_t end_of(int64_t t) const { return end + t; }
    int64_t begin_of(int64_t t) const {
        return window > 0 ? std::max<int64_t>(0, end_of(t) - window) : 0;
    }
    int64_t begin() const { return begin_of(0); }
    int64_t last() const { return end_of(tokens - 1); }
    // The tokens that see any of the positions [from, to).
    int64_t first_seeing(int64_t from) const { return std::max<int64_t>(0, from - end + 1); }
    int64_t after_seeing(int64_t to) const {
        return window > 0 ? std::min(tokens, to - end + window) : tokens;
    }
};

// Where the cache has a KV head's keys or values for one tile; scales are null for bf16.
template <class Element>
struct Pages {
    const Element* cache;
    const float* scales;
    const int64_t* rows;  // of the positions from the tile's first on

    const int64_t* at(const Tile& tile, int64_t position) const {
        return rows + (position - tile.begin());
    }
};

// Steps look ahead by as many rows, and beyond the last position.
constexpr int64_t kBeyond = 2 * kValues;

// The numbers of the rows at the positions that a tile sees, and the last one again for kBeyond more.
void find_rows(const Shape& s, const Tile& tile, const int32_t* table, int64_t head, int64_t* rows) {
    const int64_t first = tile.begin(), count = tile.last() - first;
    int64_t block = first / s.block_size, offset = first % s.block_size;
    for (int64_t i = 0; i < count;) {
        const int64_t start = (table[block++] * s.kv_heads + head) * s.block_size;
        for (; offset < s.block_size && i < count; ++offset) rows[i++] = start + offset;
        offset = 0;
    }
    std::fill(rows + count, rows + count + kBeyond, rows[count - 1]);
}

// Scores of R rows with sixteen keys (units, 16), times their scales. The order of the additions does
// not depend on R, here and below, so that a token's result does not depend on its tile.
template <int R>
void score(const float* keys, Floats scales, int64_t units, const float* queries, float* scores,
           int64_t stride) {
    Floats even[R], odd[R];
    for (int r = 0; r < R; ++r) even[r] = odd[r] = zero();
    for (int64_t u = 0; u < units; u += 2) {
        const Floats first = load(keys + u * kKeys), second = load(keys + (u + 1) * kKeys);
        for (int r = 0; r < R; ++r) {
            even[r] = add_product(first, broadcast(queries[r * units + u]), even[r]);
            odd[r] = add_product(second, broadcast(queries[r * units + u + 1]), odd[r]);
        }
    }
    for (int r = 0; r < R; ++r) store(scores + r * stride, (even[r] + odd[r]) * scales);
}

template <class Element>
void score_tile(const Shape& s, const Tile& tile, const Pages<Element>& keys, const float* queries,
                float* scores, int64_t stride, float* columns) {
    const int64_t units = s.dim / kElements;
    for (int64_t start = tile.begin(); start < tile.last(); start += kKeys) {
        // Scores of keys beyond the last are not looked at.
        const int64_t *rows = keys.at(tile, start), *next = rows + kKeys;
        for (int64_t half = 0; half < kKeys; half += 8)
            for (int64_t u = 0; u < units; u += 8) {
                Eight eight[8];
                for (int64_t i = 0; i < 8; ++i) {
                    const int64_t at = u * kElements;
                    eight[i] = load_units(keys.cache + rows[half + i] * s.dim + at);
                    // Blocks lie apart in memory, which no CPU foresees.
                    prefetch(keys.cache + next[half + i] * s.dim + at);
                }
                transpose(eight, columns + u * kKeys + half, kKeys);
            }
        Floats scales = broadcast(1.0f);
        if (keys.scales) {
            float each[kKeys];
            for (int64_t i = 0; i < kKeys; ++i) each[i] = keys.scales[rows[i]];
            scales = load(each);
        }
        int64_t r = tile.first_seeing(start) * s.share;
        const int64_t end = tile.after_seeing(start + kKeys) * s.share;
        const auto some = [&](auto count) {
            constexpr int R = decltype(count)::value;
            for (; r + R <= end; r += R)
                score<R>(columns, scales, units, queries + r * units,
                            scores + r * stride + start - tile.begin(), stride);
        };
        some(std::integral_constant<int, kScoreRows>());
        some(std::integral_constant<int, 2>());
        some(std::integral_constant<int, 1>());
    }
}

// Logits to weights, of `count` keys; a sink is null or adds to the sum alone.
void softmax(float* row, int64_t count, float scale, float softcap, const float* sink) {
    if (softcap > 0)
        for (int64_t i = 0; i < count; i += 16)
            store(row + i,
                  broadcast(softcap) * tanh(load(row + i) * broadcast(scale / softcap)));
    for (int64_t i = count; i < (count + 15) / 16 * 16; ++i) row[i] = row[0];
    // If one operand is NaN, max returns the second: what is hidden here, exp does not hide.
    Floats most = broadcast(row[0]);
    for (int64_t i = 0; i < count; i += 16) most = max(load(row + i), most);
    float lanes[16];
    store(lanes, most);
    const float top = *std::max_element(lanes, lanes + 16);
    Floats total = zero();
    const float by = softcap > 0 ? 1.0f : scale;
    const float highest = sink ? std::max(top * by, *sink) : top * by;
    const Floats factor = broadcast(by), peak = broadcast(highest);
    for (int64_t i = 0; i < count; i += 16) {
        const Floats e = keep_first(exp(load(row + i) * factor - peak), count - i);
        store(row + i, e);
        total = total + e;
    }
    const float extra = sink ? std::exp(*sink - highest) : 0.0f;
    const Floats inverse = broadcast(1.0f / (sum(total) + extra));
    for (int64_t i = 0; i < count; i += 16) store(row + i, load(row + i) * inverse);
}

// Values of a step, converted before or when they are needed.
struct Converted {
    const float* values;  // (kValues, dim)
    int64_t dim;
    Floats at(int64_t j, int64_t i) const { return load(values + j * dim + i); }
};
template <class Element>
struct Stored {
    const Pages<Element>& pages;
    const int64_t* rows;
    int64_t dim;
    Floats at(int64_t j, int64_t i) const {
        return load_value(pages.cache + rows[j] * dim + i, pages.scales, rows[j]);
    }
};

// Adds values [from, to), by their weights, to V vectors, from element `at` on, of R rows of `mixed`.
template <int R, int V, class Values>
void mix(const Values& values, int64_t at, int64_t from, int64_t to, const float* weights,
         int64_t stride, float* mixed, int64_t dim) {
    mixed += at;
    Floats sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = load(mixed + r * dim + 16 * v);
    for (int64_t j = from; j < to; ++j) {
        Floats value[V];
        for (int v = 0; v < V; ++v) value[v] = values.at(j, at + 16 * v);
        for (int r = 0; r < R; ++r) {
            const Floats weight = broadcast(weights[r * stride + j]);
            for (int v = 0; v < V; ++v) sums[r][v] = fma(weight, value[v], sums[r][v]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(mixed + r * dim + 16 * v, sums[r][v]);
}

template <int R, class Values>
void mix_rows(const Values& values, int64_t from, int64_t to, const float* weights, int64_t stride,
              float* mixed, int64_t dim) {
    if (from >= to) return;
    constexpr int V = mix_vectors(R);
    int64_t i = 0;
    for (; i + 16 * V <= dim; i += 16 * V)
        mix<R, V>(values, i, from, to, weights, stride, mixed, dim);
    for (; i < dim; i += 16) mix<R, 1>(values, i, from, to, weights, stride, mixed, dim);
}

// Adds the values at positions [start, start + count) to the rows of a tile that see them.
template <class Values>
void mix_values(const Shape& s, const Tile& tile, int64_t start, int64_t count,
                const Values& values, const float* weights, int64_t stride, float* mixed) {
    weights += start - tile.begin();
    const auto from = [&](int64_t r) {
        return std::max<int64_t>(0, tile.begin_of(r / s.share) - start);
    };
    const auto to = [&](int64_t r) { return std::min(count, tile.end_of(r / s.share) - start); };
    const auto one = [&](int64_t r, int64_t first, int64_t end) {
        mix_rows<1>(values, first, end, weights + r * stride, stride, mixed + r * s.dim, s.dim);
    };
    int64_t r = tile.first_seeing(start) * s.share;
    const int64_t end = tile.after_seeing(start + count) * s.share;
    const auto some = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        for (; r + R <= end; r += R) {
            // What all of them see goes together; a row adds up its values in order all the same.
            const int64_t last = r + R - 1;
            const int64_t first = from(last), until = std::max(first, to(r));
            for (int64_t i = r; i < last; ++i) one(i, from(i), std::min(first, to(i)));
            mix_rows<R>(values, first, until, weights + r * stride, stride, mixed + r * s.dim, s.dim);
            for (int64_t i = r + 1; i <= last; ++i) one(i, until, to(i));
        }
    };
    some(std::integral_constant<int, kMixRows>());
    some(std::integral_constant<int, 3>());
    some(std::integral_constant<int, 2>());
    some(std::integral_constant<int, 1>());
}

template <class Element>
void mix_tile(const Shape& s, const Tile& tile, const Pages<Element>& pages, const float* weights,
              int64_t stride, float* mixed, float* converted) {
    for (int64_t start = tile.begin(); start < tile.last(); start += kValues) {
        const int64_t count = std::min(kValues, tile.last() - start);
        const int64_t *rows = pages.at(tile, start), *next = rows + kValues;
        const Stored<Element> stored{pages, rows, s.dim};
        const bool once = tile.tokens * s.share <= kMixRows;
        for (int64_t j = 0; j < count; ++j)
            for (int64_t i = 0; i < s.dim; i += 16) {
                prefetch(pages.cache + next[j] * s.dim + i);
                if (!once) store(converted + j * s.dim + i, stored.at(j, i));
            }
        if (once)
            mix_values(s, tile, start, count, stored, weights, stride, mixed);
        else
            mix_values(s, tile, start, count, Converted{converted, s.dim}, weights, stride, mixed);
    }
}

struct Attention {
    const bf16* q;
    const void *k_cache, *v_cache;
    const float *k_scales, *v_scales;  // null for bf16
    const int32_t *query_start, *context_lens, *block_tables;
    bf16* out;
    int64_t seqs, max_blocks, q_heads, kv_heads, dim, block_size, q_stride;
    float scale;
    int64_t window;
    float softcap;
    const float* sinks;
    int threads;
};

template <class Element>
void attend(const Attention& a) {
    const Shape s{a.dim, a.q_heads / a.kv_heads, a.block_size, a.kv_heads};
    int64_t longest = 0;
    for (int64_t i = 0; i < a.seqs; ++i) longest = std::max<int64_t>(longest, a.context_lens[i]);
    if (a.window > 0) longest = std::min(longest, a.window + kRows);  // of all tokens of a tile
    const int64_t stride = (longest + 15) / 16 * 16 + 16;  // scores come in whole vectors
    // As many tokens to a tile as its buffers allow, but some items for every thread.
    int64_t each = std::clamp<int64_t>(std::min(kScores / stride, kRows) / s.share, 1, kRows);
    while (each > 1 && a.query_start[a.seqs] * a.kv_heads / each < 4 * a.threads) each /= 2;
    std::vector<Tile> tiles;
    for (int64_t i = 0; i < a.seqs; ++i) {
        const int64_t end = a.query_start[i + 1];
        for (int64_t token = a.query_start[i]; token < end; token += each)
            tiles.push_back({i, token, std::min(each, end - token),
                             a.context_lens[i] - end + token + 1, a.window});
    }
    const int64_t rows = each * s.share, units = s.dim / kElements;
    const int64_t places = (stride + kBeyond) * int64_t(sizeof(int64_t) / sizeof(float));
    const int64_t parts[] = {places, rows * stride, rows * s.dim, kValues * s.dim, kKeys * units,
                             rows * units};
    const int64_t size = std::accumulate(std::begin(parts), std::end(parts), int64_t{0});
    const int64_t rounded = (size + 15) / 16 * 16;
    const auto all_buffers = buffers(a.threads, rounded);
    // Neighbouring items are the tiles of one KV head, whose keys stay in cache.
    const auto count = static_cast<int64_t>(tiles.size()), items = count * s.kv_heads;
    parallel_for(items, a.threads, [&](int64_t item, int thread) {
        float* buffer = all_buffers.get() + thread * rounded;
        auto* in_cache = reinterpret_cast<int64_t*>(buffer);
        float* scores = buffer + parts[0];
        float* mixed = scores + parts[1];
        float* values = mixed + parts[2];
        float* columns = values + parts[3];
        float* queries = columns + parts[4];
        const Tile& tile = tiles[item % count];
        const int64_t head = item / count, tile_rows = tile.tokens * s.share;
        const auto place = [&](int64_t r) { return head * s.share + r % s.share; };
        const auto target = [&](int64_t r) {
            return a.out + ((tile.token + r / s.share) * a.q_heads + place(r)) * s.dim;
        };
        if (tile.last() <= 0) {  // a sequence without context, which only pads the batch
            for (int64_t r = 0; r < tile_rows; ++r)
                std::memset(target(r), 0, s.dim * sizeof(bf16));
            return;
        }
        for (int64_t r = 0; r < tile_rows; ++r)
            store_query(queries + r * units,
                        a.q + (tile.token + r / s.share) * a.q_stride + place(r) * s.dim,
                        s.dim);
        find_rows(s, tile, a.block_tables + tile.seq * a.max_blocks, head, in_cache);
        const Pages<Element> keys{static_cast<const Element*>(a.k_cache), a.k_scales, in_cache};
        score_tile(s, tile, keys, queries, scores, stride, columns);
        for (int64_t r = 0; r < tile_rows; ++r) {
            const int64_t t = r / s.share, begin = tile.begin_of(t);
            softmax(scores + r * stride + begin - tile.begin(), tile.end_of(t) - begin, a.scale,
                    a.softcap, a.sinks ? a.sinks + place(r) : nullptr);
        }
        std::fill(mixed, mixed + tile_rows * s.dim, 0.0f);
        const Pages<Element> pages{static_cast<const Element*>(a.v_cache), a.v_scales, in_cache};
        mix_tile(s, tile, pages, scores, stride, mixed, values);
        for (int64_t r = 0; r < tile_rows; ++r)
            for (int64_t i = 0; i < s.dim; i += 16)
                store_bf16(target(r) + i, load(mixed + r * s.dim + i));
    });
}

}  // namespace

// The queries that share a KV head, of some neighbouring tokens, go together. Caches are int8 if
// there are scales. Without a softcap it is 0, without sinks they are null.
extern "C" int nybble_paged_attention(const bf16* q, const void* k_cache, const void* v_cache,
                                      const float* k_scales, const float* v_scales,
                                      const int32_t* query_start, const int32_t* context_lens,
                                      const int32_t* block_tables, bf16* out, int64_t seqs,
                                      int64_t max_blocks, int64_t q_heads, int64_t kv_heads,
                                      int64_t dim, int64_t block_size, int64_t q_stride,
                                      float scale, int64_t window, float softcap,
                                      const float* sinks, int threads) try {
    const Attention a{q,        k_cache,  v_cache, k_scales,   v_scales,   query_start,
                      context_lens, block_tables, out, seqs, max_blocks, q_heads,
                      kv_heads, dim,      block_size, q_stride, scale, window,
                      softcap,  sinks,    threads};
    if (k_scales)
        attend<int8_t>(a);
    else
        attend<bf16>(a);
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
