// The products of tiles.h over rows of bfloat16, two of which share a step.
#pragma once

#include "tiles.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

#if defined(__AVX512BF16__)
// Columns [column, column + 32) of two rows as pairs.
MMREC_INLINE void interleave(const BFloat16* a, const BFloat16* b, F32 (&out)[2]) {
  const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                       35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_or_si512(low, _mm512_set1_epi16(16));
  out[0] = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(x, low, y))};
  out[1] = {_mm512_castsi512_ps(_mm512_permutex2var_epi16(x, high, y))};
}

template <int R, int64_t kRowStep, int64_t kKeyStep>
__attribute__((noinline)) void pair_value_tile(const float* weights, const BFloat16* const* values, int64_t column,
                                               int64_t pairs, float* out, int64_t stride, const Fetch& fetch) {
  F32 sums[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    sums[r][0] = load(out + r * stride);
    sums[r][1] = load(out + r * stride + F32::kLanes);
  }
  const int64_t each = fetch.each(pairs);
  for (int64_t j = 0; j < pairs; ++j) {
    fetch(j * each, (j + 1) * each);
    F32 x[2];
    interleave(values[2 * j] + column, values[2 * j + 1] + column, x);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const F32 w = broadcast(weights[r * kRowStep + j * kKeyStep]);
      sums[r][0] = MultiplyPairs::add(x[0], w, sums[r][0]);
      sums[r][1] = MultiplyPairs::add(x[1], w, sums[r][1]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(out + r * stride, sums[r][0]);
    store(out + r * stride + F32::kLanes, sums[r][1]);
  }
}

// weigh_values with weights of two keys a word; `padded_width` is a multiple of 32.
template <int64_t kRowStep, int64_t kKeyStep>
void weigh_value_pairs(const float* weights, int64_t rows, const BFloat16* const* values, int64_t pairs,
                              int64_t padded_width, float* out, const Fetch& fetch = {}) {
  const int64_t tiles = (rows + kGroup - 1) / kGroup * (padded_width / (2 * F32::kLanes));
  int64_t tile = 0;
  in_parts(rows, [&](auto part, int64_t first) __attribute__((always_inline)) {
    for (int64_t column = 0; column < padded_width; column += 2 * F32::kLanes) {
      pair_value_tile<decltype(part)::value, kRowStep, kKeyStep>(weights + first * kRowStep, values, column, pairs, out + first * padded_width + column,
                                             padded_width, fetch.part(tile, tiles));
      ++tile;
    }
  });
}
#endif

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
