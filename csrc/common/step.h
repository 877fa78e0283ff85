// One step of a chain of multiply-adds, over one column or over a pair of bfloat16 columns in each lane.
#pragma once

#include "simd.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// acc + x · q.
struct Multiply {
  template <typename V>
  MMREC_INLINE static V add(V x, V q, V acc) {
    return fma(x, q, acc);
  }
  // |q|, of all columns of one lane.
  static float size(float q) { return __builtin_fabsf(q); }
};

#if defined(__AVX512BF16__)
// acc + x · q over two bfloat16 in each 32-bit lane: the odd one first, each product added with one rounding, subnormals
// taken for zero.
struct MultiplyPairs {
  MMREC_INLINE static F32 add(F32 x, F32 q, F32 acc) {
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)x.v, (__m512bh)q.v)};
  }
  static float size(float q) {
    BFloat16 both[2];
    std::memcpy(both, &q, sizeof(both));
    return __builtin_fabsf(widen(both[0])) + __builtin_fabsf(widen(both[1]));
  }
};
#endif

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
