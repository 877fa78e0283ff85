// InfoNCE on CPU: division of the tiles into tasks, what forward and backward return, registration.
//
// Forward and backward with the exponentials kept are three products of 2 · Nq · Nk · D flops, else four: the backward then
// makes the exponentials again, for as many rows at a time as the workspace allows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>

#include "../common/check.h"
#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;

// Sums over one side are kept in at most this many parts, each over a strip of whole tiles.
constexpr int64_t kMaxStrips = 64;
// Exponentials that are made again in the backward take no more than this, however large the workspace.
constexpr int64_t kChunkBytes = int64_t{32} << 20;

template <typename T>
constexpr ScalarType kScalar = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

template <typename T>
std::unique_ptr<Scratch<T>> make_scratch() {
  return std::unique_ptr<Scratch<T>>(new Scratch<T>);
}

double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }

// 2^e for whole e ≤ 0.
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
    return total == 0.0 ? -std::numeric_limits<double>::infinity() : (top + std::log2(total)) * kLn2;
  }

 private:
  int64_t strips_, padded_;
  Buffer<T> ref_, sum_;
};

template <typename T>
struct Wanted {
  bool symmetric, mean, rank, save;
};

// Σ over strips of what each strip counted, [strip][rows].
template <typename N>
N over_strips(const std::vector<N>& counted, int64_t strips, int64_t rows, int64_t row) {
  N total = 0;
  for (int64_t s = 0; s < strips; ++s) total += counted[s * rows + row];
  return total;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward_as(const Arguments& arguments, bool need_mean,
                                                                      bool need_rank, bool save,
                                                                      int64_t workspace_bytes) {
  Problem<T> problem(arguments);
  problem.pack_logits();
  const int64_t rows = problem.query.rows, columns = problem.key.rows;
  const int64_t row_tiles = problem.row_tiles(), column_tiles = problem.column_tiles();
  const auto made = [&](int64_t size, ScalarType type) { return torch::stable::new_empty(arguments.query, {size}, type); };
  Tensor positive = made(rows, ScalarType::Double), row_lse = made(rows, ScalarType::Double);
  Tensor column_lse = made(arguments.symmetric ? columns : 0, ScalarType::Double);
  Tensor mean = made(need_mean ? rows : 0, ScalarType::Double), rank = made(need_rank ? rows : 0, ScalarType::Long);

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
  std::vector<double> total(counters(need_mean));
  std::vector<int64_t> kept(counters(need_mean)), above(counters(need_rank));
  std::vector<T> references(static_cast<size_t>(need_rank ? row_tiles * kTileRows : 0));
  if (need_rank) {
    for_each_task(row_tiles, make_scratch<T>, [&](int64_t tile, const auto& scratch) {
      problem.kernels.forward.positives(problem.logits, tile, *scratch, references.data() + tile * kTileRows);
    });
  }
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
    if (need_mean) {
      tile.total = total.data() + column_strip * rows;
      tile.kept = kept.data() + column_strip * rows;
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
      if (need_mean) {
        const double sum = over_strips(total, column_strips, rows, i) * kLn2 + positives[i];
        doubles(mean)[i] = term ? sum / static_cast<double>(over_strips(kept, column_strips, rows, i) + 1) : 0.0;
      }
      if (need_rank) {
        static_cast<int64_t*>(rank.mutable_data_ptr())[i] = term ? over_strips(above, column_strips, rows, i) : -1;
      }
    }
  });
  if (arguments.symmetric) {
    double* const to_column = doubles(column_lse);
    for_each_range(columns, 256, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) to_column[j] = column_sums.log(j);
    });
  }
  return {positive, row_lse, column_lse, mean, rank, saved};
}

// The slopes of one side: grad · 2^(x − lse) as slope · 2^(x − ref) with a whole ref. Where nothing was summed, or nothing comes
// back, the slope is 0 and the reference above all others.
template <typename T>
void find_slopes(const std::optional<Tensor>& grad, const Tensor& lse, int64_t padded, std::vector<T>& slope,
                 std::vector<T>& ref) {
  slope.assign(static_cast<size_t>(padded), T(0));
  ref.assign(static_cast<size_t>(padded), T(1e30));
  if (!grad) return;
  const Tensor grads = torch::stable::contiguous(*grad), lses = torch::stable::contiguous(lse);
  const double *const g = doubles(grads), *const l = doubles(lses);
  for (int64_t i = 0; i < grads.size(0); ++i) {
    if (g[i] == 0.0 || l[i] == -std::numeric_limits<double>::infinity()) continue;
    const double whole = std::ceil(l[i] * kLog2E);
    ref[i] = static_cast<T>(whole);
    slope[i] = static_cast<T>(g[i] * std::exp2(whole - l[i] * kLog2E));
  }
}

