// Experts on CPU, the forward: tiles over threads, then the gates' sums, for as many tokens at a time as kPassBytes hold.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "experts_problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
Results forward_as(const ExpertsArguments& arguments, bool save_hidden) {
  ExpertsProblem<T> problem(arguments);
  constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const auto& kernels = experts_kernels_here<ExpertsForward<T>>();
  const Tensor& x = arguments.x;
  const int64_t width = problem.pass.width, padded = kernels.padded_width(width), tokens = problem.tokens;
  const int64_t rows = arguments.w_in.size(1), shared_rows = problem.has_shared ? arguments.shared_w_in->size(0) : 0;
  const int64_t pairs_each = std::min(problem.gates * problem.k, problem.experts);
  Tensor out = torch::stable::new_empty(x, {problem.gates, tokens, width});
  Tensor hidden = save_hidden ? torch::stable::new_empty(x, {tokens * pairs_each, rows}) : torch::stable::new_empty(x, {0});
  Tensor shared_hidden = save_hidden && problem.has_shared ? torch::stable::new_empty(x, {tokens, shared_rows})
                                                           : torch::stable::new_empty(x, {0});
  const Tensor weights = torch::stable::contiguous(torch::stable::to(arguments.weights, kType));
  Tensor gate = x;
  if (arguments.shared_gate) gate = torch::stable::contiguous(torch::stable::to(*arguments.shared_gate, kType));

  KeptHidden kept;
  if (save_hidden) {
    kept = problem.kept_hidden(hidden.mutable_data_ptr(), shared_hidden.mutable_data_ptr(), x.element_size());
    // Rows that no pair owns are 0, so that two calls give the same.
    clear(kept.hidden + kept.used * kept.row_bytes, (tokens * pairs_each - kept.used) * kept.row_bytes);
  }
  const int64_t step = problem.tokens_of_pass(padded * static_cast<int64_t>(sizeof(T)));
  for (int64_t first = 0; first < tokens; first += step) {
    const int64_t last = std::min(first + step, tokens);
    const ExpertsPlan plan = problem.plan(first, last);
    const Buffer<T> y(static_cast<int64_t>(plan.tokens.size()) * padded);
    problem.pass.tokens = plan.tokens.data();
    problem.pass.y = y.get();
    const std::vector<ExpertTile> tiles = problem.tiles(plan, save_hidden ? &kept : nullptr);
    const int64_t bytes = kernels.scratch_bytes(problem.pass), shared_bytes = shared_rows * x.element_size();
    for (int64_t t = first; save_hidden && problem.has_shared && t < last; ++t) {
      if (plan.shared[static_cast<size_t>(t - first)] < 0) clear(kept.shared + t * shared_bytes, shared_bytes);
    }
    for_each_task(
        static_cast<int64_t>(tiles.size()), [&] { return Buffer<char>(bytes); },
        [&](int64_t n, const Buffer<char>& scratch) { kernels.compute(problem.pass, tiles[static_cast<size_t>(n)], scratch.get()); });
    const Combination<T> combination{problem.gates,
                                     tokens,
                                     problem.k,
                                     first,
                                     last,
                                     static_cast<const T*>(weights.const_data_ptr()),
                                     plan.slots.data(),
                                     problem.has_shared ? plan.shared.data() : nullptr,
                                     arguments.shared_gate ? static_cast<const T*>(gate.const_data_ptr()) : nullptr,
                                     out.mutable_data_ptr()};
    for_each_range(last - first, 128, [&](int64_t begin, int64_t end) { kernels.combine(problem.pass, combination, begin, end); });
  }
  return {out, hidden, shared_hidden};
}

Results forward(const Tensor& x, const Tensor& weights, const Tensor& experts, const Tensor& w_in, const Tensor& w_out,
                const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                const std::optional<Tensor>& shared_w_in, const std::optional<Tensor>& shared_w_out,
                const std::optional<Tensor>& shared_gate, const std::string& activation, bool save_hidden) {
  const ExpertsArguments arguments{x,           weights,      experts,     w_in,      w_out, b_in, b_out,
                                   shared_w_in, shared_w_out, shared_gate, activation};
  return x.scalar_type() == ScalarType::Double ? forward_as<double>(arguments, save_hidden)
                                               : forward_as<float>(arguments, save_hidden);
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_experts_forward", TORCH_BOX(&mmrec::forward)); }
