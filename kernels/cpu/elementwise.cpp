// Norms, the gated activation, and rotary with the cache write; kernels/reference.py defines them.

#include "simd.h"

using namespace nybble;

extern "C" {

// normed = rms_norm(x + residual) · weight; residual (may be null) is updated in place to the sum.
void nybble_rms_norm(const bf16* x, bf16* residual, const bf16* weight, bf16* out, int64_t rows,
                     int64_t width, float eps) {
    for (int64_t r = 0; r < rows; ++r) {
        const bf16* row = x + r * width;
        if (residual) {
            bf16* total = residual + r * width;
            for (int64_t i = 0; i < width; i += 16)
                store_bf16(total + i, load_bf16(row + i) + load_bf16(total + i));
            row = total;
        }
        Floats squares = zero();
        for (int64_t i = 0; i < width; i += 16) {
            const Floats v = load_bf16(row + i);
            squares = fma(v, v, squares);
        }
        const Floats inverse = broadcast(1.0f / std::sqrt(sum(squares) / width + eps));
        for (int64_t i = 0; i < width; i += 16) {
            bf16* target = out + r * width + i;
            store_bf16(target, load_bf16(row + i) * inverse);
            store_bf16(target, load_bf16(target) * load_bf16(weight + i));
        }
    }
}

// silu(gate) · up.
void nybble_silu_mul(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > 8)
    for (int64_t r = 0; r < rows; ++r) {
        const bf16 *gate = gate_up + r * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += 16) {
            const Floats g = load_bf16(gate + i);
            bf16* target = out + r * width + i;
            // The activation is rounded before the product, as two separate operations would.
            store_bf16(target, g / (broadcast(1.0f) + exp(zero() - g)));
            store_bf16(target, load_bf16(target) * load_bf16(up + i));
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
            const Floats low = load_bf16(in + i), high = load_bf16(in + half + i);
            store_bf16(out + i, fnma(high, load(s + i), low * load(c + i)));
            store_bf16(out + half + i, fma(low, load(s + half + i), high * load(c + half + i)));
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

}  // extern "C"
