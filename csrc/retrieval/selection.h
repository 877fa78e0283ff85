// The running selection: what passes a query's threshold is appended, and a full buffer is cut back to the k best.
//
// The cut bisects the order keys of the scores; each step is a count that runs in vectors. Nothing here branches on how
// two scores compare, which would be mispredicted half of the time.
#pragma once

#include <limits>
#include <type_traits>

#include "../common/simd.h"
#include "topk_kernel.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Integers in the order of the scores. Zeros of both signs are one score. No NaN gets here.
template <typename T>
using OrderKey = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

template <typename T>
MMREC_INLINE OrderKey<T> order_key(T score) {
  using Key = OrderKey<T>;
  const T one_zero = score + T(0);
  Key bits;
  std::memcpy(&bits, &one_zero, sizeof(bits));
  constexpr Key kMagnitude = static_cast<Key>(static_cast<std::make_unsigned_t<Key>>(-1) >> 1);
  return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kMagnitude);
}

// The k-th largest of `count` keys, or, sooner found, a bound that exactly k keys reach.
template <typename Key>
Key bound_of_best(const Key* keys, int64_t count, int64_t k) {
  using Unsigned = std::make_unsigned_t<Key>;
  Key low = keys[0], high = keys[0];
  for (int64_t i = 1; i < count; ++i) {
    low = keys[i] < low ? keys[i] : low;
    high = keys[i] > high ? keys[i] : high;
  }
  // At least k keys are >= low, fewer than k are > high.
  while (low < high) {
    const Unsigned distance = static_cast<Unsigned>(high) - static_cast<Unsigned>(low);
    const Key middle = static_cast<Key>(static_cast<Unsigned>(low) + distance / 2 + distance % 2);
    Key reach = 0;
    for (int64_t i = 0; i < count; ++i) reach += keys[i] >= middle;
    if (reach == k) return middle;
    if (reach > k) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Cuts a selection of more than k entries back to the k best, in the order in which they came. Equal scores came by
// ascending id, so the first of them stay. `scratch` holds a key per entry.
template <typename T>
void cut(Selection<T>& selection, void* scratch) {
  using Key = OrderKey<T>;
  Key* keys = static_cast<Key*>(scratch);
  for (int64_t i = 0; i < selection.count; ++i) keys[i] = order_key(selection.scores[i]);
  const Key bound = bound_of_best(keys, selection.count, selection.k);
  int64_t equals = selection.k;
  for (int64_t i = 0; i < selection.count; ++i) equals -= keys[i] > bound;
  int64_t kept = 0;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  T worst = kInfinity;
  for (int64_t i = 0; kept < selection.k; ++i) {
    const T score = selection.scores[i];
    const bool equal = keys[i] == bound;
    const bool stays = (keys[i] > bound) | (equal & (equals > 0));
    equals -= equal;
    selection.scores[kept] = score;
    selection.ids[kept] = selection.ids[i];
    kept += stays;
    worst = (stays & (score < worst)) ? score : worst;
  }
  selection.count = kept;
  selection.threshold = worst;
}

// Writes the lanes whose bit is set one after another, and up to kSelectionSlack entries of anything behind them.
template <typename T>
MMREC_INLINE void store_lanes(Vec<T> scores, uint32_t lanes, int64_t first, T* to_scores, int64_t* to_ids) {
  T all[Vec<T>::kLanes];
  store(all, scores);
  for (; lanes != 0; lanes &= lanes - 1) {
    const int lane = __builtin_ctz(lanes);
    *to_scores++ = all[lane];
    *to_ids++ = first + lane;
  }
}

#if defined(__AVX512F__)
template <>
MMREC_INLINE void store_lanes<float>(F32 scores, uint32_t lanes, int64_t first, float* to_scores, int64_t* to_ids) {
  // Compressed in registers and stored whole: a compressing store is slow on some CPUs.
  const auto low = static_cast<__mmask8>(lanes & 0xff), high = static_cast<__mmask8>(lanes >> 8);
  const __m512i ids = _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
  const __m512i next = _mm512_add_epi64(ids, _mm512_set1_epi64(8));
  _mm512_storeu_ps(to_scores, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), scores.v));
  _mm512_storeu_si512(to_ids, _mm512_maskz_compress_epi64(low, ids));
  _mm512_storeu_si512(to_ids + __builtin_popcount(low), _mm512_maskz_compress_epi64(high, next));
}
#endif

// Appends the lanes of `scores` whose bit in `passed` is set. Lane i is the item at position first + i; ids ascend from
// call to call.
template <typename T>
void append(const TopkScan<T>& scan, Selection<T>& selection, Vec<T> scores, uint32_t passed, int64_t first) {
  constexpr int kLanes = Vec<T>::kLanes;
  const int64_t* excluded = selection.excluded;
  const int64_t* const excluded_end = selection.excluded_end;
  const auto id_at = [&](int64_t position) { return scan.ids != nullptr ? scan.ids[position] : position; };
  const int64_t lowest = id_at(first + __builtin_ctz(passed));
  const int64_t highest = id_at(first + 31 - __builtin_clz(passed));
  while (excluded != excluded_end && *excluded < lowest) ++excluded;
  selection.excluded = excluded;
  for (; excluded != excluded_end && *excluded <= highest; ++excluded) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t bit = 1u << lane;
      if ((passed & bit) != 0 && id_at(first + lane) == *excluded) passed &= ~bit;
    }
  }
  int64_t* const ids = selection.ids + selection.count;
  store_lanes<T>(scores, passed, first, selection.scores + selection.count, ids);
  const int count = __builtin_popcount(passed);
  if (scan.ids != nullptr) {
    for (int i = 0; i < count; ++i) ids[i] = scan.ids[ids[i]];
  }
  selection.count += count;
  if (selection.count >= selection.capacity) cut(selection, scan.keys);
}

// The same for one item.
template <typename T>
MMREC_INLINE void append(const TopkScan<T>& scan, Selection<T>& selection, T score, int64_t id) {
  while (selection.excluded != selection.excluded_end && *selection.excluded < id) ++selection.excluded;
  if (selection.excluded != selection.excluded_end && *selection.excluded == id) return;
  selection.scores[selection.count] = score;
  selection.ids[selection.count++] = id;
  if (selection.count >= selection.capacity) cut(selection, scan.keys);
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
