// InfoNCE, the backward: the weights of a tile's pairs, and what they make of the other side's rows.
//
//     W_ij = e_ij (row_slope_i 2^(n_i − row_ref_i) + column_slope_j 2^(n_i − column_ref_j)) + mean_slope_i
//     u_i = Σ_j W_ij kappa_j k_j                           dk_j = Σ_i W_ij row_factor_i q_i
//
// 2^(n_i − column_ref_j) is the product of a row's and a key's factor, taken around the tile's highest n. Where a tile's
// exponentials do not serve both directions, its logits are made again, and two exponentials of each.
//
// W never exists whole: a task makes it tile by tile as the left operand of its product, 2 · 96 · 192 · D flops a tile for each
// of u and dk, and reads 4 bytes (2) of e_ij per pair for that. Rows and keys have one owner each, and every sum runs over
// tiles in order.

#include "../common/exp2.h"
#include "../common/pack.h"
#include "logits.h"
#include "rows.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Weights of a row, from the exponentials that were kept.
template <typename Raw, typename T>
struct KeptRow {
  using V = Vec<T>;
  const Raw* e;
  const T* column_slope;
  V slope, shift, mean;
  bool has_mean;

  MMREC_INLINE V at(int64_t c) const {
    const V zero = broadcast(T(0)), x = load(e + c);
    const V w = mul(x, fma(shift, load(column_slope + c), slope));
    return has_mean ? add(w, select(greater(x, zero), mean, zero)) : w;
  }
};

template <typename Raw, typename T>
struct KeptTile {
  const Slopes<T>& slopes;
  const Raw* values;
  const T* refs;
  const T* column_slope;  // times 2^(highest − column_ref)
  int64_t row, padded_columns;
  T highest;

