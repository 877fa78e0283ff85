// One query: a first pass decides which items are worth their exact score, by a bound of it.
//
// Along its row, an item's product needs no transposition: every 4 rows' lanes are summed by a tree. That sum and the chain
// that defines a score have the same products and round them in another order. With S = sum_d |q_d| · max |x|, the largest of
// a panel's elements:
//     |sum - chain|  <=  2 · (D + 8) · 2^-24 · S  +  (D + 8) · 2^-125        where S < 2^126, so that neither overflows
// The second term is what can be lost where sums become subnormal, or are flushed to zero then. Vectors of rows of which one
// could pass the threshold are scored by the chain of all other paths, so results are the same bits.
#pragma once

#include "panel.h"

#if defined(__AVX2__)

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Rows that lie at one distance from each other; [i] is where row i begins.
struct Stepped {
  const char* first;
  int64_t step;
  MMREC_INLINE const char* operator[](int i) const { return first + i * step; }
};

// The rows of a vector that may pass `threshold`, as bits, whose products are `product` give or take `margin`. Scales and
// biases may be null.
MMREC_INLINE uint32_t may_pass(F32 product, F32 margin, const float* scales, const float* biases, float threshold) {
  F32 score = product;
  if (scales != nullptr) {
    const F32 scale = load(scales);
    score = mul(score, scale);
    margin = mul(margin, abs(scale));
  }
  margin = add(margin, broadcast(0x1p-110f));  // what these few lines lose where numbers become subnormal
  F32 size = abs(score);
  uint32_t removed = 0;
  if (biases != nullptr) {
    const F32 bias = load(biases);
    score = add(score, bias);
    size = add(size, abs(bias));
    removed = same(bias, broadcast(-__builtin_inff()));
  }
  // The roundings of these lines and of the exact score's scale and bias are a few units in the last place.
  const F32 bound = add(score, fma(size, broadcast(0x1p-20f), margin));
  return not_at_most(bound, broadcast(threshold)) & ~removed;  // NaN passes
}

// Products of rows of floating point, by float32 sums along them.
template <ItemType type>
class RowProducts {
 public:
  static constexpr int kLanes = F32::kLanes, kPerWord = Columns<type>::kPerWord;

  // `room` is that of a panel, which has kMaxPanelRows floats per step.
  RowProducts(const TopkScan<float>& scan, float* room) : query_(room), bytes_(scan.width * item_bytes(type)) {
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
    total_ = total;
    roundings_ = static_cast<double>(scan.width + 8);
  }

  // Of a panel's rows; what each of them can be off by.
  template <typename Rows>
  MMREC_INLINE F32 operator()(const Rows& rows, F32 (&products)[kVectors]) const {
    alignas(64) float sums[kVectors * kLanes];
    Word most = every_word(0);
    for (int i = 0; i < kVectors * kLanes; i += 4) {
      F32 acc[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) acc[r] = row_sums(rows[i + r], most);
      _mm_store_ps(sums + i, four_sums(acc[0], acc[1], acc[2], acc[3]));
    }
    for (int v = 0; v < kVectors; ++v) products[v] = load(sums + v * kLanes);
    const double size = total_ * static_cast<double>(Columns<type>::size(most));
    if (!(size < 0x1p126)) return broadcast(__builtin_inff());
    return broadcast(static_cast<float>(1.01 * roundings_ * (2 * 0x1p-24 * size + 0x1p-125)));
  }

 private:
  // Sums of every kLanes-th word's products, and in `most` the largest |x| so far.
  MMREC_INLINE F32 row_sums(const char* row, Word& most) const {
    F32 acc = broadcast(0.0f);
    const float* q = query_;
    const auto add = [&](Word words) __attribute__((always_inline)) {
      F32 x[kPerWord];
      Columns<type>::widen(words, x);
      for (int c = 0; c < kPerWord; ++c, q += kLanes) acc = Columns<type>::Step::add(x[c], load(q), acc);
      most = Columns<type>::larger(words, most);
    };
    int64_t offset = 0;
    for (; offset + 4 * kLanes <= bytes_; offset += 4 * kLanes) add(load_words(row + offset));
    if (offset < bytes_) add(load_words(row + offset, bytes_ - offset));
    return acc;
  }

  const float* query_;  // [ceil(words / kLanes)][kPerWord][kLanes]: what meets column c of word w at [w / kLanes][c][w % kLanes]
  int64_t bytes_;       // of a row
  double total_;        // sum of |q|
  double roundings_;    // of a product, and some to spare
};

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec

#endif
