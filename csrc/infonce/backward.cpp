// InfoNCE on CPU, the backward: what comes back from above, division of the tiles into tasks, registration.
//
// With the exponentials kept, forward and backward are three products of 2 · Nq · Nk · D flops, else four: the exponentials are
// made again, for as many rows at a time as the workspace allows.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>

#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;

// Exponentials that are made again take no more than this, however large the workspace.
constexpr int64_t kChunkBytes = int64_t{32} << 20;

template <typename T>
constexpr ScalarType kScalar = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

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
    // 2^(whole − log2) as expm1: exp2 of glibc 2.29 would ask for a newer system.
    slope[i] = static_cast<T>(g[i] * (1.0 + std::expm1((whole - l[i] * kLog2E) * kLn2)));
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

// Gradients of the raw op's differentiable results; nothing where nobody uses one.
struct Upstream {
  const std::optional<Tensor>&positive, &row_lse, &column_lse, &total;
};

// What the forward left.
struct Saved {
  const Tensor &row_lse, &column_lse, &exponentials;
};

struct Needs {
  bool query, key, scale, log_q;
  bool rows() const { return query || scale; }
  bool keys() const { return key || log_q; }
};

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <typename T>
class Pass {
 public:
  Pass(const Arguments& arguments, const Upstream& upstream, const Saved& saved, const Needs& needs, int64_t workspace_bytes)
      : arguments_(arguments), needs_(needs), problem_(arguments) {
    find_upstream(upstream, saved);
    find_exponentials(saved, workspace_bytes);
    pack();
    find_finish();
  }

  Gradients run() {
    for (int64_t first = 0; first < rows(); first += chunk_rows_) {
      const int64_t here = std::min(chunk_rows_, rows() - first);
      task_.exponentials = exponentials_in<T>(memory_, problem_, first, here);
      if (made_again_) make_exponentials();
      if (needs_.rows()) make_row_gradients();
      if (needs_.keys()) add_key_sums();
    }
    if (needs_.key) {
      for_each_range(columns(), 64, [&](int64_t begin, int64_t end) {
        problem_.kernels.backward.key_gradients(task_, finish_, begin, end);
      });
    }
    if (needs_.scale) write_grad_scale();
    if (needs_.log_q) write_grad_log_q();
    return {grad_query_, grad_key_, grad_scale_, grad_log_q_};
  }

 private:
  int64_t rows() const { return problem_.query.rows; }
  int64_t columns() const { return problem_.key.rows; }
  int64_t width() const { return problem_.query.width; }

  void find_upstream(const Upstream& upstream, const Saved& saved) {
    find_slopes(upstream.row_lse, saved.row_lse, rows(), row_slope_, row_ref_);
    if (upstream.column_lse) {
      find_slopes(upstream.column_lse, saved.column_lse, problem_.column_tiles() * kTileColumns, column_slope_, column_ref_);
    }
    positive_.assign(static_cast<size_t>(rows()), 0.0);
    if (upstream.positive) {
      const Tensor grad = torch::stable::contiguous(*upstream.positive);
      std::copy_n(doubles(grad), rows(), positive_.begin());
    }
    if (upstream.total) {
      const Tensor grad = torch::stable::contiguous(*upstream.total);
      total_slope_.resize(static_cast<size_t>(rows()));
      for (int64_t i = 0; i < rows(); ++i) {
        const double slope = problem_.has_term(i) ? doubles(grad)[i] : 0.0;
        total_slope_[i] = static_cast<T>(slope);
        positive_[i] += slope;
      }
    }
    positive_slope_.resize(static_cast<size_t>(rows()));
    for (int64_t i = 0; i < rows(); ++i) {
      positive_[i] = problem_.has_positive(i) ? positive_[i] : 0.0;
      positive_slope_[i] = static_cast<T>(positive_[i]);
    }
    const bool columns = upstream.column_lse.has_value();
    task_.slopes = {row_slope_.data(), row_ref_.data(), columns ? column_slope_.data() : nullptr,
                    columns ? column_ref_.data() : nullptr, upstream.total ? total_slope_.data() : nullptr};
  }

