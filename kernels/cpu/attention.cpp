// Causal attention over paged keys and values; kernels/reference.py defines it.

#include <omp.h>

#include <algorithm>
#include <vector>

#include "simd.h"
#include "status.h"

using namespace nybble;

// Two passes over the scores of one query row at a time: the queries that share a KV head go
// together, so each key and value is read once for them. Without a softcap it is 0, without sinks
// they are null.
extern "C" int nybble_paged_attention(const bf16* q, const bf16* k_cache, const bf16* v_cache,
                                      const int32_t* query_start, const int32_t* context_lens,
                                      const int32_t* block_tables, bf16* out, int64_t seqs,
                                      int64_t max_blocks, int64_t q_heads, int64_t kv_heads,
                                      int64_t dim, int64_t block_size, int64_t q_stride,
                                      float scale, int64_t window, float softcap,
                                      const float* sinks, int threads) try {
    const int64_t share = q_heads / kv_heads;
    const int64_t tokens = query_start[seqs];
    int64_t longest = 0;
    std::vector<int32_t> owner(tokens);
    for (int64_t s = 0; s < seqs; ++s) {
        longest = std::max<int64_t>(longest, context_lens[s]);
        for (int32_t t = query_start[s]; t < query_start[s + 1]; ++t)
            owner[t] = static_cast<int32_t>(s);
    }
    if (window > 0) longest = std::min<int64_t>(longest, window);
    const int64_t stride = (longest + 15) / 16 * 16, items = tokens * kv_heads;
    // Neighbouring items are the tokens of one KV head, whose keys stay in cache; but a few items
    // must still reach every thread.
    const int64_t chunk = std::clamp<int64_t>(items / (4 * threads), 1, 4);
    const auto all_buffers = buffers(threads, share * (stride + dim));
#pragma omp parallel num_threads(threads)
    {
        float* scores = all_buffers.get() + omp_get_thread_num() * share * (stride + dim);
        float* mixed = scores + share * stride;
#pragma omp for schedule(dynamic, chunk)
        for (int64_t item = 0; item < items; ++item) {
            const int64_t head = item / tokens, token = item % tokens, s = owner[token];
            const int64_t end = context_lens[s] - (query_start[s + 1] - query_start[s]) +
                                    (token - query_start[s]) + 1;
            const int64_t begin = window > 0 ? std::max<int64_t>(0, end - window) : 0;
            const int64_t visible = end - begin;
            bf16* target = out + (token * q_heads + head * share) * dim;
            if (visible <= 0) {  // a sequence without context, which only pads the batch
                std::memset(target, 0, share * dim * sizeof(bf16));
                continue;
            }
            const int32_t* table = block_tables + s * max_blocks;
            const bf16* queries = q + token * q_stride + head * share * dim;
            // Scores are those of keys from `begin` on; the first block may be entered in its middle.
            for (int64_t first = begin / block_size * block_size; first < end; first += block_size) {
                const bf16* keys =
                    k_cache + (table[first / block_size] * kv_heads + head) * block_size * dim;
                const int64_t count = std::min(block_size, end - first);
                for (int64_t j = std::max<int64_t>(0, begin - first); j < count; ++j)
                    for (int64_t h = 0; h < share; ++h)
                        scores[h * stride + first - begin + j] = dot(queries + h * dim, keys + j * dim, dim);
            }
            for (int64_t h = 0; h < share; ++h) {
                float* row = scores + h * stride;
                if (softcap > 0)
                    for (int64_t i = 0; i < visible; i += 16)
                        store(row + i, broadcast(softcap) * tanh(load(row + i) * broadcast(scale / softcap)));
                float top = row[0];
                for (int64_t i = 1; i < visible; ++i) top = std::max(top, row[i]);
                for (int64_t i = visible; i < (visible + 15) / 16 * 16; ++i) row[i] = top;
                Floats total = zero();
                const float by = softcap > 0 ? 1.0f : scale;
                const float highest = sinks ? std::max(top * by, sinks[head * share + h]) : top * by;
                const Floats factor = broadcast(by), peak = broadcast(highest);
                for (int64_t i = 0; i < visible; i += 16) {
                    const Floats e =
                        keep_first(exp(load(row + i) * factor - peak), visible - i);
                    store(row + i, e);
                    total = total + e;
                }
                const float sink = sinks ? std::exp(sinks[head * share + h] - highest) : 0.0f;
                const Floats inverse = broadcast(1.0f / (sum(total) + sink));
                for (int64_t i = 0; i < visible; i += 16) store(row + i, load(row + i) * inverse);
            }
            std::fill(mixed, mixed + share * dim, 0.0f);
            for (int64_t first = begin / block_size * block_size; first < end; first += block_size) {
                const bf16* values =
                    v_cache + (table[first / block_size] * kv_heads + head) * block_size * dim;
                const int64_t from = std::max<int64_t>(0, begin - first);
                const int64_t count = std::min(block_size, end - first);
                for (int64_t h = 0; h < share; ++h)
                    for (int64_t i = 0; i < dim; i += 16) {
                        Floats part = load(mixed + h * dim + i);
                        for (int64_t j = from; j < count; ++j)
                            part = fma(broadcast(scores[h * stride + first - begin + j]),
                                       load_bf16(values + j * dim + i), part);
                        store(mixed + h * dim + i, part);
                    }
            }
            for (int64_t i = 0; i < share * dim; i += 16)
                store_bf16(target + i, load(mixed + i));
        }
    }
    return kDone;
} catch (const std::exception&) {
    return kOutOfMemory;
}
