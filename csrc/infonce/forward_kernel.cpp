// InfoNCE, the forward: a tile of logits, its exponentials and their sums along both directions.
//
//     n_i = ceil max_j x_ij        e_ij = 2^(x_ij − n_i)        rows: Σ_j e_ij        keys: Σ_i e_ij 2^(n_i − max n)
//
// so one exponential serves both directions. A key whose logits all lie kSpread or more below the tile's highest would lose
// digits there; such tiles take a second exponential, 2^(x_ij − ceil max_i x_ij), and are marked for the backward.
//
// Per tile: one product of 2 · 96 · 192 · D flops from packed operands; e_ij is written once where it is kept (4 bytes a logit,
// 2 for bfloat16), sums are 2 numbers per row and per key. A row's reference is its own maximum, so no sum overflows and none
// is lost.

#include "../common/exp2.h"
#include "../common/pack.h"
#include "logits.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

constexpr int kSpread = 60;

// The reference of logits up to `most`: whole, and not below any of them, which are computed once with and once without it and
// round differently where they are huge.
template <typename T>
MMREC_INLINE T reference(T most) {
  constexpr T kSlack = sizeof(T) == 4 ? T(0x1p-22) : T(0x1p-51);
  return most > -__builtin_huge_val() ? static_cast<T>(__builtin_ceil(most + __builtin_fabs(most) * kSlack)) : kNothing<T>;
}

// Where a row and its keys have their maxima, and how its logits compare with its positive.
template <bool kMasked, PerKey per_key, typename T>
void find_maxima(const Logits<T>& logits, const ForwardTile<T>& task, const Place& at, int64_t i, Scratch<T>& scratch) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const V lowest = broadcast(-static_cast<T>(__builtin_huge_val())), zero = broadcast(T(0));
  const int64_t r = at.row + i;
  const LogitRow<per_key, T> row(logits, r);
  const uint64_t* const bits = scratch.bits + i * kBitWords;
  T* const column_max = scratch.column[0];
  const bool columns = task.symmetric;
  const V positive = task.rank != nullptr ? broadcast(task.positive[r]) : zero;
  V highest = lowest, total = zero;
  int64_t above = 0, kept = 0;
  for (int64_t c = 0; c < at.padded_columns; c += kLanes) {
    V x = row.less(logits, at.column + c, load(scratch.tile + i * kTileStride + c), zero);
    if constexpr (kMasked) x = select(lane_bits<kLanes>(bits, c), x, lowest);
    highest = max(x, highest);
    if (columns) store(column_max + c, max(x, load(column_max + c)));
    if (task.rank != nullptr) above += __builtin_popcount(greater(x, positive));
    if (task.total != nullptr) {
      if constexpr (kMasked) {
        kept += __builtin_popcount(lane_bits<kLanes>(bits, c));
        x = select(lane_bits<kLanes>(bits, c), x, zero);
      }
      total = add(total, x);
    }
  }
  const T most = reduce_max(highest);
  scratch.row[0][i] = reference(most);
  if (task.rank != nullptr) task.rank[r] += above;
  if (task.total != nullptr) {
    task.total[r] += static_cast<double>(reduce_add(total));
    task.kept[r] += kMasked ? kept : at.columns;
  }
}

enum class Direction { kRows, kBothShared, kBothOwn };

// A row's exponentials and their sum, into row[1], and those of its keys, added to column[1] with the references in column[2].
template <typename Raw, bool kMasked, PerKey per_key, Direction direction, typename T>
void sum_exponentials(const Logits<T>& logits, const Place& at, int64_t i, T highest_ref, Raw* keep, Scratch<T>& scratch) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  const V zero = broadcast(T(0));
  T* const column_sum = scratch.column[1];
  const T* const column_ref = scratch.column[2];
  const LogitRow<per_key, T> row(logits, at.row + i);
  const uint64_t* const bits = scratch.bits + i * kBitWords;
  const T* const dots = scratch.tile + i * kTileStride;
  const T ref = scratch.row[0][i];
  const V minus_ref = broadcast(-ref);
  V shift = zero;
  if constexpr (direction == Direction::kBothShared) shift = exp2<T>(broadcast(ref - highest_ref));
  V sum = zero;
  for (int64_t c = 0; c < at.padded_columns; c += kLanes) {
    const V dot = load(dots + c);
    V e = exp2<T>(row.less(logits, at.column + c, dot, minus_ref));
    if constexpr (kMasked) e = select(lane_bits<kLanes>(bits, c), e, zero);
    sum = add(sum, e);
    if constexpr (direction == Direction::kBothShared) {
      store(column_sum + c, fma(e, shift, load(column_sum + c)));
    }
    if constexpr (direction == Direction::kBothOwn) {
      V own = exp2<T>(row.less(logits, at.column + c, dot, sub(zero, load(column_ref + c))));
      if constexpr (kMasked) own = select(lane_bits<kLanes>(bits, c), own, zero);
      store(column_sum + c, add(own, load(column_sum + c)));
    }
    if (keep != nullptr) store(keep + i * at.padded_columns + c, e);
  }
  scratch.row[1][i] = reduce_add(sum);
}

