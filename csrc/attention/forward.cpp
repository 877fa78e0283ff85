// Attention on CPU, the forward: results, division over threads, registration.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "../common/parallel.h"
#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor, Tensor>;

// What rows that belong to no sequence get.
template <typename T>
void fill(const AttentionResults<T>& to, int64_t begin, int64_t end, int64_t heads, int64_t out_bytes, int64_t segments) {
  const auto rows = static_cast<size_t>(std::max<int64_t>(end - begin, 0) * heads);
  clear(static_cast<char*>(to.out) + begin * heads * out_bytes, static_cast<int64_t>(rows) * out_bytes);
  std::fill_n(to.lse + begin * heads, rows, -std::numeric_limits<double>::infinity());
  if (to.mass != nullptr) std::fill_n(to.mass + begin * heads * segments, rows * static_cast<size_t>(segments), T(0));
}

template <typename T>
Results forward_as(const AttentionArguments& arguments, bool return_mass) {
  AttentionProblem<T> problem(arguments);
  constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor& query = arguments.query;
  const int64_t heads = problem.heads(), segments = problem.kernel.segments;
  Tensor out = torch::stable::new_empty(query, {problem.rows, heads, problem.kernel.value_width});
  Tensor lse = torch::stable::new_empty(query, {problem.rows, heads}, ScalarType::Double);
  Tensor mass = return_mass ? torch::stable::new_empty(query, {problem.rows, heads, segments}, kType)
                            : torch::stable::new_empty(query, {0}, kType);
  const AttentionResults<T> to{out.mutable_data_ptr(), static_cast<double*>(lse.mutable_data_ptr()),
                               return_mass ? static_cast<T*>(mass.mutable_data_ptr()) : nullptr};
  const int64_t out_bytes = problem.kernel.value_width * query.element_size();
  fill(to, 0, problem.query_begin(), heads, out_bytes, segments);
  fill(to, problem.query_end(), problem.rows, heads, out_bytes, segments);
  problem.divide(static_cast<int64_t>(torch::stable::get_num_threads()), 0, problem.sequences, false);
  const int64_t bytes = kernels_here<AttentionForward<T>>().scratch_bytes(problem.kernel);
  for_each_task(
      static_cast<int64_t>(problem.tasks.size()) - 1, [&] { return Buffer<char>(bytes); },
      [&](int64_t task, const Buffer<char>& scratch) {
        const int64_t last = problem.tasks[task + 1];
        for (int64_t u = problem.tasks[task]; u < last; ++u) {
          const int64_t next = u + 1 < last ? problem.units[u + 1].sequence : -1;
          kernels_here<AttentionForward<T>>().attend(problem.kernel, to, problem.units[u], next, scratch.get());
        }
      });
  return {out, lse, mass};
}

Results forward(const Tensor& query, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                const Tensor& offsets, const std::vector<Tensor>& index, const std::optional<Tensor>& query_offsets,
                const std::optional<Tensor>& log_bias, const std::optional<Tensor>& value_gate,
                const std::optional<Tensor>& sink, const std::optional<Tensor>& query_norm,
                const std::optional<Tensor>& key_norm, double scale, double norm_eps, int64_t indexed, int64_t causal,
                bool return_mass) {
  const AttentionArguments arguments{query,    keys, values,     offsets,  index, query_offsets, log_bias, value_gate,
                                     sink, query_norm, key_norm, scale, norm_eps,      indexed,  causal};
  return query.scalar_type() == ScalarType::Double ? forward_as<double>(arguments, return_mass)
                                                   : forward_as<float>(arguments, return_mass);
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_attention_forward", TORCH_BOX(&mmrec::forward)); }