// For each key the rows that want it, in ascending order.
void find_wanted(const std::vector<int64_t>& target, int64_t columns, std::vector<int64_t>& offsets,
                 std::vector<int64_t>& wanted) {
  offsets.assign(static_cast<size_t>(columns) + 1, 0);
  for (const int64_t t : target) {
    if (t >= 0) ++offsets[t + 1];
  }
  for (int64_t j = 0; j < columns; ++j) offsets[j + 1] += offsets[j];
  wanted.resize(static_cast<size_t>(offsets[columns]));
  std::vector<int64_t> next(offsets.begin(), offsets.end() - 1);
  for (size_t i = 0; i < target.size(); ++i) {
    if (target[i] >= 0) wanted[next[target[i]]++] = static_cast<int64_t>(i);
  }
}

struct Needs {
  bool query, key, scale, log_q;
  bool rows() const { return query || scale; }
  bool keys() const { return key || log_q; }
};

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward_as(const Arguments& arguments,
                                                       const std::optional<Tensor>& grad_positive,
                                                       const std::optional<Tensor>& grad_row_lse,
                                                       const std::optional<Tensor>& grad_column_lse,
                                                       const std::optional<Tensor>& grad_mean, const Tensor& row_lse,
                                                       const Tensor& column_lse, const Tensor& saved, const Needs& needs,
                                                       int64_t workspace_bytes) {
  Problem<T> problem(arguments);
  const int64_t rows = problem.query.rows, columns = problem.key.rows, width = problem.query.width;
  const int64_t row_tiles = problem.row_tiles(), column_tiles = problem.column_tiles();
  Tensor grad_query = needs.query ? torch::stable::new_empty(arguments.query, {rows, width})
                                  : torch::stable::new_empty(arguments.query, {0});
  Tensor grad_key = needs.key ? torch::stable::new_empty(arguments.key, {columns, width})
                              : torch::stable::new_empty(arguments.key, {0});
  Tensor grad_scale =
      torch::stable::new_empty(arguments.query, {needs.scale ? arguments.scale.size(0) : 0}, kScalar<T>);
  Tensor grad_log_q = torch::stable::new_empty(arguments.query, {needs.log_q ? columns : 0}, kScalar<T>);

  // What comes back from above.
  std::vector<T> row_slope, row_ref, column_slope, column_ref, mean_slope, positive_slope(static_cast<size_t>(rows));
  find_slopes(grad_row_lse, row_lse, rows, row_slope, row_ref);
  if (grad_column_lse) find_slopes(grad_column_lse, column_lse, column_tiles * kTileColumns, column_slope, column_ref);
  std::vector<double> positive(static_cast<size_t>(rows));
  if (grad_positive) std::memcpy(positive.data(), doubles(torch::stable::contiguous(*grad_positive)), sizeof(double) * rows);
  if (grad_mean) {
    std::vector<int64_t> kept(static_cast<size_t>(row_tiles * kTileRows));
    for_each_task(row_tiles, make_scratch<T>, [&](int64_t tile, const auto& scratch) {
      problem.kernels.backward.count_kept(problem.logits, tile, *scratch, kept.data() + tile * kTileRows);
    });
    const Tensor means = torch::stable::contiguous(*grad_mean);
    mean_slope.resize(static_cast<size_t>(rows));
    for (int64_t i = 0; i < rows; ++i) {
      const double share = problem.has_term(i) ? doubles(means)[i] / static_cast<double>(kept[i] + 1) : 0.0;
      mean_slope[i] = static_cast<T>(share);
      positive[i] += share;
    }
  }
  for (int64_t i = 0; i < rows; ++i) positive_slope[i] = problem.has_term(i) ? static_cast<T>(positive[i]) : T(0);

  // The exponentials: all of them, or room for those of some rows.
  const bool made_again = saved.numel() == 0;
  const int64_t row_bytes = std::max<int64_t>(problem.padded_columns() * arguments.query.element_size(), 1);
  const int64_t chunk_tiles =
      std::clamp<int64_t>(std::min(workspace_bytes, kChunkBytes) / (row_bytes * kTileRows), 1, std::max<int64_t>(row_tiles, 1));
  const int64_t chunk_rows = made_again ? std::min(chunk_tiles * kTileRows, rows) : rows;
  Buffer<char> chunk(made_again ? exponential_bytes(problem, chunk_rows) : 0);
  bool all_exact = !made_again;
  if (!made_again) {
    const Exponentials<T> kept = exponentials_in<T>(saved.mutable_data_ptr(), problem, 0, rows);
    all_exact = std::all_of(kept.exact, kept.exact + row_tiles * column_tiles, [](T exact) { return exact != T(0); });
  }
  if (!all_exact) problem.pack_logits();

  Backward<T> task{};
  task.logits = problem.logits;
  task.slopes = {row_slope.data(), row_ref.data(), grad_column_lse ? column_slope.data() : nullptr,
                 grad_column_lse ? column_ref.data() : nullptr, grad_mean ? mean_slope.data() : nullptr};
  task.padded_width = round_up(width, kColumnUnit);
  task.row_factor = problem.row_factor.data();
  // Rows of both sides as right operands; a word of pairs holds two rows.
  const int64_t per_word = problem.logits.element == Element::kBFloat16Pairs ? 2 : 1;
  const auto packed = [&](const Matrix& matrix, int64_t tile, const std::vector<uint8_t>& alive, const T*& to,
                          int64_t& panel) {
    const int64_t padded = round_up(matrix.rows, tile) / per_word;
    Buffer<T> panels(padded * task.padded_width);
    // Of every ISA's panels: [panel][row][columns], so that padded · columns words lie between two of them.
    panel = padded * problem.kernels.backward.panel_columns;
    for_each_range(matrix.rows, tile, [&](int64_t begin, int64_t end) {
      problem.kernels.backward.pack_rows(problem.logits.element, matrix, begin, end, alive.data(), panel, panels.get());
    });
    to = panels.get();
    return panels;
  };
  Buffer<T> key_rows, query_rows, key_sums;
  Buffer<double> log_q_sums;
  if (needs.rows()) key_rows = packed(problem.key, kTileColumns, problem.alive_keys(), task.key_rows, task.key_panel);
  if (needs.keys()) {
    query_rows = packed(problem.query, kTileRows, problem.alive_rows(), task.query_rows, task.query_panel);
    key_sums = Buffer<T>(column_tiles * kTileColumns * task.padded_width);
    task.key_sums = key_sums.get();
    if (rows == 0) std::fill_n(task.key_sums, columns * task.padded_width, T(0));
    if (needs.log_q) {
      log_q_sums = Buffer<double>(column_tiles * kTileColumns);
      task.log_q_sums = log_q_sums.get();
      std::fill_n(task.log_q_sums, columns, 0.0);
    }
  }
  std::vector<int64_t> offsets, wanted;
  find_wanted(problem.target, columns, offsets, wanted);
  std::vector<double> scale_slopes(static_cast<size_t>(needs.scale ? rows : 0));
  const Finish<T> finish{problem.query, problem.key, problem.target.data(), positive_slope.data(), problem.scale.data(),
                         problem.query_norm.empty() ? nullptr : problem.query_norm.data(),
                         problem.key_norm.empty() ? nullptr : problem.key_norm.data(), offsets.data(), wanted.data(),
                         needs.query ? grad_query.mutable_data_ptr() : nullptr,
                         needs.key ? grad_key.mutable_data_ptr() : nullptr,
                         needs.scale ? scale_slopes.data() : nullptr};

  // Smaller parts where there are few tiles for the threads; a row's and a key's bits do not depend on its part.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t in_chunk = divide_up(chunk_rows, kTileRows);
  const int64_t row_part = in_chunk >= 4 * threads ? kTileRows : in_chunk >= 2 * threads ? kTileRows / 2 : kTileRows / 4;
  const int64_t column_part = column_tiles >= 4 * threads ? kTileColumns : kTileColumns / 2;
  struct RowState {
    std::unique_ptr<Scratch<T>> scratch;
    Buffer<T> sums;
  };
  const int64_t step = std::max<int64_t>(made_again ? chunk_rows : rows, 1);
  for (int64_t first = 0; first < rows; first += step) {
    const int64_t here = std::min(step, rows - first);
    void* const memory = made_again ? chunk.get() : saved.mutable_data_ptr();
    task.exponentials = exponentials_in<T>(memory, problem, first, here);
    const int64_t first_tile = first / kTileRows, tiles = divide_up(here, kTileRows);
    if (made_again) {
      for_each_task(tiles * column_tiles, make_scratch<T>, [&](int64_t n, const auto& scratch) {
        ForwardTile<T> tile{};
        tile.row_tile = first_tile + n / column_tiles;
        tile.column_tile = n % column_tiles;
        tile.symmetric = grad_column_lse.has_value();
        tile.keep = &task.exponentials;
        problem.kernels.forward.forward(problem.logits, tile, *scratch);
      });
    }
    if (needs.rows()) {
      const auto make_state = [&] {
        return RowState{make_scratch<T>(), Buffer<T>(kTileRows * task.padded_width)};
      };
      for_each_task(divide_up(here, row_part), make_state, [&](int64_t n, const RowState& state) {
        const int64_t row = first + n * row_part, tile = row / kTileRows, begin = row - tile * kTileRows;
        const int64_t end = std::min(begin + row_part, rows - tile * kTileRows);
        problem.kernels.backward.row_gradients(task, finish, {tile, 0, begin, end}, *state.scratch, state.sums.get());
      });
    }
    if (needs.keys()) {
      for_each_task(divide_up(columns, column_part), make_scratch<T>, [&](int64_t n, const auto& scratch) {
        const int64_t column = n * column_part, tile = column / kTileColumns, begin = column - tile * kTileColumns;
        const int64_t end = std::min(begin + column_part, columns - tile * kTileColumns);
        problem.kernels.backward.key_sums(task, {0, tile, begin, end}, *scratch);
      });
    }
  }
  if (needs.key) {
    for_each_range(columns, 64, [&](int64_t begin, int64_t end) {
      problem.kernels.backward.key_gradients(task, finish, begin, end);
    });
  }
  if (needs.scale) {
    T* const to = static_cast<T*>(grad_scale.mutable_data_ptr());
    if (grad_scale.size(0) != rows) {
      double sum = 0;
      for (const double slope : scale_slopes) sum += slope;
      to[0] = static_cast<T>(sum);
    } else {
      for (int64_t i = 0; i < rows; ++i) to[i] = static_cast<T>(scale_slopes[i]);
    }
  }
  if (needs.log_q) {
    T* const to = static_cast<T*>(grad_log_q.mutable_data_ptr());
    for (int64_t j = 0; j < columns; ++j) {
      double sum = task.log_q_sums[j];
      for (int64_t n = offsets[j]; n < offsets[j + 1]; ++n) sum += positive[wanted[n]];
      to[j] = static_cast<T>(-sum);
    }
  }
  return {grad_query, grad_key, grad_scale, grad_log_q};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& query, const Tensor& key, const Tensor& scale, const std::optional<Tensor>& target,
    const std::optional<Tensor>& query_mask, const std::optional<Tensor>& key_mask, const std::optional<Tensor>& query_ids,
    const std::optional<Tensor>& key_ids, const std::optional<Tensor>& exclude_offsets,
    const std::optional<Tensor>& exclude_positions, const std::optional<Tensor>& log_q, bool symmetric, bool normalize,
    bool need_mean, bool need_rank, bool save, int64_t workspace_bytes) {
  const Arguments arguments{query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                            exclude_positions, log_q, symmetric, normalize};
  return query.scalar_type() == ScalarType::Double
             ? forward_as<double>(arguments, need_mean, need_rank, save, workspace_bytes)
             : forward_as<float>(arguments, need_mean, need_rank, save, workspace_bytes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const std::optional<Tensor>& grad_positive, const std::optional<Tensor>& grad_row_lse,
    const std::optional<Tensor>& grad_column_lse, const std::optional<Tensor>& grad_mean, const Tensor& query,
    const Tensor& key, const Tensor& scale, const std::optional<Tensor>& target, const std::optional<Tensor>& query_mask,
    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids,
    const std::optional<Tensor>& exclude_offsets, const std::optional<Tensor>& exclude_positions,
    const std::optional<Tensor>& log_q, bool symmetric, bool normalize, const Tensor& row_lse, const Tensor& column_lse,
    const Tensor& saved, bool need_query, bool need_key, bool need_scale, bool need_log_q, int64_t workspace_bytes) {
  const Arguments arguments{query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                            exclude_positions, log_q, symmetric, normalize};
  const Needs needs{need_query, need_key, need_scale, need_log_q};
  return query.scalar_type() == ScalarType::Double
             ? backward_as<double>(arguments, grad_positive, grad_row_lse, grad_column_lse, grad_mean, row_lse, column_lse,
                                   saved, needs, workspace_bytes)
             : backward_as<float>(arguments, grad_positive, grad_row_lse, grad_column_lse, grad_mean, row_lse, column_lse,
                                  saved, needs, workspace_bytes);
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) {
  m.impl("_infonce_forward", TORCH_BOX(&mmrec::forward));
  m.impl("_infonce_backward", TORCH_BOX(&mmrec::backward));
}
