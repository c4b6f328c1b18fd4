// Norms, the gated activation, and rotary with the cache write; kernels/reference.py defines them.

#include <algorithm>

#include "kernels.h"
#include "simd.h"
#include "threads.h"

using namespace nybble;

namespace {

// In the order of kernels/activation.py.
enum Activation : int { kSilu, kGelu, kGeluTanh, kRelu2 };

Floats logistic_product(Floats x, Floats power) { return x / (broadcast(1.0f) + exp(power)); }

constexpr auto silu = [](Floats x) { return logistic_product(x, zero() - x); };

// (1 + tanh(u)) / 2 is 1 / (1 + e⁻²ᵘ), for u = √(2/π) · (x + 0.044715 · x³).
constexpr auto gelu_tanh = [](Floats x) {
    const Floats inner = fma(x * x, broadcast(0.044715f), broadcast(1.0f));
    return logistic_product(x, x * broadcast(-1.5957691216f) * inner);
};

// x · Φ(x) is max(x, 0) − |x| · Φ(−|x|). Φ(−z√2) by Abramowitz and Stegun's 7.1.26, whose error
// is below 10⁻⁷.
constexpr auto gelu = [](Floats x) {
    // Beyond 16 the second term is 0, and infinity times 0 would be NaN.
    const Floats size = min(max(x, zero() - x), broadcast(16.0f));
    const Floats z = size * broadcast(0.70710678f);
    const Floats t = broadcast(1.0f) / fma(z, broadcast(0.3275911f), broadcast(1.0f));
    Floats p = broadcast(1.061405429f);
    p = fma(p, t, broadcast(-1.453152027f));
    p = fma(p, t, broadcast(1.421413741f));
    p = fma(p, t, broadcast(-0.284496736f));
    p = fma(p, t, broadcast(0.254829592f));
    const Floats tail = p * t * exp(zero() - z * z) * broadcast(0.5f);
    return fnma(size, tail, max(zero(), x));
};

// If one operand is NaN, max returns the second.
constexpr auto relu2 = [](Floats x) {
    const Floats positive = max(zero(), x);
    return positive * positive;
};

template <typename Function>
void gated(Function activation, const bf16* gate_up, bf16* out, int64_t rows, int64_t width,
           int threads) {
    parallel_for(rows, threads, rows > 8, [=](int64_t r) {
        const bf16 *gate = gate_up + r * 2 * width, *up = gate + width;
        for (int64_t i = 0; i < width; i += 16) {
            bf16* target = out + r * width + i;
            // The activation is rounded to bf16 before the product, as in the reference.
            store_bf16(target, activation(load_bf16(gate + i)));
            store_bf16(target, load_bf16(target) * load_bf16(up + i));
        }
    });
}

// One head of one token in 8 bits; its scale is the largest magnitude over 127. If that is not
// finite, neither is the scale, and the elements are 0.
void store_int8(const bf16* x, int64_t dim, int8_t* target, float* scale) {
    uint16_t top = 0;
    for (int64_t i = 0; i < dim; ++i) top = std::max<uint16_t>(top, x[i] & 0x7FFF);
    const float peak = to_float(top);
    *scale = peak / 127;
    const float inverse = 1 / peak * 127;  // in this order, as the reference
    const float by = std::isfinite(inverse) ? inverse : 0;
    for (int64_t i = 0; i < dim; ++i) {
        const float value = by > 0 ? to_float(x[i]) * by : 0;
        target[i] = static_cast<int8_t>(std::floor(value + 0.5f));
    }
}

}  // namespace

extern "C" {

// out = rms_norm(x + residual) · (offset + weight). If residual is not null, it is replaced by the
// sum. Unless the result is rounded once, the norm is rounded before the product, without an offset.
void nybble_rms_norm(const bf16* x, bf16* residual, const bf16* weight, bf16* out, int64_t rows,
                     int64_t width, float eps, float offset, int rounded_once) {
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
        bf16* target = out + r * width;
        if (!rounded_once) {
            for (int64_t i = 0; i < width; i += 16) {
                store_bf16(target + i, load_bf16(row + i) * inverse);
                store_bf16(target + i, load_bf16(target + i) * load_bf16(weight + i));
            }
        } else {
            const Floats added = broadcast(offset);
            for (int64_t i = 0; i < width; i += 16)
                store_bf16(target + i, load_bf16(row + i) * inverse * (added + load_bf16(weight + i)));
        }
    }
}

// out = activation(gate) · up.
void nybble_gated(const bf16* gate_up, bf16* out, int64_t rows, int64_t width, int activation,
                  int threads) {
    switch (activation) {
        case kSilu: return gated(silu, gate_up, out, rows, width, threads);
        case kGelu: return gated(gelu, gate_up, out, rows, width, threads);
        case kGeluTanh: return gated(gelu_tanh, gate_up, out, rows, width, threads);
        case kRelu2: return gated(relu2, gate_up, out, rows, width, threads);
    }
}

// Rotates q in place, and stores rotated k, and v, in the caches, which are int8 if there are scales.
// Row strides are in elements. `scratch` has room for a head.
void nybble_rotary_store(bf16* q, const bf16* k, const bf16* v, const float* cos, const float* sin,
                         void* k_cache, void* v_cache, float* k_scales, float* v_scales,
                         bf16* scratch, const int64_t* slots, int64_t tokens, int64_t q_heads,
                         int64_t kv_heads, int64_t dim, int64_t rotary_dim, int64_t block_size,
                         int64_t q_stride, int64_t k_stride, int64_t v_stride,
                         int interleaved) {
    const int64_t half = rotary_dim / 2;
    auto rotate = [&](const bf16* in, bf16* out, const float* c, const float* s) {
        int64_t i = 0;
        for (; !interleaved && i + 16 <= half; i += 16) {
            const Floats low = load_bf16(in + i), high = load_bf16(in + half + i);
            store_bf16(out + i, fnma(high, load(s + i), low * load(c + i)));
            store_bf16(out + half + i, fma(low, load(s + half + i), high * load(c + half + i)));
        }
        for (; i < half; ++i) {  // interleaved pairs, and the rest that fills no vector
            const int64_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : half + i;
            const float low = to_float(in[a]), high = to_float(in[b]);
            out[a] = to_bf16(low * c[i] - high * s[i]);
            out[b] = to_bf16(high * c[half + i] + low * s[half + i]);
        }
        if (in != out)
            std::memcpy(out + rotary_dim, in + rotary_dim, (dim - rotary_dim) * sizeof(bf16));
    };
    for (int64_t t = 0; t < tokens; ++t) {
        const float *c = cos + t * rotary_dim, *s = sin + t * rotary_dim;
        for (int64_t h = 0; h < q_heads; ++h) {
            bf16* head = q + t * q_stride + h * dim;
            rotate(head, head, c, s);
        }
        if (slots[t] < 0) continue;
        const int64_t block = slots[t] / block_size, offset = slots[t] % block_size;
        for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t row = (block * kv_heads + h) * block_size + offset, at = row * dim;
            const bf16 *key = k + t * k_stride + h * dim, *value = v + t * v_stride + h * dim;
            if (k_scales) {
                rotate(key, scratch, c, s);
                store_int8(scratch, dim, static_cast<int8_t*>(k_cache) + at, k_scales + row);
                store_int8(value, dim, static_cast<int8_t*>(v_cache) + at, v_scales + row);
            } else {
                rotate(key, static_cast<bf16*>(k_cache) + at, c, s);
                std::memcpy(static_cast<bf16*>(v_cache) + at, value, dim * sizeof(bf16));
            }
        }
    }
}

}  // extern "C"
