// The functions that Python calls and that kernels call of each other.

#pragma once

#include "simd.h"

extern "C" {

int nybble_packed_matmul(const nybble::bf16* x, const uint8_t* codes, const void* scales,
                         const void* zeros, const float* levels, const float* bias,
                         nybble::bf16* out, int64_t rows, int64_t outputs, int64_t columns,
                         int64_t groups, int64_t octets_per_group, int scale_type, int digits,
                         int activation_bits, int threads);

void nybble_rms_norm(const nybble::bf16* x, nybble::bf16* residual, const nybble::bf16* weight,
                     nybble::bf16* out, int64_t rows, int64_t width, float eps, float offset,
                     int rounded_once);

void nybble_gated(const nybble::bf16* gate_up, nybble::bf16* out, int64_t rows, int64_t width,
                  int activation, int threads);

void nybble_rotary_store(nybble::bf16* q, const nybble::bf16* k, const nybble::bf16* v,
                         const float* cos, const float* sin, void* k_cache, void* v_cache,
                         float* k_scales, float* v_scales, nybble::bf16* scratch,
                         const int64_t* slots, int64_t tokens, int64_t q_heads, int64_t kv_heads,
                         int64_t dim, int64_t rotary_dim, int64_t block_size, int64_t q_stride,
                         int64_t k_stride, int64_t v_stride, int interleaved);

int nybble_paged_attention(const nybble::bf16* q, const void* k_cache, const void* v_cache,
                           const float* k_scales, const float* v_scales,
                           const int32_t* query_start, const int32_t* context_lens,
                           const int32_t* block_tables, nybble::bf16* out, int64_t seqs,
                           int64_t max_blocks, int64_t q_heads, int64_t kv_heads, int64_t dim,
                           int64_t block_size, int64_t q_stride, float scale, int64_t window,
                           float softcap, const float* sinks, int threads);

int nybble_lora_add(nybble::bf16* out, const nybble::bf16* x, const int64_t* a, const int64_t* b,
                    const int64_t* ranks, const int64_t* scales, const int32_t* order,
                    const int32_t* starts, const int32_t* slots, const int64_t* offsets,
                    int64_t segments, int64_t parts, int64_t inputs, int threads);

void nybble_router_logits(const void* x, const float* weight, const float* bias, float* out,
                          int64_t rows, int64_t inputs, int64_t outputs, int is_bf16, int threads);

int nybble_choose_experts(const float* logits, const float* correction, int64_t* ids,
                          float* weights, int64_t rows, int64_t experts, int64_t top_k,
                          int scoring, int renormalize, float least_sum, float scaling_factor,
                          int64_t groups, int64_t topk_groups, int by_two_best, int threads);

int nybble_grouped_matmul(const nybble::bf16* x, const void* experts, const float* levels,
                          const int64_t* ids, const float* weights, nybble::bf16* out,
                          int64_t rows, int64_t top_k, int64_t x_per_expert, int64_t count,
                          int64_t inputs, int64_t outputs, int64_t columns, int64_t groups,
                          int64_t octets_per_group, int scale_type, int activation_bits,
                          int threads);
}
