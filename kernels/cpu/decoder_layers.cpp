// Whole decoder layers (kernels/decoder_layer.py) in one call: between the kernels of a decode step
// Python would take as long as some of them do.

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "status.h"

using namespace nybble;

namespace {

// kernels/cpu/decoder_layers.py has the same fields in the same order.

struct Norm {
    const bf16* weight;  // null for no norm
    float eps, offset;
    int32_t rounded_once;
};

struct Weight {
    const uint8_t* codes;
    const void *scales, *zeros;
    const float *levels, *bias;
    const int32_t* perm;  // or null
    int64_t inputs, outputs, columns, groups, octets_per_group;
    int32_t scale_type, digits;
};

// One of the two linear layers of all experts.
struct Experts {
    const void* addresses;
    const float* levels;
    int64_t inputs, outputs, columns, groups, octets_per_group, scale_type;
};

struct Mixture {
    const float *router, *router_bias, *correction;  // the latter two may be null
    int64_t count, top_k, groups, topk_groups;       // 0 experts: the layer is no mixture
    int32_t scoring, renormalize, by_two_best, activation;
    float least_sum, scaling_factor;
    Experts up, down;
};

struct Layer {
    Norm attention_norm, q_norm, k_norm, post_attention_norm, mlp_norm, post_mlp_norm;
    Weight qkv, output, gate_up, down;  // the latter two of a mixture are its shared expert's
    Mixture mixture;
    const float* sinks;
    int64_t heads, kv_heads, dim, window;
    float scale, softcap;
    int32_t interleaved, activation;
};

// Of one layer in one step. Each field has 8 bytes.
struct Inputs {
    const float *cos, *sin;
    int64_t rotary_dim;
    void *k_cache, *v_cache;
    float *k_scales, *v_scales;  // null for bf16
    int64_t block_size;
    const int32_t *query_start, *context_lens, *block_tables;
    const int64_t* slots;
    int64_t seqs, max_blocks;
};

// The adapters on one projection; kernels/lora.py defines them. Each field has 8 bytes.
struct Adapters {
    const int64_t *a, *b, *ranks, *scales, *offsets;
    int64_t parts;
};

// Of one layer.
struct LayerAdapters {
    Adapters qkv, output, gate_up, down;
};

// Which rows of a step use which adapter; no segments if none does.
struct Adapted {
    const int32_t *order, *starts, *slots;
    int64_t segments;
};

// Memory for `count` rows that the layers use in turn.
class Rows {
   public:
    Rows(int64_t count, int64_t width) : data_(new bf16[count * width]) {}
    operator bf16*() const { return data_.get(); }

   private:
    std::unique_ptr<bf16[]> data_;
};

struct Run {
    int64_t tokens, hidden;
    int activation_bits, threads;
    Adapted adapted;
    Rows normed, qkv, attended, gate_up, gated, permuted, head, shared;
    std::vector<float> logits, weights;
    std::vector<int64_t> chosen;
    int status = kDone;

    // Does nothing once memory was missing.
    void multiply(const Weight& w, const Adapters& adapters, const bf16* x, bf16* out) {
        if (status != kDone) return;
        const bf16* given = x;
        if (w.perm) {
            for (int64_t row = 0; row < tokens; ++row)
                for (int64_t k = 0; k < w.columns; ++k)
                    permuted[row * w.columns + k] = x[row * w.inputs + w.perm[k]];
            x = permuted;
        }
        status = nybble_packed_matmul(x, w.codes, w.scales, w.zeros, w.levels, w.bias, out, tokens,
                                      w.outputs, w.columns, w.groups, w.octets_per_group,
                                      w.scale_type, w.digits, activation_bits, threads);
        if (status == kDone && adapted.segments)
            status = nybble_lora_add(out, given, adapters.a, adapters.b, adapters.ranks,
                                     adapters.scales, adapted.order, adapted.starts, adapted.slots,
                                     adapters.offsets, adapted.segments, adapters.parts, w.inputs,
                                     threads);
    }

    // What is added is null or belongs to the residual first.
    void norm(const Norm& n, const bf16* added, bf16* residual, bf16* out) const {
        nybble_rms_norm(added ? added : residual, added ? residual : nullptr, n.weight, out, tokens,
                        hidden, n.eps, n.offset, n.rounded_once);
    }

    void norm_in_place(const Norm& n, bf16* x, int64_t rows, int64_t width) const {
        if (n.weight)
            nybble_rms_norm(x, nullptr, n.weight, x, rows, width, n.eps, n.offset, n.rounded_once);
    }

    // Of the rows that are normed.
    void mlp(const Layer& l, const LayerAdapters& own, bf16* out) {
        multiply(l.gate_up, own.gate_up, normed, gate_up);
        nybble_gated(gate_up, gated, tokens, l.gate_up.outputs / 2, l.activation, threads);
        multiply(l.down, own.down, gated, out);
    }

    void multiply(const Mixture& m, const Experts& e, const bf16* x, const float* factors,
                  bool x_per_expert, bf16* out) {
        if (status == kDone)
            status = nybble_grouped_matmul(
                x, e.addresses, e.levels, chosen.data(), factors, out, tokens, m.top_k,
                x_per_expert, m.count, e.inputs, e.outputs, e.columns, e.groups,
                e.octets_per_group, static_cast<int>(e.scale_type), activation_bits, threads);
    }

