// Pairs that dominate a row or a key of bfloat16: a quarter of what one of them sums, or more. The roundings of e_ij and W_ij to
// bfloat16 average out over many pairs, but not over one, and would add up to three times the gradient's own. Such a pair leaves
// its tile, as a positive does, and is added in float32 from a dot product of its own. A row or a key has at most eight.
#pragma once

#include "rows.h"
#include "weights.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// A dominant pair's logit is above its row's or key's reference less this: more than 1/8 to 1/4 of the sum.
constexpr int kDominantBelow = 3;

// Where e_ij or W_ij are rounded.
template <typename Kind>
constexpr bool kRounded = sizeof(typename Kind::Raw) == 2;

// Pairs of a tile: rows [first_row, last_row), columns [first_column, last_column).
struct Range {
  int64_t first_row, last_row, first_column, last_column;
};

// Appends the pairs of row i and the columns from c on whose lanes are set.
MMREC_INLINE int64_t append(uint32_t lanes, int64_t i, int64_t c, uint16_t* found, int64_t count) {
  for (; lanes != 0; lanes &= lanes - 1) {
    found[count++] = static_cast<uint16_t>(i * kTileColumns + c + __builtin_ctz(lanes));
  }
  return count;
}

// The dominant pairs of a tile, row by row, as row · kTileColumns + column in scratch.dominant; returns how many.
template <typename Raw, typename T>
int64_t find_dominant(const KeptTile<Raw, T>& tile, const Range& range, Scratch<T>& scratch) {
  using V = Vec<T>;
  const Slopes<T>& slopes = tile.slopes;
  constexpr T kMost = T(1e30);
  // A key's pair is dominant from 2^(column_ref − kDominantBelow) on, in units of 2^highest.
  T* const limits = scratch.column[2];
  V least = broadcast(-kMost);
  for (int64_t c = range.first_column; c < range.last_column; c += V::kLanes) {
    V limit = broadcast(kMost);
    if (slopes.column_slope != nullptr) {
      limit = exp2<T, true>(sub(load(slopes.column_ref + tile.column + c), broadcast(tile.highest + kDominantBelow)));
    }
    store(limits + c, limit);
    least = max(least, sub(broadcast(T(0)), limit));
  }
  const T column_least = -reduce_max(least);
  int64_t count = 0;
  for (int64_t i = range.first_row; i < range.last_row; ++i) {
    // e_ij is at most 1, so most rows of a flat softmax end here.
    const T below = slopes.row_ref[tile.row + i] - kDominantBelow - tile.refs[i];
    if (below >= T(0) && tile.shift[i] <= column_least) continue;
    const V row_limit = exp2<T, true>(broadcast(below)), shift = broadcast(tile.shift[i]);
    const Raw* const e = tile.values + i * tile.padded_columns;
    for (int64_t c = range.first_column; c < range.last_column; c += V::kLanes) {
      const V x = load(e + c);
      const uint32_t lanes = greater(x, row_limit) | greater(mul(x, shift), load(limits + c));
      if (lanes != 0) count = append(lanes, i, c, scratch.dominant, count);
    }
  }
  return count;
}

template <PerKey per_key, typename T>
int64_t find_dominant(const MadeTile<per_key, T>& tile, const Range& range, Scratch<T>& scratch) {
  int64_t count = 0;
  for (int64_t i = range.first_row; i < range.last_row; ++i) {
    const auto row = tile(i);
    for (int64_t c = range.first_column; c < range.last_column; c += Vec<T>::kLanes) {
      count = append(row.above(c, T(-kDominantBelow)), i, c, scratch.dominant, count);
    }
  }
  return count;
}

template <typename Visit>
MMREC_INLINE void for_each_pair(const uint16_t* pairs, int64_t count, const Visit& visit) {
  for (int64_t n = 0; n < count; ++n) visit(pairs[n] / kTileColumns, pairs[n] % kTileColumns);
}

// What a tile says of a row's column c.
template <typename Row>
auto weight_at(const Row& row, int64_t c) {
  using V = decltype(row.at(c));
  decltype(reduce_max(row.at(c))) lanes[V::kLanes];
  store(lanes, row.at(c / V::kLanes * V::kLanes));
  return lanes[c % V::kLanes];
}

// Products of bfloat16 are exact in float32, and a lane adds few of them.
MMREC_INLINE float dot(const BFloat16* a, const BFloat16* b, int64_t width) {
  constexpr int kLanes = F32::kLanes;
  F32 sums[2] = {broadcast(0.0f), broadcast(0.0f)};
  int64_t d = 0;
  for (; d + 2 * kLanes <= width; d += 2 * kLanes) {
    sums[0] = fma(load(a + d), load(b + d), sums[0]);
    sums[1] = fma(load(a + d + kLanes), load(b + d + kLanes), sums[1]);
  }
  float sum = reduce_add(add(sums[0], sums[1]));
  for (; d < width; ++d) sum += widen(a[d]) * widen(b[d]);
  return sum;
}

// W of row r and key j.
template <typename T>
double exact_weight(const Backward<T>& task, int64_t r, int64_t j) {
  const Logits<T>& logits = task.logits;
  const Slopes<T>& slopes = task.slopes;
  double x = static_cast<double>(dot(row_of<BFloat16>(task.query, r), row_of<BFloat16>(task.key, j), task.query.width));
  x *= static_cast<double>(logits.sigma[r]) + static_cast<double>(logits.sigma_rest[r]);
  if (logits.kappa != nullptr) x *= static_cast<double>(logits.kappa[j]);
  if (logits.bias != nullptr) x -= static_cast<double>(logits.bias[j]);
  const auto term = [x](T slope, T ref) {
    double lanes[Vec<double>::kLanes];
    store(lanes, exp2<double, true>(broadcast(x - static_cast<double>(ref))));
    return static_cast<double>(slope) * lanes[0];
  };
  double weight = term(slopes.row_slope[r], slopes.row_ref[r]);
  if (slopes.column_slope != nullptr) weight += term(slopes.column_slope[j], slopes.column_ref[j]);
  return slopes.total_slope != nullptr ? weight + static_cast<double>(slopes.total_slope[r]) : weight;
}

// Zero for a pair of what write_for_rows and write_for_keys wrote.
template <typename Dot, typename T>
void clear_for_rows(T* weights, int64_t row, int64_t column) {
  using Element = std::conditional_t<Dot::kColumns == 1, T, BFloat16>;
  reinterpret_cast<Element*>(weights + row * (kTileStride / Dot::kColumns))[column] = Element{};
}

template <typename Dot, typename T>
void clear_for_keys(T* weights, int64_t row, int64_t column) {
  using Element = std::conditional_t<Dot::kColumns == 1, T, BFloat16>;
  T* const word = weights + row / Dot::kColumns * kTileStride + column;
  reinterpret_cast<Element*>(word)[row % Dot::kColumns] = Element{};
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