// The same for all rows of a tile.
template <PerKey per_key, typename T>
void find_maxima(const Logits<T>& logits, const ForwardTile<T>& task, const Place& at, Scratch<T>& scratch) {
  const auto lowest = broadcast(-static_cast<T>(__builtin_huge_val()));
  for (int64_t c = 0; c < at.padded_columns; c += Vec<T>::kLanes) store(scratch.column[0] + c, lowest);
  for (int64_t i = 0; i < at.rows; ++i) {
    scratch.masked[i] ? find_maxima<true, per_key>(logits, task, at, i, scratch)
                      : find_maxima<false, per_key>(logits, task, at, i, scratch);
  }
}

template <PerKey per_key, Direction direction, typename Raw, typename T>
void sum_exponentials(const Logits<T>& logits, const Place& at, T highest_ref, Raw* keep, Scratch<T>& scratch) {
  std::memset(scratch.column[1], 0, sizeof(T) * kTileColumns);
  for (int64_t i = 0; i < at.rows; ++i) {
    scratch.masked[i] ? sum_exponentials<Raw, true, per_key, direction>(logits, at, i, highest_ref, keep, scratch)
                      : sum_exponentials<Raw, false, per_key, direction>(logits, at, i, highest_ref, keep, scratch);
  }
}

// Adds sums with whole references to sums with other ones; what references differ by are powers of two, so no digit is lost.
// Works on whole vectors: all arrays are padded.
template <typename T>
void merge(const Partial<T>& into, int64_t first, const T* ref, const T* sum, int64_t count) {
  using V = Vec<T>;
  const V zero = broadcast(T(0)), nothing = broadcast(kNothing<T>);
  for (int64_t i = 0; i < count; i += V::kLanes) {
    const V old_sum = load(into.sum + first + i), new_sum = load(sum + i);
    const V old_ref = load(into.ref + first + i), new_ref = select(greater(new_sum, zero), load(ref + i), nothing);
    const V top = max(old_ref, new_ref);
    store(into.sum + first + i,
          add(mul(old_sum, exp2<T>(sub(old_ref, top))), mul(new_sum, exp2<T>(sub(new_ref, top)))));
    store(into.ref + first + i, top);
  }
}

template <typename Kind, PerKey per_key, typename T>
void finish_tile(const Logits<T>& logits, const ForwardTile<T>& task, const Place& at, Scratch<T>& scratch) {
  using Stored = typename Kind::Raw;
  find_maxima<per_key>(logits, task, at, scratch);
  Stored* keep = nullptr;
  if (task.keep != nullptr) {
    const Exponentials<T>& kept = *task.keep;
    keep = static_cast<Stored*>(kept.values) + (at.row - kept.first_row) * kept.padded_columns + at.rows * at.column;
    std::memcpy(kept.refs + task.column_tile * kept.rows + at.row - kept.first_row, scratch.row[0],
                sizeof(T) * static_cast<size_t>(at.rows));
  }
  T highest = kNothing<T>;
  for (int64_t i = 0; i < at.rows; ++i) highest = scratch.row[0][i] > highest ? scratch.row[0][i] : highest;
  bool shared = true;
  if (!task.symmetric) {
    sum_exponentials<per_key, Direction::kRows>(logits, at, highest, keep, scratch);
  } else {
    for (int64_t c = 0; c < at.columns; ++c) {
      const T most = scratch.column[0][c];
      if (most > -__builtin_huge_val() && highest - most > kSpread) shared = false;
    }
    T* const refs = scratch.column[2];
    for (int64_t c = 0; c < at.padded_columns; ++c) {
      const T most = scratch.column[0][c];
      refs[c] = shared ? highest : reference(most);
    }
    if (shared) {
      sum_exponentials<per_key, Direction::kBothShared>(logits, at, highest, keep, scratch);
    } else {
      sum_exponentials<per_key, Direction::kBothOwn>(logits, at, highest, keep, scratch);
    }
    if (task.columns.ref != nullptr) merge(task.columns, at.column, refs, scratch.column[1], at.columns);
  }
  if (task.rows.ref != nullptr) merge(task.rows, at.row, scratch.row[0], scratch.row[1], at.rows);
  if (task.keep != nullptr) {
    const Exponentials<T>& kept = *task.keep;
    const int64_t tiles = (kept.padded_columns + kTileColumns - 1) / kTileColumns;
    kept.exact[(at.row - kept.first_row) / kTileRows * tiles + task.column_tile] = shared ? T(1) : T(0);
  }
}

