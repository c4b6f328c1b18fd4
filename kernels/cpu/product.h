// The packed matmul's inner loops, in the form which suits the CPU best.

#pragma once

#if defined(__AMX_BF16__)
#include "matmul_amx.h"
#elif defined(__AVX512BF16__)
#include "matmul_bf16.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "matmul_dot.h"
#else
#include "matmul_int16.h"
#endif
#include "matmul_int8.h"

namespace nybble {

#if defined(__AMX_BF16__)
template <class Codes>
using BestProduct = TileProduct<Codes>;
#else
template <class Codes>
using BestProduct = Product<Codes>;
#endif

// Calls `use` with a tag of the Product that computes with such levels and digits, and activations in
// 8 bits if they are asked for and the CPU multiplies such codes as bytes.
template <class Use>
void with_product(const float* levels, int digits, int activation_bits, Use use) {
    if (activation_bits == 8) {
        if (digits == 1 && are_integers(levels)) return use(Tag<ByteProduct<IntegerBytes>>{});
#if defined(NYBBLE_LARGE_BYTES)
        if (digits == 1) return use(Tag<ByteProduct<LevelBytes>>{});
        return use(Tag<ByteProduct<ByteBytes>>{});
#endif
    }
    if (digits == 2) return use(Tag<BestProduct<ByteCodes>>{});
#if !defined(__AVX512BF16__)
    if (are_integers(levels)) return use(Tag<BestProduct<IntegerCodes>>{});
#endif
    use(Tag<BestProduct<LevelCodes>>{});
}

}  // namespace nybble