    // Of the rows that are normed.
    void mixture(const Mixture& m, bf16* out) {
        nybble_router_logits(normed, m.router, m.router_bias, logits.data(), tokens, hidden,
                             m.count, 1, threads);
        if (status == kDone)
            status = nybble_choose_experts(logits.data(), m.correction, chosen.data(),
                                           weights.data(), tokens, m.count, m.top_k, m.scoring,
                                           m.renormalize, m.least_sum, m.scaling_factor, m.groups,
                                           m.topk_groups, m.by_two_best, threads);
        multiply(m, m.up, normed, nullptr, false, gate_up);
        nybble_gated(gate_up, gated, tokens * m.top_k, m.up.outputs / 2, m.activation, threads);
        multiply(m, m.down, gated, weights.data(), true, out);
    }

    // out += x, each sum rounded once.
    void add(const bf16* x, bf16* out) const {
        for (int64_t i = 0; i < tokens * hidden; i += 16)
            store_bf16(out + i, load_bf16(out + i) + load_bf16(x + i));
    }

    // `added` and `out` may be the same.
    void layer(const Layer& l, const Inputs& in, const LayerAdapters& own, const bf16* added,
               bf16* residual, bf16* out) {
        norm(l.attention_norm, added, residual, normed);
        multiply(l.qkv, own.qkv, normed, qkv);
        const int64_t stride = l.qkv.outputs;
        bf16 *q = qkv, *k = q + l.heads * l.dim, *v = k + l.kv_heads * l.dim;
        for (int64_t row = 0; row < tokens; ++row) {
            norm_in_place(l.q_norm, q + row * stride, l.heads, l.dim);
            norm_in_place(l.k_norm, k + row * stride, l.kv_heads, l.dim);
        }
        nybble_rotary_store(q, k, v, in.cos, in.sin, in.k_cache, in.v_cache, in.k_scales,
                            in.v_scales, head, in.slots, tokens, l.heads, l.kv_heads, l.dim,
                            in.rotary_dim, in.block_size, stride, stride, stride, l.interleaved);
        if (status == kDone)
            status = nybble_paged_attention(
                q, in.k_cache, in.v_cache, in.k_scales, in.v_scales, in.query_start,
                in.context_lens, in.block_tables, attended, in.seqs, in.max_blocks, l.heads,
                l.kv_heads, l.dim, in.block_size, stride, l.scale, l.window, l.softcap, l.sinks,
                threads);
        multiply(l.output, own.output, attended, out);
        norm_in_place(l.post_attention_norm, out, tokens, hidden);
        norm(l.mlp_norm, out, residual, normed);
        if (l.mixture.count) {
            mixture(l.mixture, out);
            if (l.gate_up.codes) {
                mlp(l, own, shared);
                add(shared, out);
            }
        } else {
            mlp(l, own, out);
        }
        norm_in_place(l.post_mlp_norm, out, tokens, hidden);
    }
};

}  // namespace

// residual and out are (tokens, hidden). What the last layer adds is left in `out`; `added` is null
// or is added to the residual first. Without segments no row has an adapter, and `adapters` is not
// read.
extern "C" int nybble_decoder_layers(const void* layers, const void* inputs, int64_t count,
                                     const bf16* added, bf16* residual, bf16* out, int64_t tokens,
                                     int64_t hidden, const void* adapters, const int32_t* order,
                                     const int32_t* starts, const int32_t* slots, int64_t segments,
                                     int activation_bits, int threads) try {
    const auto* all = static_cast<const Layer*>(layers);
    const auto* steps = static_cast<const Inputs*>(inputs);
    int64_t qkv = 0, heads = 0, gate_up = 0, permuted = 0, dim = 0;
    int64_t shared = 0, experts = 0, top_k = 0;
    for (const Layer* l = all; l < all + count; ++l) {
        qkv = std::max(qkv, l->qkv.outputs);
        heads = std::max(heads, l->heads * l->dim);
        gate_up = std::max({gate_up, l->gate_up.outputs, l->mixture.top_k * l->mixture.up.outputs});
        dim = std::max(dim, l->dim);
        if (l->mixture.count && l->gate_up.codes) shared = hidden;
        experts = std::max(experts, l->mixture.count);
        top_k = std::max(top_k, l->mixture.top_k);
        for (const Weight* w : {&l->qkv, &l->output, &l->gate_up, &l->down})
            if (w->perm) permuted = std::max(permuted, w->columns);
    }
    Run run{tokens,
            hidden,
            activation_bits,
            threads,
            {order, starts, slots, segments},
            {tokens, hidden},
            {tokens, qkv},
            {tokens, heads},
            {tokens, gate_up},
            {tokens, gate_up / 2},
            {tokens, permuted},
            {1, dim},
            {tokens, shared},
            std::vector<float>(tokens * experts),
            std::vector<float>(tokens * top_k),
            std::vector<int64_t>(tokens * top_k)};
    const auto* of_layers = static_cast<const LayerAdapters*>(adapters);
    for (int64_t i = 0; i < count; ++i) {
        run.layer(all[i], steps[i], segments ? of_layers[i] : LayerAdapters{}, added, residual, out);
        added = out;
    }
    return run.status;
} catch (const std::exception&) {
    return kOutOfMemory;
}