template <typename T>
void forward(const Logits<T>& logits, const ForwardTile<T>& task, Scratch<T>& scratch) {
  const Place at(logits, task.row_tile, task.column_tile);
  kept_pairs(logits, at, scratch);
  with_kind<T>(logits.element, [&](auto kind) {
    using Kind = decltype(kind);
    dot_products<typename Kind::Dot>(logits, at, scratch.tile);
    with_per_key(logits, [&](auto per_key) { finish_tile<Kind, per_key.value>(logits, task, at, scratch); });
  });
}

// A group of rows against the keys that they want, gathered into a panel: the diagonal, as the tile's own products make it.
template <typename T>
void positives(const Logits<T>& logits, int64_t row_tile, Scratch<T>& scratch, T* out) {
  with_kind<T>(logits.element, [&](auto kind) {
    using Dot = typename decltype(kind)::Dot;
    constexpr int64_t kColumns = kPanel<Dot>, kChain = kLogitChain<Dot>;
    constexpr int64_t kRows = kGroup < kColumns ? kGroup : kColumns;
    const Place at(logits, row_tile, 0);
    T* const panel = scratch.weights;
    std::memset(scratch.tile, 0, sizeof(scratch.tile));  // what products over no width at all leave
    for (int64_t first = 0, count = 0; first < at.rows; first += count) {
      const int64_t group = first / kGroup * kGroup;
      const T* const queries = logits.query_groups + (at.row + group) * logits.depth;
      count = at_most(at.rows - first, at_most(kRows, group + kGroup - first));
      for (int64_t k = 0; k < logits.depth; k += kChain) {
        const int64_t chain = at_most(logits.depth - k, kChain);
        std::memset(panel, 0, sizeof(T) * static_cast<size_t>(chain * kColumns));
        for (int64_t i = 0; i < count; ++i) {
          const int64_t t = logits.target[at.row + first + i];
          if (t < 0) continue;
          const T* const key = logits.key_panels + t / kColumns * kColumns * logits.depth + t % kColumns;
          for (int64_t d = 0; d < chain; ++d) std::memcpy(panel + d * kColumns + i, key + (k + d) * kColumns, sizeof(T));
        }
        multiply<Dot, 1, kGroup, kChain>(queries + k * kGroup, 0, 1, panel, 0, 1, chain, scratch.tile, kColumns, k > 0);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t r = at.row + first + i, t = logits.target[r];
        T lanes[Vec<T>::kLanes] = {scratch.tile[(first - group + i) * kColumns + i]};
        if (t >= 0 && logits.kappa != nullptr) lanes[0] *= logits.kappa[t];
        store(lanes, LogitRow<PerKey::kNothing, T>(logits, r).less(logits, 0, load(lanes), broadcast(T(0))));
        out[first + i] = t < 0 ? T(0) : logits.bias != nullptr ? lanes[0] - logits.bias[t] : lanes[0];
      }
    }
  });
}

template <typename T, bool kKeys>
void pack(Element element, const Matrix& matrix, int64_t tile, T* out) {
  with_kind<T>(element, [&](auto kind) {
    using Dot = typename decltype(kind)::Dot;
    constexpr int64_t kRows = kKeys ? kTileColumns : kTileRows, kLanes = kKeys ? kPanel<Dot> : kGroup;
    const auto* const rows = static_cast<const typename decltype(kind)::Raw*>(matrix.values);
    const int64_t depth = words_of(matrix.width, Dot::kColumns), end = at_most(kRows * (tile + 1), matrix.rows);
    for (int64_t row = kRows * tile; row < round_up(end, kKeys ? kColumnUnit : kLanes); row += kLanes) {
      pack_lanes<Dot>(rows + row * matrix.stride, matrix.stride, row < end ? at_most(kLanes, end - row) : 0,
                      matrix.width, kLanes, out + row * depth);
    }
  });
}

template <typename T>
void norms(Element element, const Matrix& matrix, int64_t begin, int64_t end, double* out) {
  with_kind<T>(element, [&](auto kind) {
    const auto* const rows = static_cast<const typename decltype(kind)::Raw*>(matrix.values);
    for (int64_t i = begin; i < end; ++i) {
      const auto* const row = rows + i * matrix.stride;
      out[i] = __builtin_sqrt(dot_in_double(row, row, matrix.width));
    }
  });
}

template <typename T>
void dots(Element element, const Matrix& query, const Matrix& key, const int64_t* target, int64_t begin, int64_t end,
          double* out) {
  with_kind<T>(element, [&](auto kind) {
    using Raw = typename decltype(kind)::Raw;
    const Raw *const queries = static_cast<const Raw*>(query.values), *const keys = static_cast<const Raw*>(key.values);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = target[i];
      out[i] = t < 0 ? 0.0 : dot_in_double(queries + i * query.stride, keys + t * key.stride, query.width);
    }
  });
}

template <typename T>
constexpr InfoNceForward<T> kKernels = {pack<T, false>, pack<T, true>, norms<T>, dots<T>, positives<T>, forward<T>};

}  // namespace

void infonce_kernels(InfoNceForward<float>& kernels) { kernels = kKernels<float>; }
void infonce_kernels(InfoNceForward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
