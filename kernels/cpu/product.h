// The packed matmul's inner loops, in the form which suits the CPU best.

#pragma once

#if defined(__AVX512BF16__)
#include "matmul_bf16.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "matmul_dot.h"
#else
#include "matmul_int16.h"
#endif

namespace nybble {

// Calls `use` with a tag of the Product that computes with such levels and digits.
template <class Use>
void with_product([[maybe_unused]] const float* levels, int digits, Use use) {
    if (digits == 2)
        use(Tag<Product<ByteCodes>>{});
#if !defined(__AVX512BF16__)
    else if (IntegerCodes::fits(levels))
        use(Tag<Product<IntegerCodes>>{});
#endif
    else
        use(Tag<Product<LevelCodes>>{});
}

}  // namespace nybble
