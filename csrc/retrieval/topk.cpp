// Streaming top-k on CPU: checks, packing of the queries, distribution over threads, final selection, registration.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "topk_kernel.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kAlign = 64;

// A list of ids per query, ascending, without duplicates or ids outside the catalogue.
struct IdLists {
  std::vector<int64_t> offsets;
  std::vector<int64_t> ids;
};

IdLists sorted_lists(const char* name, const Tensor& offsets, const Tensor& ids, int64_t num_items) {
  const int64_t rows = offsets.size(0) - 1;
  const int64_t length = ids.size(0);
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  MMREC_CHECK(offset[0] >= 0 && offset[rows] <= length, name, "[0] must lie inside [0, ", length, "], got ", offset[0],
              " … ", offset[rows]);
  for (int64_t b = 0; b < rows; ++b) {
    MMREC_CHECK(offset[b] <= offset[b + 1], name, "[0] must be non-decreasing, got ", offset[b], " before ",
                offset[b + 1], " at ", b);
  }
  IdLists lists;
  lists.offsets.reserve(static_cast<size_t>(rows) + 1);
  lists.offsets.push_back(0);
  lists.ids.reserve(static_cast<size_t>(offset[rows] - offset[0]));
  for (int64_t b = 0; b < rows; ++b) {
    const auto start = static_cast<std::ptrdiff_t>(lists.ids.size());
    for (int64_t j = offset[b]; j < offset[b + 1]; ++j) {
      if (id[j] >= 0 && id[j] < num_items) lists.ids.push_back(id[j]);
    }
    std::sort(lists.ids.begin() + start, lists.ids.end());
    lists.ids.erase(std::unique(lists.ids.begin() + start, lists.ids.end()), lists.ids.end());
    lists.offsets.push_back(static_cast<int64_t>(lists.ids.size()));
  }
  return lists;
}

template <typename T>
void run_scan(const TopkScan<T>& scan) {
  using Scan = void (*)(const TopkScan<T>&);
  static constexpr Scan kScan[] = MMREC_ISA_TABLE(topk_scan);
  kScan[static_cast<int>(cpu_isa())](scan);
}

template <typename T>
void run_cut(Selection<T>& selection, std::vector<T>& scratch) {
  using Cut = void (*)(Selection<T>&, void*);
  static constexpr Cut kCut[] = MMREC_ISA_TABLE(topk_cut);
  scratch.resize(static_cast<size_t>(selection.count));
  kCut[static_cast<int>(cpu_isa())](selection, scratch.data());
}

// Queries of [num_queries, width] to groups of kQueryGroup: [group][steps][kQueryGroup], zeros in the last group. `step`
// makes what meets a step's item columns from the query's columns, of which it is given a pointer and how many are left.
template <typename T, typename Q, typename Step>
std::vector<T> pack_queries(const Tensor& query, int64_t per_step, const Step& step) {
  const int64_t num_queries = query.size(0), width = query.size(1), steps = (width + per_step - 1) / per_step;
  const int64_t groups = (num_queries + kQueryGroup - 1) / kQueryGroup;
  const Q* rows = static_cast<const Q*>(query.const_data_ptr());
  std::vector<T> packed(static_cast<size_t>(groups * steps * kQueryGroup), T(0));
  for (int64_t b = 0; b < num_queries; ++b) {
    const Q* row = rows + b * query.stride(0);
    T* group = packed.data() + (b / kQueryGroup) * steps * kQueryGroup + b % kQueryGroup;
    for (int64_t s = 0; s < steps; ++s) {
      const T value = step(row + s * per_step, width - s * per_step);
      std::memcpy(group + s * kQueryGroup, &value, sizeof(value));
    }
  }
  return packed;
}

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
struct Problem {
  TopkScan<T> scan;  // queries, selections, begin, end, ids and panel are set per task
  std::vector<T> queries;
  int64_t num_queries, num_items, k;
  std::optional<IdLists> exclude, candidates;
};

// One task: some queries (a multiple of kQueryGroup, so that their packed groups are whole) over a part of the items.
template <typename T>
struct Task {
  int64_t query_begin, query_end, item_begin, item_end;
  std::vector<T> scores, keys;
  std::vector<int64_t> ids;
  std::vector<Selection<T>> selections;

