// InfoNCE, the backward: the weights of a tile's pairs,
//     W_ij = e_ij (row_slope_i 2^(n_i − row_ref_i) + column_slope_j 2^(n_i − column_ref_j)) + total_slope_i
// as the left operand of a product.
//
// 2^(n_i − column_ref_j) is the product of a row's and a key's factor, taken around the tile's highest n. Where a tile's
// exponentials do not serve both directions, its logits are made again, and two exponentials of each.
#pragma once

#include "../common/exp2.h"
#include "logits.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Weights of a row, from the exponentials that were kept.
template <typename Raw, typename T>
struct KeptRow {
  using V = Vec<T>;
  const Raw* e;
  const T* column_slope;
  V slope, shift, total;
  bool has_total;

  MMREC_INLINE V at(int64_t c) const {
    const V zero = broadcast(T(0)), x = load(e + c);
    const V w = mul(x, fma(shift, load(column_slope + c), slope));
    return has_total ? add(w, select(greater(x, zero), total, zero)) : w;
  }
};

template <typename Raw, typename T>
struct KeptTile {
  const Slopes<T>& slopes;
  const Raw* values;
  const T* refs;
  const T* column_slope;  // times 2^(highest − column_ref)
  const T *power, *shift;  // 2^(n_i − row_ref), 2^(n_i − highest)
  int64_t row, column, padded_columns;
  T highest;

  KeptTile(const Backward<T>& task, const Place& at, int64_t column_tile, Scratch<T>& scratch)
      : slopes(task.slopes),
        column_slope(scratch.column[0]),
        power(scratch.row[0]),
        shift(scratch.row[1]),
        row(at.row),
        column(at.column),
        padded_columns(at.padded_columns) {
    using V = Vec<T>;
    const Exponentials<T>& kept = task.exponentials;
    values = static_cast<const Raw*>(kept.values) + (at.row - kept.first_row) * kept.padded_columns + at.rows * at.column;
    refs = kept.refs + column_tile * kept.rows + at.row - kept.first_row;
    highest = kNothing<T>;
    for (int64_t i = 0; i < at.rows; ++i) highest = refs[i] > highest ? refs[i] : highest;
    for (int64_t i = 0; i < at.rows; ++i) {
      scratch.row[0][i] = refs[i] - slopes.row_ref[row + i];
      scratch.row[1][i] = refs[i] - highest;
    }
    for (int64_t i = 0; i < at.rows; i += V::kLanes) {
      for (auto& powers : scratch.row) store(powers + i, exp2<T>(load(powers + i)));
    }
    for (int64_t c = 0; c < at.padded_columns; c += V::kLanes) {
      // Bounded: a key that keeps nothing in this tile may have its reference anywhere below.
      V slope = broadcast(T(0));
      if (slopes.column_slope != nullptr) {
        slope = mul(load(slopes.column_slope + at.column + c),
                    exp2<T, true>(sub(broadcast(highest), load(slopes.column_ref + at.column + c))));
      }
      store(scratch.column[0] + c, slope);
    }
  }

  MMREC_INLINE KeptRow<Raw, T> operator()(int64_t i) const {
    const int64_t r = row + i;
    const bool has_total = slopes.total_slope != nullptr;
    return {values + i * padded_columns, column_slope, broadcast(slopes.row_slope[r] * power[i]), broadcast(shift[i]),
            broadcast(has_total ? slopes.total_slope[r] : T(0)), has_total};
  }
};

// Weights of a row, from its logits.
template <PerKey per_key, typename T>
struct MadeRow {
  using V = Vec<T>;
  const Logits<T>& logits;
  const Slopes<T>& slopes;
  LogitRow<per_key, T> row;
  const T* dots;
  const uint64_t* bits;  // or null
  int64_t column;
  V slope, minus_ref, total;

  MMREC_INLINE V at(int64_t c) const {
    const V zero = broadcast(T(0)), dot = load(dots + c);
    V w = fma(slope, exp2<T, true>(row.less(logits, column + c, dot, minus_ref)), total);
    if (slopes.column_slope != nullptr) {
      const V minus_column_ref = sub(zero, load(slopes.column_ref + column + c));
      w = fma(load(slopes.column_slope + column + c), exp2<T, true>(row.less(logits, column + c, dot, minus_column_ref)), w);
    }
    return bits != nullptr ? select(lane_bits<V::kLanes>(bits, c), w, zero) : w;
  }

