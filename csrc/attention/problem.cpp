#include "problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>

#include "../common/check.h"
#include "../common/tensors.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;

constexpr double kLog2E = 1.4426950408889634074;

// Non-decreasing and inside [0, length].
void check_offsets(const std::string& name, const int64_t* offsets, int64_t count, int64_t length) {
  const auto first = [&] {
    std::string text = "[";
    for (int64_t i = 0; i < std::min<int64_t>(count, 8); ++i) text += (i > 0 ? ", " : "") + std::to_string(offsets[i]);
    return text + "]…";
  };
  bool fine = offsets[0] >= 0 && offsets[count - 1] <= length;
  for (int64_t i = 1; fine && i < count; ++i) fine = offsets[i - 1] <= offsets[i];
  MMREC_CHECK(fine, name, " must be non-decreasing and inside [0, ", length, "], got ", first());
}

}  // namespace

template <typename T>
AttentionProblem<T>::AttentionProblem(const AttentionArguments& arguments) {
  const Tensor& query = arguments.query;
  sequences = arguments.offsets.size(1) - 1;
  kernel.element = element_of(query);
  kernel.kv_heads = arguments.keys[0].size(1);
  kernel.group = query.size(1) / kernel.kv_heads;
  kernel.width = query.size(2);
  kernel.value_width = arguments.values[0].size(2);
  kernel.segments = static_cast<int64_t>(arguments.keys.size());
  kernel.query = rows_of(query);
  kernel.latent_rows = query.size(0);
  rows = sequences * kernel.latent_rows;
  if (arguments.query_offsets) {
    held_.push_back(torch::stable::contiguous(*arguments.query_offsets));
    kernel.query_offsets = static_cast<const int64_t*>(held_.back().const_data_ptr());
    rows = query.size(0);
    check_offsets("query_offsets", kernel.query_offsets, sequences + 1, rows);
  }
  find_segments(arguments);
  kernel.log_bias = per_segment(arguments.log_bias, kLog2E, kMostBias);
  kernel.value_gate = per_segment(arguments.value_gate, 1.0, std::numeric_limits<double>::infinity());
  kernel.sink = vector_of(arguments.sink);
  kernel.query_norm = vector_of(arguments.query_norm);
  kernel.key_norm = vector_of(arguments.key_norm);
  kernel.scale = arguments.scale;
  kernel.norm_eps = arguments.norm_eps;
}

template <typename T>
HeadRows AttentionProblem<T>::rows_of(const Tensor& tensor) {
  held_.push_back(tensor.size(2) <= 1 || tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor));
  const Tensor& rows = held_.back();
  return {rows.const_data_ptr(), rows.stride(0), rows.stride(1)};
}

template <typename T>
void AttentionProblem<T>::find_segments(const AttentionArguments& arguments) {
  held_.push_back(torch::stable::contiguous(arguments.offsets));
  const auto* const offsets = static_cast<const int64_t*>(held_.back().const_data_ptr());
  size_t lists = 0;
  for (int64_t m = 0; m < kernel.segments; ++m) {
    const Tensor& key = arguments.keys[static_cast<size_t>(m)];
    const std::string name = "segments[" + std::to_string(m) + "].";
    AttentionSegment segment{rows_of(key), rows_of(arguments.values[static_cast<size_t>(m)]), offsets + m * (sequences + 1),
                             nullptr, (arguments.causal >> m & 1) != 0};
    int64_t entries = key.size(0);
    if ((arguments.indexed >> m & 1) != 0) {
      held_.push_back(torch::stable::contiguous(arguments.index[lists++]));
      segment.index = static_cast<const int64_t*>(held_.back().const_data_ptr());
      entries = held_.back().size(0);
    }
    check_offsets(name + "offsets", segment.offsets, sequences + 1, entries);
    for (int64_t n = segment.offsets[0]; segment.index != nullptr && n < segment.offsets[sequences]; ++n) {
      MMREC_CHECK(segment.index[n] >= -1 && segment.index[n] < key.size(0), name, "index must be −1 or inside [0, ",
                  key.size(0), "), got ", segment.index[n]);
    }
    segments_.push_back(segment);
  }
  kernel.segment = segments_.data();
}