  void run(const Problem<T>& problem) {
    const int64_t n = query_end - query_begin, k = problem.k;
    // Twice k amortises a cut over k insertions; the floor does it for small k.
    const int64_t capacity = k + std::max<int64_t>(k, 64), room = capacity + kSelectionSlack;
    scores.resize(static_cast<size_t>(n * room));
    ids.resize(static_cast<size_t>(n * room));
    keys.resize(static_cast<size_t>(room));
    selections.resize(static_cast<size_t>(n));
    std::unique_ptr<char[]> scratch(
        new char[static_cast<size_t>(problem.scan.steps * kMaxPanelRows) * sizeof(T) + kAlign]);
    TopkScan<T> scan = problem.scan;
    scan.panel = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(scratch.get()) + kAlign - 1) / kAlign * kAlign);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t b = query_begin + i;
      const int64_t* excluded = nullptr;
      const int64_t* excluded_end = nullptr;
      if (problem.exclude) {
        excluded = problem.exclude->ids.data() + problem.exclude->offsets[b];
        excluded_end = problem.exclude->ids.data() + problem.exclude->offsets[b + 1];
      }
      selections[i] = {-std::numeric_limits<T>::infinity(), 0, capacity, k, scores.data() + i * room,
                       ids.data() + i * room, excluded, excluded_end};
    }
    scan.keys = keys.data();
    if (problem.candidates) {
      run_candidates(problem, scan);
      return;
    }
    const int64_t room_rounded = sizeof(T) == sizeof(float) ? rounded_room(n, scan.width) : 0;
    std::unique_ptr<char[]> rounded(room_rounded > 0 ? new char[static_cast<size_t>(room_rounded)] : nullptr);
    scan.rounded = reinterpret_cast<T*>(rounded.get());
    scan.queries = problem.queries.data() + query_begin * scan.steps;
    scan.num_queries = n;
    scan.selections = selections.data();
    scan.begin = item_begin;
    scan.end = item_end;
    run_scan(scan);
  }

  // Each query has its own items: one scan each, over a group that holds it alone.
  void run_candidates(const Problem<T>& problem, TopkScan<T>& scan) {
    scan.rounded = nullptr;
    std::vector<T> alone(static_cast<size_t>(scan.steps * kQueryGroup), T(0));
    for (int64_t b = query_begin; b < query_end; ++b) {
      const T* group = problem.queries.data() + (b / kQueryGroup) * scan.steps * kQueryGroup + b % kQueryGroup;
      for (int64_t s = 0; s < scan.steps; ++s) {
        std::memcpy(&alone[s * kQueryGroup], group + s * kQueryGroup, sizeof(T));
      }
      scan.queries = alone.data();
      scan.num_queries = 1;
      scan.selections = &selections[b - query_begin];
      scan.ids = problem.candidates->ids.data();
      scan.begin = problem.candidates->offsets[b];
      scan.end = problem.candidates->offsets[b + 1];
      run_scan(scan);
    }
  }
};

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Results do not depend on the division: the order (score, id) is total and a score's bits are its own.
template <typename T>
std::vector<Task<T>> divide(const Problem<T>& problem, int64_t threads) {
  // From about 32 queries on a panel's transposition is paid for, so queries are divided first; the rest goes by items.
  const int64_t by_queries = std::clamp<int64_t>(problem.candidates ? problem.num_queries : problem.num_queries / 32, 1,
                                                 threads);
  const int64_t by_items =
      problem.candidates ? 1 : std::clamp<int64_t>(problem.num_items / 1024, 1, divide_up(threads, by_queries));
  const int64_t queries = divide_up(divide_up(problem.num_queries, by_queries), kQueryGroup) * kQueryGroup;
  const int64_t items = divide_up(divide_up(problem.num_items, by_items), kMaxPanelRows) * kMaxPanelRows;
  std::vector<Task<T>> tasks;
  for (int64_t b = 0; b < problem.num_queries; b += queries) {
    for (int64_t n = 0; n < std::max<int64_t>(problem.num_items, 1); n += std::max<int64_t>(items, 1)) {
      Task<T> task;
      task.query_begin = b;
      task.query_end = std::min(b + queries, problem.num_queries);
      task.item_begin = n;
      task.item_end = std::min(n + items, problem.num_items);
      tasks.push_back(std::move(task));
    }
  }
  return tasks;
}

// Merges what the tasks found for the queries [begin, end) and writes it, best first.
template <typename T>
void merge(const Problem<T>& problem, const std::vector<Task<T>>& tasks, int64_t begin, int64_t end, T* scores,
           int64_t* ids) {
  const int64_t k = problem.k;
  std::vector<T> found, scratch;
  std::vector<int64_t> found_ids, order;
  for (int64_t b = begin; b < end; ++b) {
    found.clear();
    found_ids.clear();
    for (const Task<T>& task : tasks) {  // by ascending items, so ids ascend where scores are equal
      if (b < task.query_begin || b >= task.query_end) continue;
      const Selection<T>& selection = task.selections[static_cast<size_t>(b - task.query_begin)];
      found.insert(found.end(), selection.scores, selection.scores + selection.count);
      found_ids.insert(found_ids.end(), selection.ids, selection.ids + selection.count);
    }
    Selection<T> best{};
    best.count = static_cast<int64_t>(found.size());
    best.k = k;
    best.scores = found.data();
    best.ids = found_ids.data();
    if (best.count > k) run_cut(best, scratch);
    order.resize(static_cast<size_t>(best.count));
    std::iota(order.begin(), order.end(), int64_t{0});
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t c) {
      return best.scores[a] > best.scores[c] || (best.scores[a] == best.scores[c] && a < c);
    });
    for (int64_t i = 0; i < k; ++i) {
      scores[b * k + i] = i < best.count ? best.scores[order[i]] : -std::numeric_limits<T>::infinity();
      ids[b * k + i] = i < best.count ? best.ids[order[i]] : -1;
    }
  }
}