  // Lanes of kept pairs whose logit is above the reference of their row or of their key by more than `bound`.
  MMREC_INLINE uint32_t above(int64_t c, T bound) const {
    const V dot = load(dots + c);
    uint32_t lanes = greater(row.less(logits, column + c, dot, minus_ref), broadcast(bound));
    if (slopes.column_slope != nullptr) {
      const V minus_column_ref = sub(broadcast(T(0)), load(slopes.column_ref + column + c));
      lanes |= greater(row.less(logits, column + c, dot, minus_column_ref), broadcast(bound));
    }
    return bits != nullptr ? lanes & lane_bits<V::kLanes>(bits, c) : lanes;
  }
};

template <PerKey per_key, typename T>
struct MadeTile {
  const Backward<T>& task;
  const Place& place;
  const Scratch<T>& scratch;

  MMREC_INLINE MadeRow<per_key, T> operator()(int64_t i) const {
    const int64_t r = place.row + i;
    const Slopes<T>& slopes = task.slopes;
    return {task.logits, slopes, LogitRow<per_key, T>(task.logits, r), scratch.tile + i * kTileStride,
            scratch.masked[i] ? scratch.bits + i * kBitWords : nullptr, place.column, broadcast(slopes.row_slope[r]),
            broadcast(-slopes.row_ref[r]), broadcast(slopes.total_slope != nullptr ? slopes.total_slope[r] : T(0))};
  }
};

// The weights of rows and columns [begin, end) of a tile as the left operand of the products, in scratch.weights. For rows, times
// kappa; for keys, times the row factor, and then their sums are added to log_q_sums.
template <typename Dot, typename Tile, typename T>
void write_for_rows(const Tile& tile, const T* kappa, int64_t begin, int64_t end, int64_t columns, T* out) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const auto row = tile(i);
    T* const to = out + (i - begin) * (kTileStride / Dot::kColumns);
    const auto weight = [&](int64_t c) __attribute__((always_inline)) {
      return kappa != nullptr ? mul(row.at(c), load(kappa + c)) : row.at(c);
    };
    if constexpr (Dot::kColumns == 1) {
      for (int64_t c = 0; c < columns; c += kLanes) store(to + c, weight(c));
    } else {
#if defined(__AVX512BF16__)
      for (int64_t c = 0; c < columns; c += 2 * kLanes) store(to + c / 2, append_bf16(weight(c), weight(c + kLanes)));
#endif
    }
  }
}

template <typename Dot, bool kSums, typename Tile, typename T>
void write_for_keys(const Tile& tile, const T* factor, int64_t rows, int64_t begin, int64_t end, T* sums, T* out) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  for (int64_t i = 0; i < rows; i += Dot::kColumns) {
    const auto row = tile(i);
    const V scale = broadcast(factor[i]);
    T* const to = out + i / Dot::kColumns * kTileStride - begin;
    const auto weight = [&](const auto& of, V by, int64_t c) __attribute__((always_inline)) {
      const V w = of.at(c);
      if constexpr (kSums) store(sums + c, add(w, load(sums + c)));
      return mul(w, by);
    };
    if constexpr (Dot::kColumns == 1) {
      for (int64_t c = begin; c < end; c += kLanes) store(to + c, weight(row, scale, c));
    } else {
#if defined(__AVX512BF16__)
      if (i + 1 < rows) {
        const auto next = tile(i + 1);
        const V next_scale = broadcast(factor[i + 1]);
        for (int64_t c = begin; c < end; c += kLanes) {
          store(to + c, pair_bf16(weight(row, scale, c), weight(next, next_scale, c)));
        }
      } else {
        for (int64_t c = begin; c < end; c += kLanes) store(to + c, pair_bf16(weight(row, scale, c), broadcast(T(0))));
      }
#endif
    }
  }
}

// Calls `write` with a tile's weights.
template <typename Kind, typename T, typename Write>
MMREC_INLINE void with_weights(const Backward<T>& task, const Place& at, int64_t column_tile, Scratch<T>& scratch,
                               const Write& write) {
  const Exponentials<T>& kept = task.exponentials;
  const int64_t tiles = (kept.padded_columns + kTileColumns - 1) / kTileColumns;
  if (kept.exact[(at.row - kept.first_row) / kTileRows * tiles + column_tile] != T(0)) {
    write(KeptTile<typename Kind::Raw, T>(task, at, column_tile, scratch));
    return;
  }
  kept_pairs(task.logits, at, scratch);
  dot_products<typename Kind::Dot>(task.logits, at, scratch.tile);
  with_per_key(task.logits, [&](auto per_key) { write(MadeTile<per_key.value, T>{task, at, scratch}); });
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
