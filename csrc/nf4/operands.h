// What the products of the NF4 linear multiply: rows of W decoded, tokens brought into the same order of columns.
#pragma once

#include "../common/arena.h"
#include "../common/pack.h"
#include "../common/tiles.h"
#include "decode.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Tokens in lanes are packed in panels of this many.
template <typename T>
constexpr int64_t kPanelTokens = 2 * Vec<T>::kLanes;

template <typename Kind>
constexpr bool kHasPairs = Kind::Dot::kColumns == 2;
// W is rounded to bfloat16 where tokens are.
template <typename Kind>
constexpr bool kRounds = sizeof(typename Kind::Raw) == 2;

// Elements of W as the products read them.
template <typename Kind>
using Operand = Staged<Kind>;

constexpr int64_t padded_columns(int64_t columns) { return round_up(columns, kGroupColumns); }

// A group of row n's columns, in the order of the products.
template <typename Kind>
MMREC_INLINE void decode_operands(const Weight& w, int64_t n, int64_t column, Operand<Kind>* out) {
#if defined(__AVX512BF16__)
  if constexpr (kHasPairs<Kind>) {
    const bool whole = w.bytes.is_aligned() && column + kGroupColumns <= w.bytes.columns;
    const PairGroup group = whole ? pair_group(w, n, column) : odd_pair_group(w, n, column);
    for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + 32 * c, group.columns[c]);
    return;
  }
#endif
  if constexpr (sizeof(Operand<Kind>) == 4) {
    decode_group<kRounds<Kind>>(w, n, column, out);
  } else if constexpr (sizeof(Operand<Kind>) == 8) {
    alignas(64) float values[kGroupColumns];
    decode_group<false>(w, n, column, values);
    for (int64_t k = 0; k < kGroupColumns; ++k) out[k] = values[k];
  }
}

// A group of a token's columns, from `column` on, likewise.
template <typename Kind>
MMREC_INLINE void stage_operands(const typename Kind::Raw* row, int64_t column, int64_t width, Operand<Kind>* out) {
  const int64_t count = at_most(kGroupColumns, width - column);
#if defined(__AVX512BF16__)
  if constexpr (kHasPairs<Kind>) {
    BFloat16 padded[kGroupColumns];
    const BFloat16* from = row + column;
    if (count < kGroupColumns) {
      stage(from, count, kGroupColumns, padded);
      from = padded;
    }
    const PairGroup group = in_pair_order(from);
    for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + 32 * c, group.columns[c]);
    return;
  }
#endif
  stage(row + column, count, kGroupColumns, out);
}

// Up to `lanes` tokens, a group of columns after the other: [word][lanes].
template <typename Kind>
void pack_tokens(const void* const* rows, int64_t count, int64_t width, int64_t lanes, Operand<Kind>* staged,
                 typename Kind::Dot::Word* out) {
  for (int64_t column = 0; column < width; column += kGroupColumns) {
    for (int64_t i = 0; i < count; ++i) {
      stage_operands<Kind>(static_cast<const typename Kind::Raw*>(rows[i]), column, width, staged + i * kGroupColumns);
    }
    pack_lanes<typename Kind::Dot>(staged, kGroupColumns, count, kGroupColumns, lanes, out);
    out += kGroupColumns / Kind::Dot::kColumns * lanes;
  }
}

// The first elements of p, up to a vector of them and `count`, then zeros.
template <typename T, typename X>
MMREC_INLINE Vec<T> load_part(const X* p, int64_t count) {
  using V = Vec<T>;
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>(lanes_before<16>(count));
  if constexpr (sizeof(T) == 4 && sizeof(X) == 4) return {_mm512_maskz_loadu_ps(mask, p)};
  if constexpr (sizeof(T) == 4 && sizeof(X) == 2) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16))};
  }
#endif
  T values[V::kLanes] = {};
  for (int64_t i = 0; i < at_most(V::kLanes, count); ++i) values[i] = static_cast<T>(widen(p[i]));
  return load(values);
}

// `count` rows of `width` elements, x's type or float32, that start `stride` apart, as T.
template <typename Raw, typename T>
void stage_factor(const void* factor, bool is_float32, int64_t stride, int64_t count, int64_t width, int64_t padded, T* out) {
  for (int64_t i = 0; i < count; ++i) {
    if (is_float32) {
      stage(static_cast<const float*>(factor) + i * stride, width, padded, out + i * padded);
    } else {
      stage(static_cast<const Raw*>(factor) + i * stride, width, padded, out + i * padded);
    }
  }
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