Tensor rows_contiguous(const Tensor& matrix) {
  const bool rows_lie = matrix.size(1) <= 1 || matrix.stride(1) == 1;
  return rows_lie ? matrix : torch::stable::contiguous(matrix);
}

template <typename T>
std::tuple<Tensor, Tensor> topk_as(Problem<T>& problem, const Tensor& query, const Tensor& items,
                                   const std::optional<Tensor>& bias) {
  problem.scan.items = items.const_data_ptr();
  problem.scan.row_stride = items.stride(0);
  problem.scan.ids = nullptr;
  problem.scan.bias = bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr;
  Tensor scores = torch::stable::new_empty(query, {problem.num_queries, problem.k},
                                           sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float);
  Tensor ids = torch::stable::new_empty(query, {problem.num_queries, problem.k}, ScalarType::Long);
  std::vector<Task<T>> tasks = divide(problem, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) tasks[i].run(problem);
  });
  T* const to_scores = static_cast<T*>(scores.mutable_data_ptr());
  int64_t* const to_ids = static_cast<int64_t*>(ids.mutable_data_ptr());
  torch::stable::parallel_for(0, problem.num_queries, 16, [&](int64_t begin, int64_t end) {
    merge(problem, tasks, begin, end, to_scores, to_ids);
  });
  return {scores, ids};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

std::optional<IdLists> lists(const char* name, const std::optional<Tensor>& offsets, const std::optional<Tensor>& ids,
                             int64_t num_items) {
  if (!offsets || !ids) return std::nullopt;
  return sorted_lists(name, torch::stable::contiguous(*offsets), torch::stable::contiguous(*ids), num_items);
}

std::tuple<Tensor, Tensor> topk(const Tensor& query_any, const Tensor& items_any, int64_t k,
                                const std::optional<Tensor>& item_scales, const std::optional<Tensor>& bias_any,
                                const std::optional<Tensor>& exclude_offsets, const std::optional<Tensor>& exclude_ids,
                                const std::optional<Tensor>& candidate_offsets,
                                const std::optional<Tensor>& candidate_ids, bool) {
  const Tensor query = rows_contiguous(query_any);
  const Tensor items = rows_contiguous(items_any);
  const std::optional<Tensor> scales = contiguous(item_scales);
  const std::optional<Tensor> bias = contiguous(bias_any);
  const auto fill = [&](auto& problem) {
    problem.num_queries = query.size(0);
    problem.num_items = items.size(0);
    problem.k = k;
    problem.exclude = lists("exclude", exclude_offsets, exclude_ids, problem.num_items);
    problem.candidates = lists("candidates", candidate_offsets, candidate_ids, problem.num_items);
    problem.scan.scales = scales ? scales->const_data_ptr<float>() : nullptr;
    problem.scan.width = problem.scan.steps = query.size(1);
  };
  if (query.scalar_type() == ScalarType::Double) {
    Problem<double> problem;
    fill(problem);
    problem.scan.item_type = ItemType::kFloat64;
    problem.queries = pack_queries<double, double>(query, 1, [](const double* q, int64_t) { return *q; });
    return topk_as(problem, query, items, bias);
  }
  Problem<float> problem;
  fill(problem);
  const bool bf16_query = query.scalar_type() == ScalarType::BFloat16;
  switch (items.scalar_type()) {
    case ScalarType::Float:
      problem.scan.item_type = ItemType::kFloat32;
      break;
    case ScalarType::BFloat16:
      problem.scan.item_type =
          bf16_query && cpu_isa() == Isa::kAvx512Bf16 ? ItemType::kBFloat16Pairs : ItemType::kBFloat16;
      break;
    case ScalarType::Char:
      problem.scan.item_type = ItemType::kInt8;
      break;
    default:
      MMREC_CHECK(false, "items must be float32, bfloat16, float64 or int8");
  }
  if (problem.scan.item_type == ItemType::kBFloat16Pairs) {
    problem.scan.steps = divide_up(problem.scan.width, 2);
    problem.queries = pack_queries<float, uint16_t>(query, 2, [](const uint16_t* q, int64_t left) {
      return from_bits(static_cast<uint32_t>(q[0]) | (left > 1 ? static_cast<uint32_t>(q[1]) << 16 : 0));
    });
  } else if (bf16_query) {
    problem.queries = pack_queries<float, uint16_t>(
        query, 1, [](const uint16_t* q, int64_t) { return from_bits(static_cast<uint32_t>(*q) << 16); });
  } else {
    problem.queries = pack_queries<float, float>(query, 1, [](const float* q, int64_t) { return *q; });
  }
  return topk_as(problem, query, items, bias);
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_retrieval_topk", TORCH_BOX(&mmrec::topk)); }