  KeptTile(const Backward<T>& task, const Place& at, int64_t column_tile, Scratch<T>& scratch)
      : slopes(task.slopes), column_slope(scratch.column[0]), row(at.row), padded_columns(at.padded_columns) {
    using V = Vec<T>;
    const Exponentials<T>& kept = task.exponentials;
    values = static_cast<const Raw*>(kept.values) + (at.row - kept.first_row) * kept.padded_columns + at.rows * at.column;
    refs = kept.refs + column_tile * kept.rows + at.row - kept.first_row;
    highest = kNothing<T>;
    for (int64_t i = 0; i < at.rows; ++i) highest = refs[i] > highest ? refs[i] : highest;
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
    const auto power = [](T x) __attribute__((always_inline)) { return exp2<T>(broadcast(x)); };
    const bool has_mean = slopes.mean_slope != nullptr;
    return {values + i * padded_columns, column_slope,
            mul(broadcast(slopes.row_slope[r]), power(refs[i] - slopes.row_ref[r])), power(refs[i] - highest),
            broadcast(has_mean ? slopes.mean_slope[r] : T(0)), has_mean};
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
  V slope, minus_ref, mean;

  MMREC_INLINE V at(int64_t c) const {
    const V zero = broadcast(T(0)), dot = load(dots + c);
    V w = fma(slope, exp2<T, true>(row.less(logits, column + c, dot, minus_ref)), mean);
    if (slopes.column_slope != nullptr) {
      const V minus_column_ref = sub(zero, load(slopes.column_ref + column + c));
      w = fma(load(slopes.column_slope + column + c), exp2<T, true>(row.less(logits, column + c, dot, minus_column_ref)), w);
    }
    return bits != nullptr ? select(lane_bits<V::kLanes>(bits, c), w, zero) : w;
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
            broadcast(-slopes.row_ref[r]), broadcast(slopes.mean_slope != nullptr ? slopes.mean_slope[r] : T(0))};
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

template <typename Raw, typename T>
void finish_row(const Finish<T>& finish, int64_t r, T* sum) {
  const int64_t width = finish.query.width, t = finish.target[r];
  const Raw* const q = static_cast<const Raw*>(finish.query.values) + r * finish.query.stride;
  const T slope = finish.positive_slope[r];
  if (t >= 0 && slope != T(0)) {
    const double norm = finish.key_norm != nullptr ? finish.key_norm[t] : 1.0;
    add_row(static_cast<T>(static_cast<double>(slope) / (norm > kNormEps ? norm : kNormEps)),
            static_cast<const Raw*>(finish.key.values) + t * finish.key.stride, width, sum);
  }
  // A row that is not read, or keeps nothing, may hold NaN.
  const bool nothing = all_zero(sum, width);
  const double norm = finish.query_norm != nullptr && !nothing ? finish.query_norm[r] : 1.0;
  if (finish.grad_scale != nullptr) {
    finish.grad_scale[r] = nothing ? 0.0 : dot_in_double(q, sum, width) / (norm > kNormEps ? norm : kNormEps);
  }
  if (finish.grad_query == nullptr) return;
  Raw* const out = static_cast<Raw*>(finish.grad_query) + r * width;
  if (nothing) return write_row(sum, width, out);
  const T scale = finish.scale[r];
  for (int64_t d = 0; d < width; ++d) sum[d] *= scale;
  write_through_norm(sum, q, finish.query_norm != nullptr ? &norm : nullptr, width, out);
}

template <typename T>
void row_gradients(const Backward<T>& task, const Finish<T>& finish, const Part& part, Scratch<T>& scratch, T* sums) {
  with_kind<T>(task.logits.element, [&](auto kind) {
    using Kind = decltype(kind);
    using Dot = typename Kind::Dot;
    constexpr int64_t kRow = kTileStride / Dot::kColumns;
    const int64_t tiles = (task.logits.columns + kTileColumns - 1) / kTileColumns;
    const int64_t groups = (part.end - part.begin + kGroup - 1) / kGroup;
    for (int64_t j = 0; j < tiles; ++j) {
      const Place at(task.logits, part.row_tile, j);
      with_weights<Kind>(task, at, j, scratch, [&](const auto& tile) {
        const T* const kappa = task.logits.kappa != nullptr ? task.logits.kappa + at.column : nullptr;
        write_for_rows<Dot>(tile, kappa, part.begin, part.end, at.padded_columns, scratch.weights);
      });
      multiply<Dot, kRow, 1>(scratch.weights, kGroup * kRow, groups,
                             task.key_rows + at.column / Dot::kColumns * kPanel<Dot>, task.key_panel,
                             task.padded_width / kPanel<Dot>, words_of(at.columns, Dot::kColumns), sums,
                             task.padded_width, j > 0);
    }
    for (int64_t i = part.begin; i < part.end; ++i) {
      T* const sum = sums + (i - part.begin) * task.padded_width;
      if (tiles == 0) std::memset(sum, 0, sizeof(T) * static_cast<size_t>(task.padded_width));
      finish_row<typename Kind::Raw>(finish, part.row_tile * kTileRows + i, sum);
    }
  });
}

template <typename T>
void key_sums(const Backward<T>& task, const Part& part, Scratch<T>& scratch) {
  with_kind<T>(task.logits.element, [&](auto kind) {
    using Kind = decltype(kind);
    using Dot = typename Kind::Dot;
    const int64_t first = task.exponentials.first_row / kTileRows;
    const int64_t last = (task.exponentials.first_row + task.exponentials.rows + kTileRows - 1) / kTileRows;
    for (int64_t i = first; i < last; ++i) {
      const Place at(task.logits, i, part.column_tile);
      const int64_t end = at_most(round_up(part.end, kColumnUnit), at.padded_columns);
      T* const sums = scratch.column[1];
      std::memset(sums, 0, sizeof(T) * kTileColumns);
      with_weights<Kind>(task, at, part.column_tile, scratch, [&](const auto& tile) {
        if (task.log_q_sums != nullptr) {
          write_for_keys<Dot, true>(tile, task.row_factor + at.row, at.rows, part.begin, end, sums, scratch.weights);
        } else {
          write_for_keys<Dot, false>(tile, task.row_factor + at.row, at.rows, part.begin, end, sums, scratch.weights);
        }
      });
      if (task.log_q_sums != nullptr) {
        for (int64_t c = part.begin; c < part.end; ++c) {
          double& to = task.log_q_sums[at.column + c];
          to = (i > 0 ? to : 0.0) + static_cast<double>(sums[c]);
        }
      }
      multiply<Dot, 1, kTileStride>(scratch.weights, kGroup, (part.end - part.begin + kGroup - 1) / kGroup,
                                    task.query_rows + at.row / Dot::kColumns * kPanel<Dot>, task.query_panel,
                                    task.padded_width / kPanel<Dot>, words_of(at.rows, Dot::kColumns),
                                    task.key_sums + (at.column + part.begin) * task.padded_width, task.padded_width,
                                    i > 0);
    }
  });
}

template <typename T>
void key_gradients(const Backward<T>& task, const Finish<T>& finish, int64_t begin, int64_t end) {
  with_kind<T>(task.logits.element, [&](auto kind) {
    using Raw = typename decltype(kind)::Raw;
    const int64_t width = finish.key.width;
    for (int64_t j = begin; j < end; ++j) {
      T* const sum = task.key_sums + j * task.padded_width;
      for (int64_t n = finish.wanted_offsets[j]; n < finish.wanted_offsets[j + 1]; ++n) {
        const int64_t r = finish.wanted[n];
        const T factor = finish.positive_slope[r] * task.row_factor[r];
        if (factor == T(0)) continue;
        add_row(factor, static_cast<const Raw*>(finish.query.values) + r * finish.query.stride, width, sum);
      }
      const Raw* const k = static_cast<const Raw*>(finish.key.values) + j * finish.key.stride;
      const double* const norm = finish.key_norm != nullptr && !all_zero(sum, width) ? finish.key_norm + j : nullptr;
      write_through_norm(sum, k, norm, width, static_cast<Raw*>(finish.grad_key) + j * width);
    }
  });
}

template <typename T>
void count_kept(const Logits<T>& logits, int64_t row_tile, Scratch<T>& scratch, int64_t* kept) {
  const int64_t tiles = (logits.columns + kTileColumns - 1) / kTileColumns;
  for (int64_t j = 0; j < tiles; ++j) {
    const Place at(logits, row_tile, j);
    kept_pairs(logits, at, scratch);
    for (int64_t i = 0; i < at.rows; ++i) {
      int64_t here = 0;
      for (int64_t w = 0; w < kBitWords; ++w) here += __builtin_popcountll(scratch.bits[i * kBitWords + w]);
      kept[i] = (j > 0 ? kept[i] : 0) + here;
    }
  }
}

template <typename T>
void pack(Element element, const Matrix& matrix, int64_t begin, int64_t end, const uint8_t* alive, int64_t panel, T* out) {
  with_kind<T>(element, [&](auto kind) {
    pack_rows<typename decltype(kind)::Dot>(static_cast<const typename decltype(kind)::Raw*>(matrix.values), matrix.stride,
                                            begin, end, matrix.width, alive, panel, out);
  });
}

template <typename T>
constexpr InfoNceBackward<T> kKernels = {kPanel<Plain<T>>, pack<T>, count_kept<T>, row_gradients<T>, key_sums<T>, key_gradients<T>};

}  // namespace

void infonce_kernels(InfoNceBackward<float>& kernels) { kernels = kKernels<float>; }
void infonce_kernels(InfoNceBackward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