  // All exponentials, where the forward kept them; else room for those of some rows. Logits are made for the latter, and in
  // tiles whose exponentials do not serve both directions.
  void find_exponentials(const Saved& saved, int64_t workspace_bytes) {
    made_again_ = saved.exponentials.numel() == 0;
    chunk_rows_ = std::max<int64_t>(rows(), 1);
    if (!made_again_) {
      memory_ = saved.exponentials.mutable_data_ptr();
      const Exponentials<T> kept = exponentials_in<T>(memory_, problem_, 0, rows());
      T* const end = kept.exact + problem_.row_tiles() * problem_.column_tiles();
      if (std::any_of(kept.exact, end, [](T exact) { return exact == T(0); })) problem_.pack_logits();
    } else {
      const int64_t row_bytes = std::max<int64_t>(problem_.padded_columns() * arguments_.query.element_size(), 1);
      const int64_t tiles = std::min(workspace_bytes, kChunkBytes) / (row_bytes * kTileRows);
      chunk_rows_ = std::min(std::max<int64_t>(tiles, 1) * kTileRows, chunk_rows_);
      chunk_ = Buffer<char>(exponential_bytes(problem_, chunk_rows_));
      memory_ = chunk_.get();
      problem_.pack_logits();
    }
    task_.query = problem_.query;
    task_.key = problem_.key;
    task_.logits = problem_.logits;
  }

  // Rows of both sides as right operands, and room for the sums of the keys.
  void pack() {
    task_.padded_width = round_up(width(), kColumnUnit);
    task_.row_factor = problem_.row_factor.data();
    if (needs_.rows()) {
      key_rows_ = packed(problem_.key, kTileColumns, problem_.alive_keys(), task_.key_panel);
      task_.key_rows = key_rows_.get();
    }
    if (!needs_.keys()) return;
    query_rows_ = packed(problem_.query, kTileRows, problem_.alive_rows(), task_.query_panel);
    task_.query_rows = query_rows_.get();
    key_sums_ = Buffer<T>(problem_.column_tiles() * kTileColumns * task_.padded_width);
    task_.key_sums = key_sums_.get();
    if (rows() == 0) std::fill_n(task_.key_sums, columns() * task_.padded_width, T(0));
    if (!needs_.log_q) return;
    log_q_sums_.assign(static_cast<size_t>(columns()), 0.0);
    task_.log_q_sums = log_q_sums_.data();
  }

  Buffer<T> packed(const Matrix& matrix, int64_t tile, const std::vector<uint8_t>& alive, int64_t& panel) const {
    const int64_t per_word = problem_.logits.element == Element::kBFloat16Pairs ? 2 : 1;  // a word of pairs holds two rows
    const int64_t padded = round_up(matrix.rows, tile) / per_word;
    Buffer<T> panels(padded * task_.padded_width);
    panel = padded * problem_.kernels.backward.panel_columns;
    for_each_range(matrix.rows, tile, [&](int64_t begin, int64_t end) {
      problem_.kernels.backward.pack_rows(problem_.logits.element, matrix, begin, end, alive.data(), panel, panels.get());
    });
    return panels;
  }

  void find_finish() {
    const auto made = [&](const Tensor& like, bool needed, int64_t count, ScalarType type) {
      return torch::stable::new_empty(like, {needed ? count : 0}, type);
    };
    const auto like = [&](const Tensor& matrix, bool needed) {
      return needed ? torch::stable::new_empty(matrix, {matrix.size(0), matrix.size(1)})
                    : torch::stable::new_empty(matrix, {0});
    };
    grad_query_ = like(arguments_.query, needs_.query);
    grad_key_ = like(arguments_.key, needs_.key);
    grad_scale_ = made(arguments_.query, needs_.scale, arguments_.scale.size(0), kScalar<T>);
    grad_log_q_ = made(arguments_.query, needs_.log_q, columns(), kScalar<T>);
    scale_slopes_.resize(static_cast<size_t>(needs_.scale ? rows() : 0));
    find_wanted(problem_.target, columns(), offsets_, wanted_);
    finish_ = {problem_.target.data(),
               positive_slope_.data(),
               problem_.scale.data(),
               problem_.query_norm.empty() ? nullptr : problem_.query_norm.data(),
               problem_.key_norm.empty() ? nullptr : problem_.key_norm.data(),
               offsets_.data(),
               wanted_.data(),
               needs_.query ? grad_query_.mutable_data_ptr() : nullptr,
               needs_.key ? grad_key_.mutable_data_ptr() : nullptr,
               needs_.scale ? scale_slopes_.data() : nullptr};
  }

  void make_exponentials() {
    const int64_t first_tile = task_.exponentials.first_row / kTileRows, column_tiles = problem_.column_tiles();
    for_each_task(divide_up(task_.exponentials.rows, kTileRows) * column_tiles, make_scratch<T>,
                  [&](int64_t n, const auto& scratch) {
                    ForwardTile<T> tile{};
                    tile.row_tile = first_tile + n / column_tiles;
                    tile.column_tile = n % column_tiles;
                    tile.symmetric = task_.slopes.column_slope != nullptr;
                    tile.keep = &task_.exponentials;
                    problem_.kernels.forward.forward(problem_.logits, tile, *scratch);
                  });
  }

