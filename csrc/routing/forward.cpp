// Routing on CPU, the forward: runs of blocks over threads, their sums in order, the losses.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../common/natural_log.h"
#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// −p log p.
double entropy_of(double p) { return p == 0 ? 0.0 : p != p ? p : -p * natural_log(p); }

// The losses of a modality, in the order of RouterLosses, from its sums.
template <typename T>
void find_losses(const double* sums, int64_t experts, int64_t choices, int64_t modalities, T* losses) {
  const double tokens = sums[3 * experts];
  double slots = 0, balance = 0, entropy = 0;
  for (int64_t e = 0; e < experts; ++e) slots += sums[3 * e];
  for (int64_t e = 0; e < experts; ++e) {
    const double mean = sums[3 * e + 1] / tokens;
    balance += sums[3 * e] / slots * mean;
    entropy += entropy_of(mean);
  }
  const double found[] = {static_cast<double>(choices) * balance, sums[3 * experts + 1] / tokens,
                          sums[3 * experts + 2] / tokens, entropy};
  for (int64_t n = 0; n < 4; ++n) losses[n * modalities] = tokens == 0 ? T(0) : static_cast<T>(found[n]);
}

template <typename T>
Results forward_as(const RouterArguments& arguments) {
  const RouterProblem<T> problem(arguments);
  const Router<T>& router = problem.router;
  constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor& x = arguments.x;
  Tensor weights = torch::stable::new_empty(x, {router.tokens, router.k}, kType);
  Tensor experts = torch::stable::new_empty(x, {router.tokens, router.k}, ScalarType::Int);
  Tensor stats = torch::stable::new_empty(x, {router.modalities, router.experts, 3}, kType);
  Tensor losses = torch::stable::new_empty(x, {4, router.modalities}, kType);
  auto* const weight = static_cast<T*>(weights.mutable_data_ptr());
  auto* const expert = static_cast<int32_t*>(experts.mutable_data_ptr());

  const auto& kernels = routing_kernels_here<RouteForward<T>>();
  const int64_t bytes = kernels.scratch_bytes(router), each = sums_per_modality(router.experts);
  const int64_t words = router.modalities * each, runs = problem.runs(words);
  std::vector<double> sums(static_cast<size_t>(words * std::max<int64_t>(runs, 1)), 0.0);
  for_each_task(
      runs, [&] { return Buffer<char>(bytes); },
      [&](int64_t run, const Buffer<char>& scratch) {
        const int64_t end = problem.begin_of(run + 1, runs);
        for (int64_t token = problem.begin_of(run, runs); token < end; token += kBlockTokens) {
          kernels.route(router, token, std::min(token + kBlockTokens, end), weight, expert, sums.data() + run * words,
                        scratch.get());
        }
      });
  for (int64_t run = 1; run < runs; ++run) {
    for (int64_t n = 0; n < words; ++n) sums[static_cast<size_t>(n)] += sums[static_cast<size_t>(run * words + n)];
  }
  auto* const stat = static_cast<T*>(stats.mutable_data_ptr());
  auto* const loss = static_cast<T*>(losses.mutable_data_ptr());
  for (int64_t m = 0; m < router.modalities; ++m) {
    const double* const of = sums.data() + m * each;
    for (int64_t n = 0; n < 3 * router.experts; ++n) stat[m * 3 * router.experts + n] = static_cast<T>(of[n]);
    find_losses(of, router.experts, router.choices_of(m), router.modalities, loss + m);
  }
  return {weights, experts, stats, losses};
}

Results forward(const Tensor& x, const Tensor& gate_weight, const std::optional<Tensor>& modality,
                const std::optional<Tensor>& allowed, const std::optional<Tensor>& bias, const std::optional<Tensor>& valid,
                int64_t k, int64_t num_modalities, const std::string& score, bool renormalize) {
  const RouterArguments arguments{x, gate_weight, modality, allowed, bias, valid, k, num_modalities, score, renormalize};
  return x.scalar_type() == ScalarType::Double ? forward_as<double>(arguments) : forward_as<float>(arguments);
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_routing_forward", TORCH_BOX(&mmrec::forward)); }
