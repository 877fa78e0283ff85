// Experts on CPU, the forward: tiles over threads, then the gates' sums, for as many tokens at a time as kPassBytes hold.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "experts_problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor, Tensor>;

// Of the pairs' outputs. What a pass holds depends on sizes alone.
constexpr int64_t kPassBytes = int64_t{64} << 20, kLeastPass = 4096;

// The pre-activations that are kept for the backward.
struct Kept {
  char *hidden, *shared;
  int64_t row_bytes;
  std::vector<int64_t> next;  // per expert, the row of its next pair over all tokens
};

template <typename T>
std::vector<ExpertTile> tiles_of(const ExpertsProblem<T>& problem, const ExpertsPlan& plan, Kept* kept) {
  std::vector<ExpertTile> tiles;
  for (int64_t e = 0; e <= problem.experts; ++e) {
    const int64_t end = plan.first[static_cast<size_t>(e + 1)];
    for (int64_t at = plan.first[static_cast<size_t>(e)]; at < end; at += kTileTokens) {
      const int64_t count = std::min(kTileTokens, end - at);
      char* hidden = nullptr;
      if (kept != nullptr && e < problem.experts) {
        hidden = kept->hidden + kept->next[static_cast<size_t>(e)] * kept->row_bytes;
        kept->next[static_cast<size_t>(e)] += count;
      }
      if (kept != nullptr && e == problem.experts) hidden = kept->shared;
      tiles.push_back({problem.expert(e), at, count, hidden, e == problem.experts});
    }
  }
  return tiles;
}

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

  Kept kept{};
  if (save_hidden) {
    const int64_t element = x.element_size();
    kept = {static_cast<char*>(hidden.mutable_data_ptr()), static_cast<char*>(shared_hidden.mutable_data_ptr()),
            rows * element, std::vector<int64_t>(static_cast<size_t>(problem.experts), 0)};
    const std::vector<int64_t> counts = problem.counts();
    for (size_t e = 1; e < counts.size(); ++e) kept.next[e] = kept.next[e - 1] + counts[e - 1];
    // Rows that no pair owns are 0, so that two calls give the same.
    const int64_t used = kept.next.back() + counts.back();
    std::memset(kept.hidden + used * kept.row_bytes, 0, static_cast<size_t>((tokens * pairs_each - used) * kept.row_bytes));
  }
  const int64_t most = (pairs_each + (problem.has_shared ? 1 : 0)) * padded * static_cast<int64_t>(sizeof(T));
  const int64_t step = std::max(kLeastPass, kPassBytes / std::max<int64_t>(most, 1));
  for (int64_t first = 0; first < tokens; first += step) {
    const int64_t last = std::min(first + step, tokens);
    const ExpertsPlan plan = problem.plan(first, last);
    const Buffer<T> y(static_cast<int64_t>(plan.tokens.size()) * padded);
    problem.pass.tokens = plan.tokens.data();
    problem.pass.y = y.get();
    const std::vector<ExpertTile> tiles = tiles_of(problem, plan, save_hidden ? &kept : nullptr);
    const int64_t bytes = kernels.scratch_bytes(problem.pass), shared_bytes = shared_rows * x.element_size();
    for (int64_t t = first; save_hidden && problem.has_shared && t < last; ++t) {
      if (plan.shared[static_cast<size_t>(t - first)] < 0) std::memset(kept.shared + t * shared_bytes, 0, static_cast<size_t>(shared_bytes));
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
