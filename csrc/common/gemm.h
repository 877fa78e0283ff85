// Matrix products in the caches: C += A · B over one block, out of registers and packed operands.
//
// C is row-major. B is packed in panels of kPanel columns, [depth][kPanel] each, so that a panel's row is two vectors. A's
// words are broadcast one by one from where they lie: word (r, k) at a[r · row_step + k · depth_step], steps known at compile
// time. So packed groups of rows (row_step 1, depth_step kGroup), a row-major scratch and its transpose all serve as A.
//
// A tile of kGroup x kPanel sums stays in registers: per step of depth two loads of B, kGroup broadcasts and 2 · kGroup
// multiply-adds. Sums are one chain over k, whatever the sizes around them.
#pragma once

#include "step.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// The operands of a product. A word holds one column of depth, or two (kColumns).
template <typename T>
struct Plain {
  using Word = T;
  using Sum = T;
  using Step = Multiply;
  static constexpr int kColumns = 1;
};
using FloatDot = Plain<float>;
using DoubleDot = Plain<double>;
#if defined(__AVX512BF16__)
struct PairDot {
  using Word = float;  // the bits of two bfloat16, the earlier one in the lower half
  using Sum = float;
  using Step = MultiplyPairs;
  static constexpr int kColumns = 2;
};
#endif

// 2 · kGroup sums, two vectors of B and one broadcast fit the registers of every ISA.
#if defined(__AVX512F__)
constexpr int kGroup = 12;
#else
constexpr int kGroup = 6;
#endif
template <typename Dot>
constexpr int kPanel = 2 * Vec<typename Dot::Sum>::kLanes;

// Words of depth that one pass over a tile multiplies; longer products add up such chains. kExactChain, for products whose
// rounding matters (a logit's error is its probability's): the sums of a short chain are small, and so are their roundings.
// docs/infonce.md has the errors that come of it; chains of 128 gave five times as much at a scale of 100.
constexpr int64_t kLongChain = 256, kExactChain = 32;

template <typename Dot, int64_t kRowStep, int64_t kDepthStep>
__attribute__((noinline)) void multiply_tile(const typename Dot::Word* a, const typename Dot::Word* b, int64_t depth,
                                             typename Dot::Sum* c, int64_t c_stride, bool add_to) {
  using V = Vec<typename Dot::Sum>;
  constexpr int kLanes = V::kLanes;
  V sums[kGroup][2];
#pragma GCC unroll 12
  for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) sums[r][v] = broadcast(typename Dot::Sum(0));
  }
  for (int64_t k = 0; k < depth; ++k) {
    const V first = load(b), second = load(b + kLanes);
    for (int r = 0; r < kGroup; ++r) {
      const V x = broadcast(a[r * kRowStep]);
      sums[r][0] = Dot::Step::add(first, x, sums[r][0]);
      sums[r][1] = Dot::Step::add(second, x, sums[r][1]);
    }
    a += kDepthStep;
    b += 2 * kLanes;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kGroup; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      typename Dot::Sum* to = c + r * c_stride + v * kLanes;
      store(to, add_to ? add(load(to), sums[r][v]) : sums[r][v]);
    }
  }
}

// C [groups · kGroup, panels · kPanel] = or += A · B. `a_group`: words from one group of A's rows to the next; `b_panel`: from
// one panel of B to the next.
template <typename Dot, int64_t kRowStep, int64_t kDepthStep, int64_t kChain = kLongChain>
void multiply(const typename Dot::Word* a, int64_t a_group, int64_t groups, const typename Dot::Word* b, int64_t b_panel,
              int64_t panels, int64_t depth, typename Dot::Sum* c, int64_t c_stride, bool add_to) {
  constexpr int kColumns = kPanel<Dot>;
  for (int64_t p = 0; p < panels; ++p) {
    for (int64_t g = 0; g < groups; ++g) {
      typename Dot::Sum* const to = c + g * kGroup * c_stride + p * kColumns;
      int64_t k = 0;
      do {
        const int64_t chain = depth - k < kChain ? depth - k : kChain;
        multiply_tile<Dot, kRowStep, kDepthStep>(a + g * a_group + k * kDepthStep, b + p * b_panel + k * kColumns, chain,
                                                 to, c_stride, add_to || k > 0);
        k += chain;
      } while (k < depth);
    }
  }
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
