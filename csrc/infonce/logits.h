// A tile of logits: which of its pairs are kept, its dot products, and what a dot product is as a logit.
#pragma once

#include <type_traits>

#include "../common/kind.h"
#include "../common/rows.h"
#include "infonce_kernel.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// The place of a tile: its first row and key, and how many of each it has.
struct Place {
  int64_t row, column, rows, columns, padded_columns;

  template <typename T>
  Place(const Logits<T>& logits, int64_t row_tile, int64_t column_tile)
      : row(row_tile * kTileRows),
        column(column_tile * kTileColumns),
        rows(at_most(logits.rows - row, kTileRows)),
        columns(at_most(logits.columns - column, kTileColumns)),
        padded_columns(round_up(columns, kColumnUnit)) {}
};

// What e_ij have below all others where nothing is kept; differences of references stay finite.
template <typename T>
constexpr T kNothing = T(-1e30);

// bfloat16 products are exact, and their gradients are rounded to 8 bits.
template <typename Dot>
constexpr int64_t kLogitChain = Dot::kColumns == 1 ? kExactChain : kLongChain;

// The dot products of a tile, into `tile`; whole groups and panels of them.
template <typename Dot, typename T>
void dot_products(const Logits<T>& logits, const Place& at, T* tile) {
  multiply<Dot, 1, kGroup, kLogitChain<Dot>>(logits.query_groups + at.row * logits.depth, kGroup * logits.depth,
                           (at.rows + kGroup - 1) / kGroup, logits.key_panels + at.column * logits.depth,
                           kPanel<Dot> * logits.depth, at.padded_columns / kPanel<Dot>, logits.depth, tile, kTileStride,
                           false);
}

// What the logits of a key have beside the scale.
enum class PerKey { kNothing, kBias, kKappaAndBias };

// Calls `run` with the PerKey of `logits` as a constant.
template <typename T, typename Run>
MMREC_INLINE void with_per_key(const Logits<T>& logits, const Run& run) {
  if (logits.kappa != nullptr) return run(std::integral_constant<PerKey, PerKey::kKappaAndBias>());
  if (logits.bias != nullptr) return run(std::integral_constant<PerKey, PerKey::kBias>());
  run(std::integral_constant<PerKey, PerKey::kNothing>());
}

// The dot products of a vector's pairs as logits, less `ref`: in one rounding where there is nothing but a scale.
template <PerKey per_key, typename T, typename V = Vec<T>>
struct LogitRow {
  V sigma, rest;

  LogitRow(const Logits<T>& logits, int64_t row)
      : sigma(broadcast(logits.sigma[row])), rest(broadcast(logits.sigma_rest[row])) {}

  MMREC_INLINE V less(const Logits<T>& logits, int64_t column, V dot, V minus_ref) const {
    if constexpr (per_key == PerKey::kKappaAndBias) dot = mul(dot, load(logits.kappa + column));
    V x = fma(dot, sigma, minus_ref);
    if constexpr (sizeof(T) == 4) x = fma(dot, rest, x);
    if constexpr (per_key != PerKey::kNothing) x = sub(x, load(logits.bias + column));
    return x;
  }
};

// Lane i of a vector of kLanes: bit i.
template <int kLanes>
MMREC_INLINE uint32_t lane_bits(const uint64_t* bits, int64_t column) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
  if constexpr (kLanes >= 8) {
    std::conditional_t<kLanes == 8, uint8_t, uint16_t> lanes;
    std::memcpy(&lanes, reinterpret_cast<const char*>(bits) + column / 8, sizeof(lanes));
    return lanes;
  }
#endif
  return static_cast<uint32_t>(bits[column / 64] >> (column % 64)) & static_cast<uint32_t>((uint64_t{1} << kLanes) - 1);
}

// Bits of the kept pairs of a tile, kBitWords a row, and which rows need them: those that leave a pair of the panels out.
template <typename T>
void kept_pairs(const Logits<T>& logits, const Place& at, Scratch<T>& scratch) {
  const uint64_t* const keys = logits.key_bits + at.column / 64;
  uint64_t whole[kBitWords];
  bool all_leave_out = false;
  for (int64_t w = 0; w < kBitWords; ++w) {
    const int64_t here = at.padded_columns - 64 * w;
    const uint64_t all = here >= 64 ? ~uint64_t{0} : here <= 0 ? 0 : (uint64_t{1} << here) - 1;
    whole[w] = keys[w] & all;
    all_leave_out |= whole[w] != all;
  }
  for (int64_t i = 0; i < at.rows; ++i) {
    uint64_t* const row = scratch.bits + i * kBitWords;
    const int64_t r = at.row + i, t = logits.target[r] - at.column;
    const bool read = logits.row_read == nullptr || logits.row_read[r] != 0;
    for (int64_t w = 0; w < kBitWords; ++w) row[w] = read ? whole[w] : 0;
    bool left_out = all_leave_out || !read;
    scratch.masked[i] = left_out;
    if (!read) continue;
    if (logits.query_ids != nullptr && logits.query_ids[r] >= 0) {
      const int32_t id = logits.query_ids[r];
      const int32_t* const ids = logits.key_ids + at.column;
      for (int64_t w = 0; w * 64 < at.padded_columns; ++w) {
        uint64_t hits = 0;
        for (int64_t c = 0; c < 64 && w * 64 + c < at.padded_columns; c += F32::kLanes) {
          hits |= static_cast<uint64_t>(equal(ids + w * 64 + c, id)) << c;
        }
        row[w] &= ~hits;
        left_out |= hits != 0;
      }
    }
    if (logits.excluded_offsets != nullptr) {
      const int64_t* listed = logits.excluded + logits.excluded_offsets[r];
      const int64_t* const end = logits.excluded + logits.excluded_offsets[r + 1];
      for (int64_t count = end - listed; count > 0;) {  // the first that is not before the tile
        const int64_t half = count / 2;
        const bool before = listed[half] < at.column;
        listed += before ? half + 1 : 0;
        count = before ? count - half - 1 : half;
      }
      for (; listed < end && *listed < at.column + at.columns; ++listed) {
        const int64_t c = *listed - at.column;
        row[c / 64] &= ~(uint64_t{1} << (c % 64));
        left_out = true;
      }
    }
    if (t >= 0 && t < at.columns) {
      row[t / 64] &= ~(uint64_t{1} << (t % 64));
      left_out = true;
    }
    scratch.masked[i] = left_out;
  }
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
