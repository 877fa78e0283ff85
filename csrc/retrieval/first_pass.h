// One query: a first pass decides which items are worth their exact score, by a bound of it.
//
// Along its row, an item's product needs no transposition: every 4 rows' lanes are summed by a tree. That sum and the chain
// that defines a score have the same products and round them in another order:
//     |sum - chain|  <=  2 · (D + 8) · 2^-24 · sum_d |q_d| · max |x|                  the largest of a panel's elements
// and what is lost where numbers become subnormal is far below 2^-110. Items whose score could pass the threshold are scored
// by the chain of all other paths, so results are the same bits.
#pragma once

#include "panel.h"

#if defined(__AVX2__)

namespace mmrec {
namespace MMREC_ISA {
namespace {

// The rows of vector v of a panel that may pass `threshold`, as bits, whose products are `product` give or take `margin`.
MMREC_INLINE uint32_t may_pass(const TopkScan<float>& scan, const Panel<float>& panel, int v, F32 product, F32 margin,
                               float threshold) {
  constexpr int kLanes = F32::kLanes;
  F32 score = product;
  if (scan.scales != nullptr) {
    const F32 scale = load(panel.scale + v * kLanes);
    score = mul(score, scale);
    margin = mul(margin, abs(scale));
  }
  margin = add(margin, broadcast(0x1p-110f));
  F32 size = abs(score);
  uint32_t removed = 0;
  if (scan.bias != nullptr) {
    const F32 bias = load(panel.bias + v * kLanes);
    score = add(score, bias);
    size = add(size, abs(bias));
    removed = same(bias, broadcast(-__builtin_inff()));
  }
  // The roundings of these lines and of the exact score's scale and bias are a few units in the last place.
  const F32 bound = add(score, fma(size, broadcast(0x1p-20f), margin));
  return not_at_most(bound, broadcast(threshold)) & ~removed;  // NaN may pass
}

// A query for products along rows.
struct RowQuery {
  const float* values;  // [ceil(words / kLanes)][kPerWord][kLanes]: column w · kPerWord + c of the row at [w / kLanes][c][w % kLanes]
  float rounding;       // what a product can be off by, over the largest |x|

  // Infinite where sums might overflow on one way and not on the other.
  float margin(float largest) const {
    const float margin = rounding * largest;
    return margin < 1e30f ? margin : __builtin_inff();
  }

  // Into the room of a panel, which has kMaxPanelRows floats per step.
  template <ItemType type>
  static RowQuery of(const TopkScan<float>& scan, float* room) {
    constexpr int kLanes = F32::kLanes, kPerWord = Columns<type>::kPerWord;
    static_assert(kLanes * kPerWord <= kMaxPanelRows);
    const int64_t block = kLanes * kPerWord, blocks = divide_up(scan.steps, block);
    std::memset(room, 0, static_cast<size_t>(blocks * block) * sizeof(float));
    double total = 0;
    for (int64_t step = 0; step < scan.steps; ++step) {
      const int64_t at = step % block;
      const float q = scan.queries[step * kQueryGroup];
      std::memcpy(room + (step / block) * block + (at % kPerWord) * kLanes + at / kPerWord, &q, sizeof(q));
      total += Columns<type>::Step::size(q);
    }
    return {room, static_cast<float>(1.01 * 2 * static_cast<double>(scan.width + 8) * 0x1p-24 * total)};
  }
};

// Products of kLanes rows with a query, and in `most` the largest of |x| so far.
template <ItemType type>
MMREC_INLINE F32 row_products(const RowQuery& query, int64_t bytes, const char* const* rows, Word& most) {
  constexpr int kLanes = F32::kLanes, kPerWord = Columns<type>::kPerWord;
  alignas(64) float sums[kLanes];
  for (int i = 0; i < kLanes; i += 4) {
    F32 acc[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const char* const at = rows[i + r];
      const float* q = query.values;
      acc[r] = broadcast(0.0f);
      const auto add = [&](Word words) __attribute__((always_inline)) {
        F32 x[kPerWord];
        Columns<type>::widen(words, x);
        for (int c = 0; c < kPerWord; ++c, q += kLanes) acc[r] = Columns<type>::Step::add(x[c], load(q), acc[r]);
        most = Columns<type>::larger(words, most);
      };
      int64_t offset = 0;
      for (; offset + 4 * kLanes <= bytes; offset += 4 * kLanes) add(load_words(at + offset));
      if (offset < bytes) add(load_words(at + offset, bytes - offset));
    }
    _mm_store_ps(sums + i, four_sums(acc[0], acc[1], acc[2], acc[3]));
  }
  return load(sums);
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec

#endif