template <typename T>
PerSegment<T> AttentionProblem<T>::per_segment(const std::optional<Tensor>& tensor, double factor, double most) {
  if (!tensor) return {nullptr, 0, 0, 0};
  const Tensor contiguous = torch::stable::contiguous(torch::stable::to(*tensor, ScalarType::Double));
  const auto* const values = static_cast<const double*>(contiguous.const_data_ptr());
  std::vector<T> scaled(static_cast<size_t>(contiguous.numel()));
  for (size_t i = 0; i < scaled.size(); ++i) {
    const double x = values[i] * factor;
    scaled[i] = static_cast<T>(std::isfinite(x) ? std::clamp(x, -most, most) : x);
  }
  scaled_.push_back(std::move(scaled));
  const int64_t heads = tensor->size(1), segments = tensor->size(2);
  return {scaled_.back().data(), tensor->size(0) == 1 ? 0 : heads * segments, heads == 1 ? 0 : segments,
          segments == 1 ? 0 : 1};
}

template <typename T>
const T* AttentionProblem<T>::vector_of(const std::optional<Tensor>& tensor) {
  if (!tensor) return nullptr;
  held_.push_back(torch::stable::contiguous(
      torch::stable::to(*tensor, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float)));
  return static_cast<const T*>(held_.back().const_data_ptr());
}

template <typename T>
void AttentionProblem<T>::divide(int64_t threads, int64_t first, int64_t last, bool whole) {
  // Of one KV head: multiplications, and what a row and a key cost beside them.
  const auto cost_of = [&](int64_t b) {
    int64_t keys = 0;
    for (const AttentionSegment& segment : segments_) keys += segment.offsets[b + 1] - segment.offsets[b];
    return (queries_of(b) * kernel.group + 4) * (keys + 8);
  };
  int64_t total = 0;
  for (int64_t b = first; b < last; ++b) total += cost_of(b);
  const int64_t most = total * kernel.kv_heads / (threads * 16) + 1;
  // Blocks of rows begin at multiples of this, whether the heads of a group share them or not.
  const int64_t row_step = std::lcm(kBlockRows / std::clamp<int64_t>(kernel.group, 1, kBlockRows), kBlockRows);
  units.clear();
  tasks.assign(1, 0);
  int64_t gathered = 0;
  const auto add = [&](const AttentionUnit& unit, int64_t cost) {
    units.push_back(unit);
    gathered += cost;
    if (gathered < most) return;
    tasks.push_back(static_cast<int64_t>(units.size()));
    gathered = 0;
  };
  for (int64_t b = first; b < last; ++b) {
    const int64_t queries = queries_of(b), cost = cost_of(b);
    if (queries == 0 && !whole) continue;
    if (cost * kernel.kv_heads <= most) {
      add({b, 0, kernel.kv_heads, 0, queries}, cost * kernel.kv_heads);
      continue;
    }
    const int64_t heads = std::max<int64_t>(most / std::max<int64_t>(cost, 1), 1);
    const int64_t blocks = std::max<int64_t>((queries + row_step - 1) / row_step, 1);
    const int64_t parts = whole || heads > 1 ? 1 : std::min(blocks, cost / most + 1);
    const int64_t rows_of_part = (blocks + parts - 1) / parts * row_step;
    for (int64_t head = 0; head < kernel.kv_heads; head += heads) {
      const int64_t last_head = std::min(head + heads, kernel.kv_heads);
      int64_t row = 0;
      do {
        add({b, head, last_head, row, std::min(row + rows_of_part, queries)}, cost * (last_head - head) / parts);
        row += rows_of_part;
      } while (row < queries);
    }
  }
  if (tasks.back() < static_cast<int64_t>(units.size())) tasks.push_back(static_cast<int64_t>(units.size()));
}

template class AttentionProblem<float>;
template class AttentionProblem<double>;

}  // namespace mmrec