  // Smaller parts where there are few tiles for the threads; a row's and a key's bits do not depend on its part.
  void make_row_gradients() {
    const int64_t threads = torch::stable::get_num_threads(), tiles = divide_up(chunk_rows_, kTileRows);
    const int64_t part = tiles >= 4 * threads ? kTileRows : tiles >= 2 * threads ? kTileRows / 2 : kTileRows / 4;
    struct State {
      std::unique_ptr<Scratch<T>> scratch;
      Buffer<T> sums;
    };
    const auto make_state = [&] { return State{make_scratch<T>(), Buffer<T>(kTileRows * task_.padded_width)}; };
    for_each_task(divide_up(task_.exponentials.rows, part), make_state, [&](int64_t n, const State& state) {
      const int64_t row = task_.exponentials.first_row + n * part, tile = row / kTileRows, begin = row - tile * kTileRows;
      const int64_t end = std::min(begin + part, rows() - tile * kTileRows);
      problem_.kernels.backward.row_gradients(task_, finish_, {tile, 0, begin, end}, *state.scratch, state.sums.get());
    });
  }

  void add_key_sums() {
    const int64_t part =
        problem_.column_tiles() >= 4 * static_cast<int64_t>(torch::stable::get_num_threads()) ? kTileColumns : kTileColumns / 2;
    for_each_task(divide_up(columns(), part), make_scratch<T>, [&](int64_t n, const auto& scratch) {
      const int64_t column = n * part, tile = column / kTileColumns, begin = column - tile * kTileColumns;
      const int64_t end = std::min(begin + part, columns() - tile * kTileColumns);
      problem_.kernels.backward.key_sums(task_, {0, tile, begin, end}, *scratch);
    });
  }

  void write_grad_scale() {
    T* const to = static_cast<T*>(grad_scale_.mutable_data_ptr());
    if (grad_scale_.size(0) == rows()) {
      for (int64_t i = 0; i < rows(); ++i) to[i] = static_cast<T>(scale_slopes_[i]);
      return;
    }
    double sum = 0;
    for (const double slope : scale_slopes_) sum += slope;
    to[0] = static_cast<T>(sum);
  }

  void write_grad_log_q() {
    T* const to = static_cast<T*>(grad_log_q_.mutable_data_ptr());
    for (int64_t j = 0; j < columns(); ++j) {
      double sum = log_q_sums_[j];
      for (int64_t n = offsets_[j]; n < offsets_[j + 1]; ++n) sum += positive_[wanted_[n]];
      to[j] = static_cast<T>(-sum);
    }
  }

  const Arguments& arguments_;
  const Needs& needs_;
  Problem<T> problem_;
  Backward<T> task_{};
  Finish<T> finish_{};
  std::vector<T> row_slope_, row_ref_, column_slope_, column_ref_, total_slope_, positive_slope_;
  std::vector<double> positive_, scale_slopes_, log_q_sums_;
  std::vector<int64_t> offsets_, wanted_;
  bool made_again_ = false;
  int64_t chunk_rows_ = 1;
  void* memory_ = nullptr;
  Buffer<char> chunk_;
  Buffer<T> key_rows_, query_rows_, key_sums_;
  Tensor grad_query_, grad_key_, grad_scale_, grad_log_q_;
};

Gradients backward(
    const std::optional<Tensor>& grad_positive, const std::optional<Tensor>& grad_row_lse,
    const std::optional<Tensor>& grad_column_lse, const std::optional<Tensor>& grad_total, const Tensor& query,
    const Tensor& key, const Tensor& scale, const std::optional<Tensor>& target, const std::optional<Tensor>& query_mask,
    const std::optional<Tensor>& key_mask, const std::optional<Tensor>& query_ids, const std::optional<Tensor>& key_ids,
    const std::optional<Tensor>& exclude_offsets, const std::optional<Tensor>& exclude_positions,
    const std::optional<Tensor>& log_q, bool symmetric, bool normalize, bool positives_elsewhere, const Tensor& row_lse,
    const Tensor& column_lse,
    const Tensor& saved, bool need_query, bool need_key, bool need_scale, bool need_log_q, int64_t workspace_bytes) {
  const Arguments arguments{query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                            exclude_positions, log_q, symmetric, normalize, positives_elsewhere};
  const Upstream upstream{grad_positive, grad_row_lse, grad_column_lse, grad_total};
  const Saved left{row_lse, column_lse, saved};
  const Needs needs{need_query, need_key, need_scale, need_log_q};
  return query.scalar_type() == ScalarType::Double
             ? Pass<double>(arguments, upstream, left, needs, workspace_bytes).run()
             : Pass<float>(arguments, upstream, left, needs, workspace_bytes).run();
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_infonce_backward", TORCH_BOX(&mmrec::backward)); }
