// The element types of an op as C++ types: those of its rows, and the operands of its products.
#pragma once

#include "element.h"
#include "gemm.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
constexpr int64_t at_most(int64_t n, int64_t most) { return n < most ? n : most; }

// The elements of rows, and the operands of the products over them.
template <typename RawType, typename DotType>
struct Kind {
  using Raw = RawType;
  using Dot = DotType;
};

// Calls `run` with the Kind of `element`.
template <typename T, typename Run>
MMREC_INLINE void with_kind(Element element, const Run& run) {
  if constexpr (sizeof(T) == 8) {
    run(Kind<double, DoubleDot>());
  } else {
    switch (element) {
      case Element::kFloat32:
        return run(Kind<float, FloatDot>());
#if defined(__AVX512BF16__)
      case Element::kBFloat16Pairs:
        return run(Kind<BFloat16, PairDot>());
#endif
      default:
        return run(Kind<BFloat16, FloatDot>());
    }
  }
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
