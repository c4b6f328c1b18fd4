// Sums of products of bytes: codes without a sign by activations with one, four of each to a lane.

#pragma once

#include "ints.h"

// Whether codes may be any bytes, and not only nibbles.
#if defined(__AVX512VNNI__) || defined(NYBBLE_VNNI_256)
#define NYBBLE_LARGE_BYTES
#endif

namespace nybble {

#if defined(NYBBLE_LARGE_BYTES)

#if defined(__AVX512BW__)
inline Ints add_byte_products(Ints total, Ints codes, Ints x) {
    NYBBLE_ADD_PRODUCTS("v", "vpdpbusd", total.v, codes.v, x.v);
    return total;
}
#else
inline Ints add_byte_products(Ints total, Ints codes, Ints x) {
    NYBBLE_ADD_PRODUCTS("x", NYBBLE_VEX "vpdpbusd", total.low, codes.low, x.low);
    NYBBLE_ADD_PRODUCTS("x", NYBBLE_VEX "vpdpbusd", total.high, codes.high, x.high);
    return total;
}
#endif

// Sixteen bytes, looked up by nibbles.
class ByteTable {
   public:
    explicit ByteTable(const uint8_t* bytes) {
        uint8_t all[64];
        for (int i = 0; i < 64; ++i) all[i] = bytes[i % 16];
        all_ = load_ints(all);
    }

    Ints of(Ints nibbles) const {
#if defined(__AVX512BW__)
        return {_mm512_shuffle_epi8(all_.v, nibbles.v)};
#else
        return {_mm256_shuffle_epi8(all_.low, nibbles.low),
                _mm256_shuffle_epi8(all_.high, nibbles.high)};
#endif
    }

   private:
    Ints all_;
};

#elif defined(__aarch64__)

// Codes are nibbles, so that they have a sign too.
inline Ints add_byte_products(Ints total, Ints codes, Ints x) {
    return four_ints([&](int i) {
        const int8x16_t w = vreinterpretq_s8_s32(codes.v[i]), v = vreinterpretq_s8_s32(x.v[i]);
#if defined(__ARM_FEATURE_DOTPROD)
        return vdotq_s32(total.v[i], w, v);
#else
        const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(v));
        const int32x4_t two = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(vmull_high_s8(w, v)));
        return vaddq_s32(total.v[i], two);
#endif
    });
}

#endif

// N sums, to which octets are added one after another: `next` tells that one is done, `finish` that
// all are.
#if defined(NYBBLE_LARGE_BYTES) || defined(__aarch64__)

template <int N>
class ByteSums {
   public:
    ByteSums() {
        for (auto& each : sums_) each = broadcast_int(0);
    }
    void add(int i, Ints codes, Ints x) { sums_[i] = add_byte_products(sums_[i], codes, x); }
    void next() {}
    void finish() {}
    Ints operator[](int i) const { return sums_[i]; }

   private:
    Ints sums_[N];
};

#else

// Pairs of products of nibbles, of at most 2 · 15 · 127, are added up in 16 bits for four octets.
template <int N>
class ByteSums {
   public:
    ByteSums() {
        for (auto& each : sums_) each = broadcast_int(0);
        for (auto& each : pairs_) each = broadcast_int(0);
    }
    void add(int i, Ints codes, Ints x) {
#if defined(__AVX512BW__)
        pairs_[i].v = _mm512_add_epi16(pairs_[i].v, _mm512_maddubs_epi16(codes.v, x.v));
#else
        Ints& pair = pairs_[i];
        pair.low = _mm256_add_epi16(pair.low, _mm256_maddubs_epi16(codes.low, x.low));
        pair.high = _mm256_add_epi16(pair.high, _mm256_maddubs_epi16(codes.high, x.high));
#endif
    }
    void next() {
        if (++octets_ == 4) finish();
    }
    void finish() {
        octets_ = 0;
        for (int i = 0; i < N; ++i) {
            sums_[i] = add_products(sums_[i], pairs_[i], broadcast_int(0x00010001));
            pairs_[i] = broadcast_int(0);
        }
    }
    Ints operator[](int i) const { return sums_[i]; }

   private:
    Ints sums_[N], pairs_[N];
    int octets_ = 0;
};

#endif

}  // namespace nybble
