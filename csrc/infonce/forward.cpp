// InfoNCE on CPU, the forward: division of the tiles into tasks, sums over tiles, registration.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "../common/natural_log.h"
#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;

// Sums over one side are kept in at most this many parts, each over a strip of whole tiles.
constexpr int64_t kMaxStrips = 64;

// 2^e for whole e ≤ 0. (exp2 of glibc 2.29 would ask for a newer system than all else does.)
double power_of_two(double e) {
  if (!(e >= -1022.0)) return e != e ? e : 0.0;
  const uint64_t bits = static_cast<uint64_t>(static_cast<int64_t>(e) + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Σ 2^x of every entry, over `strips` parts [strip][padded], and its natural logarithm.
template <typename T>
class Sums {
 public:
  Sums(int64_t strips, int64_t padded) : strips_(strips), padded_(padded), ref_(strips * padded), sum_(strips * padded) {}

  Partial<T> strip(int64_t s, int64_t begin, int64_t end) const {
    const Partial<T> made{ref_.get() + s * padded_, sum_.get() + s * padded_};
    std::fill(made.ref + begin, made.ref + end, T(-1e30));
    std::fill(made.sum + begin, made.sum + end, T(0));
    return made;
  }

  double log(int64_t i) const {
    double top = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t s = 0; s < strips_; ++s) {
      if (sum_[s * padded_ + i] != T(0)) top = std::max(top, static_cast<double>(ref_[s * padded_ + i]));
    }
    for (int64_t s = 0; s < strips_; ++s) {
      const double sum = sum_[s * padded_ + i];
      if (sum != 0.0) total += sum * power_of_two(static_cast<double>(ref_[s * padded_ + i]) - top);
    }
    return total == 0.0 ? -std::numeric_limits<double>::infinity() : top * kLn2 + natural_log(total);
  }

 private:
  int64_t strips_, padded_;
  Buffer<T> ref_, sum_;
};

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Σ over strips of what each strip counted, [strip][rows].
template <typename N>
N over_strips(const std::vector<N>& counted, int64_t strips, int64_t rows, int64_t row) {
  N total = 0;
  for (int64_t s = 0; s < strips; ++s) total += counted[s * rows + row];
  return total;
}

template <typename T>
Results forward_as(const Arguments& arguments, const std::optional<Tensor>& rank_reference, bool need_total, bool need_rank,
                   bool save, int64_t workspace_bytes) {
  Problem<T> problem(arguments);
  problem.pack_logits();
  const int64_t rows = problem.query.rows, columns = problem.key.rows;
  const int64_t row_tiles = problem.row_tiles(), column_tiles = problem.column_tiles();
  const auto made = [&](int64_t size, ScalarType type) { return torch::stable::new_empty(arguments.query, {size}, type); };
  Tensor positive = made(rows, ScalarType::Double), row_lse = made(rows, ScalarType::Double);
  Tensor column_lse = made(arguments.symmetric ? columns : 0, ScalarType::Double);
  Tensor total = made(need_total ? rows : 0, ScalarType::Double), kept = made(need_total ? rows : 0, ScalarType::Long);
  Tensor rank = made(need_rank ? rows : 0, ScalarType::Long);
  Tensor reference = made(need_rank ? rows : 0, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);

  const int64_t values = exponential_bytes(problem, rows);
  const int64_t logits_bytes = rows * problem.padded_columns() * arguments.query.element_size();
  Tensor saved = made(save && logits_bytes <= workspace_bytes ? values : 0, ScalarType::Byte);
  prefer_large_pages(saved.mutable_data_ptr(), saved.numel());
  const Exponentials<T> keep = exponentials_in<T>(saved.mutable_data_ptr(), problem, 0, rows);

  // Strips of tiles, whose sums are kept apart: a grid that only the shape decides.
  const int64_t row_step = std::max<int64_t>(divide_up(row_tiles, kMaxStrips), 1);
  const int64_t column_step = std::max<int64_t>(divide_up(column_tiles, kMaxStrips), 1);
  const int64_t row_strips = divide_up(row_tiles, row_step), column_strips = divide_up(column_tiles, column_step);
  const Sums<T> row_sums(column_strips, row_tiles * kTileRows);
  const Sums<T> column_sums(arguments.symmetric ? row_strips : 0, column_tiles * kTileColumns);
  const auto counters = [&](bool needed) { return static_cast<size_t>(needed ? column_strips * rows : 0); };
  std::vector<double> totals(counters(need_total));
  std::vector<int64_t> counts(counters(need_total)), above(counters(need_rank));
  std::vector<T> references(static_cast<size_t>(need_rank ? row_tiles * kTileRows : 0));
  if (need_rank && rank_reference) {
    const Tensor given = torch::stable::contiguous(*rank_reference);
    std::copy_n(static_cast<const T*>(given.const_data_ptr()), rows, references.begin());
  } else if (need_rank) {
    for_each_task(row_tiles, make_scratch<T>, [&](int64_t tile, const auto& scratch) {
      problem.kernels.forward.positives(problem.logits, tile, *scratch, references.data() + tile * kTileRows);
    });
  }
  if (need_rank) std::copy_n(references.begin(), rows, static_cast<T*>(reference.mutable_data_ptr()));
  for_each_task(row_strips * column_strips, make_scratch<T>, [&](int64_t task, const auto& scratch) {
    const int64_t row_strip = task / column_strips, column_strip = task % column_strips;
    const int64_t row_begin = row_strip * row_step, row_end = std::min(row_begin + row_step, row_tiles);
    const int64_t column_begin = column_strip * column_step, column_end = std::min(column_begin + column_step, column_tiles);
    ForwardTile<T> tile{};
    tile.symmetric = arguments.symmetric;
    tile.rows = row_sums.strip(column_strip, row_begin * kTileRows, row_end * kTileRows);
    if (tile.symmetric) {
      tile.columns = column_sums.strip(row_strip, column_begin * kTileColumns, column_end * kTileColumns);
    }
    tile.keep = saved.numel() > 0 ? &keep : nullptr;
    if (need_total) {
      tile.total = totals.data() + column_strip * rows;
      tile.kept = counts.data() + column_strip * rows;
    }
    if (need_rank) {
      tile.positive = references.data();
      tile.rank = above.data() + column_strip * rows;
    }
    for (tile.column_tile = column_begin; tile.column_tile < column_end; ++tile.column_tile) {
      for (tile.row_tile = row_begin; tile.row_tile < row_end; ++tile.row_tile) {
        problem.kernels.forward.forward(problem.logits, tile, *scratch);
      }
    }
  });

  const std::vector<double> positives = problem.positives();
  double* const to_positive = doubles(positive);
  double* const to_row = doubles(row_lse);
  for_each_range(rows, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const bool term = problem.has_term(i);
      to_positive[i] = positives[i];
      to_row[i] = term ? row_sums.log(i) : -std::numeric_limits<double>::infinity();
      if (need_total) {
        doubles(total)[i] = term ? over_strips(totals, column_strips, rows, i) * kLn2 + positives[i] : 0.0;
        integers(kept)[i] = term ? over_strips(counts, column_strips, rows, i) + (problem.has_positive(i) ? 1 : 0) : 0;
      }
      if (need_rank) {
        integers(rank)[i] = term ? over_strips(above, column_strips, rows, i) : -1;
      }
    }
  });
  if (arguments.symmetric) {
    double* const to_column = doubles(column_lse);
    for_each_range(columns, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) to_column[j] = column_sums.log(j);
    });
  }
  return {positive, row_lse, column_lse, total, kept, rank, reference, saved};
}

Results forward(
    const Tensor& query, const Tensor& key, const Tensor& scale, const std::optional<Tensor>& target,
    const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask, const std::optional<Tensor>& query_ids,
    const std::optional<Tensor>& key_ids, const std::optional<Tensor>& exclude_offsets,
    const std::optional<Tensor>& exclude_positions, const std::optional<Tensor>& log_q, bool symmetric, bool normalize,
    bool positives_elsewhere, const std::optional<Tensor>& rank_reference, bool need_total, bool need_rank, bool save, int64_t workspace_bytes) {
  const Arguments arguments{query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                            exclude_positions, log_q, symmetric, normalize, positives_elsewhere};
  return query.scalar_type() == ScalarType::Double
             ? forward_as<double>(arguments, rank_reference, need_total, need_rank, save, workspace_bytes)
             : forward_as<float>(arguments, rank_reference, need_total, need_rank, save, workspace_bytes);
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_infonce_forward", TORCH_BOX(&mmrec::forward)); }
