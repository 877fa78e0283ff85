// Products with an adapter's factor: few rows (the rank) times a panel of tokens, in T.
//
//     out [rank][panel] = scale · factor · rowsᵀ
//
// Neither is rounded: a bfloat16 token meets a float32 factor in float32.
#pragma once

#include "operands.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename Kind, typename T>
class Skinny {
  using Raw = typename Kind::Raw;
  using Dot = Plain<T>;
  static constexpr int64_t kLanes = Vec<T>::kLanes, kStride = kPanelTokens<T>;
  // Columns at a time, and rows of the factor.
  static constexpr int64_t kColumns = 256, kRanks = 2 * kGroup;

 public:
  Skinny(const SkinnyProduct<T>& product, Arena& arena) : p_(product) {
    tokens_ = arena.take<T>(p_.few ? kFewRows * kColumns : kStride * kColumns);
    packed_ = arena.take<T>(p_.few ? 0 : kStride * kColumns);
    factor_ = arena.take<T>(kRanks * kColumns);
    keys_ = arena.take<const T*>(kRanks + 3);
    part_ = arena.take<T>((kRanks + 4) * kStride);
  }

  void run(T* out) {
    const int64_t lanes = p_.few ? kLanes : round_up(p_.count, kLanes);
    std::memset(out, 0, sizeof(T) * static_cast<size_t>(p_.rank * kStride));
    for (int64_t column = 0; column < p_.width; column += kColumns) {
      const int64_t width = at_most(kColumns, p_.width - column), padded = round_up(width, kLanes);
      for (int64_t i = 0; i < p_.count; ++i) stage(static_cast<const Raw*>(p_.rows[i]) + column, width, padded, tokens_ + i * padded);
      if (!p_.few) pack_lanes<Dot>(tokens_, padded, p_.count, width, lanes, packed_);
      for (int64_t first = 0; first < p_.rank; first += kRanks) {
        const int64_t count = at_most(kRanks, p_.rank - first);
        find_keys(first, count, column, width, padded);
        if (p_.few) {
          few_scores(keys_, count, tokens_, p_.count, padded, part_, kStride);
        } else {
          score_block<Dot>(keys_, count, packed_, lanes, width, part_, kStride);
        }
        for (int64_t r = 0; r < count; ++r) {
          T* const to = out + (first + r) * kStride;
          for (int64_t i = 0; i < p_.count; ++i) to[i] += part_[r * kStride + i];
        }
      }
    }
    for (int64_t n = 0; n < p_.rank * kStride; ++n) out[n] *= p_.scale;
  }

 private:
  // Rows of the factor where they lie, or copies.
  void find_keys(int64_t first, int64_t count, int64_t column, int64_t width, int64_t padded) {
    const int64_t at = first * p_.width + column;
    const bool in_place = width == padded && (sizeof(T) == 8 ? !p_.is_float32 : p_.is_float32 || sizeof(Raw) == 4);
    if (!in_place) {
      const void* const from = p_.is_float32 ? static_cast<const void*>(static_cast<const float*>(p_.factor) + at)
                                             : static_cast<const Raw*>(p_.factor) + at;
      stage_factor<Raw>(from, p_.is_float32, p_.width, count, width, padded, factor_);
    }
    for (int64_t r = 0; r < kRanks + 3; ++r) {
      const int64_t row = at_most(r, count - 1);
      keys_[r] = in_place ? static_cast<const T*>(p_.factor) + at + row * p_.width : factor_ + row * padded;
    }
  }

  const SkinnyProduct<T>& p_;
  T *tokens_, *packed_, *factor_, *part_;
  const T** keys_;
};

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
