// Routing on CPU, the backward: what losses give p̄, runs of blocks over threads, the gate's gradient summed in their order.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../common/natural_log.h"
#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor>;

// In the order of RouterLosses.
enum Loss : int64_t { kBalance, kZ, kLocalEntropy, kGlobalEntropy };

// What the losses of each modality give a p̄ of an expert, and factors of the terms that differ from token to token.
template <typename T>
struct LossGradients {
  std::vector<T> shares, z, local;

  LossGradients(const Router<T>& router, const T* grads, const T* stats) {
    const int64_t modalities = router.modalities, experts = router.experts;
    shares.assign(static_cast<size_t>(modalities * experts), T(0));
    z.assign(static_cast<size_t>(modalities), T(0));
    local.assign(static_cast<size_t>(modalities), T(0));
    std::vector<int64_t> tokens(static_cast<size_t>(modalities), 0);
    for (int64_t t = 0; t < router.tokens; ++t) {
      const int64_t m = router.modality_of(t);
      if (m >= 0) ++tokens[static_cast<size_t>(m)];
    }
    for (int64_t m = 0; m < modalities; ++m) {
      const auto count = static_cast<double>(tokens[static_cast<size_t>(m)]);
      if (count == 0) continue;
      const auto grad = [&](Loss loss) { return static_cast<double>(grads[loss * modalities + m]); };
      z[static_cast<size_t>(m)] = static_cast<T>(2 * grad(kZ) / count);
      local[static_cast<size_t>(m)] = static_cast<T>(grad(kLocalEntropy) / count);
      const T* const of = stats + m * experts * 3;
      double slots = 0;
      for (int64_t e = 0; e < experts; ++e) slots += static_cast<double>(of[3 * e]);
      for (int64_t n = router.choice_offsets[m]; n < router.choice_offsets[m + 1]; ++n) {
        const int64_t e = router.choices[n];
        const double mean = static_cast<double>(of[3 * e + 1]) / count;
        const double balance = static_cast<double>(router.choices_of(m)) * static_cast<double>(of[3 * e]) / slots;
        // Where the mean underflows to 0 so does every p̄ of the column, and with it the gradient: −p̄ log(mean) → 0.
        const double entropy = mean == 0 ? 0.0 : mean != mean ? mean : -natural_log(mean) - 1;
        shares[static_cast<size_t>(m * experts + e)] =
            static_cast<T>((grad(kBalance) * balance + grad(kGlobalEntropy) * entropy) / count);
      }
    }
  }
};

// What both results are made from.
struct BackwardArguments {
  const std::optional<Tensor>&grad_weights, &grad_losses;
  const Tensor &weights, &experts, &stats;
  bool need_x, need_gate;
};

template <typename T>
Results backward_as(const RouterArguments& arguments, const BackwardArguments& given) {
  const RouterProblem<T> problem(arguments);
  const Router<T>& router = problem.router;
  constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const Tensor& x = arguments.x;
  std::vector<Tensor> kept;
  const auto held = [&](const Tensor& tensor) {
    kept.push_back(torch::stable::contiguous(tensor));
    return kept.back().const_data_ptr();
  };
  const auto& kernels = routing_kernels_here<RouteBackward<T>>();
  const int64_t width = router.width, padded = kernels.padded_width(width);
  Buffer<T> gate(router.experts * padded);
  const auto* const rows = static_cast<const T*>(held(torch::stable::to(arguments.gate_weight, kType)));
  for (int64_t e = 0; e < router.experts; ++e) {
    std::copy_n(rows + e * width, width, gate.get() + e * padded);
    std::fill(gate.get() + e * padded + width, gate.get() + (e + 1) * padded, T(0));
  }
  std::optional<LossGradients<T>> losses;
  if (given.grad_losses) {
    losses.emplace(router, static_cast<const T*>(held(*given.grad_losses)), static_cast<const T*>(held(given.stats)));
  }
  Tensor grad_x = given.need_x ? torch::stable::new_empty(x, {router.tokens, width}) : torch::stable::new_empty(x, {0});
  const int64_t row_bytes = width * x.element_size(), x_bytes = given.need_x ? router.tokens * row_bytes : 0;
  prefer_large_pages(grad_x.mutable_data_ptr(), x_bytes);
  const RouterGradients<T> to{given.grad_weights ? static_cast<const T*>(held(*given.grad_weights)) : nullptr,
                              static_cast<const T*>(held(given.weights)),
                              static_cast<const int32_t*>(held(given.experts)),
                              gate.get(),
                              losses ? losses->shares.data() : nullptr,
                              losses ? losses->z.data() : nullptr,
                              losses ? losses->local.data() : nullptr,
                              given.need_x ? grad_x.mutable_data_ptr() : nullptr,
                              x_bytes >= kStreamedBytes && is_whole_lines(grad_x.const_data_ptr(), row_bytes)};
  const int64_t bytes = kernels.scratch_bytes(router), each = router.experts * padded;
  const int64_t runs = problem.runs(each);
  Buffer<T> sums(given.need_gate ? each * std::max<int64_t>(runs, 1) : 0);
  if (given.need_gate && runs == 0) std::fill_n(sums.get(), each, T(0));
  for_each_task(
      runs, [&] { return Buffer<char>(bytes); },
      [&](int64_t run, const Buffer<char>& scratch) {
        T* const sum = given.need_gate ? sums.get() + run * each : nullptr;
        if (sum != nullptr) std::fill_n(sum, each, T(0));
        const int64_t end = problem.begin_of(run + 1, runs);
        for (int64_t token = problem.begin_of(run, runs); token < end; token += kBlockTokens) {
          kernels.differentiate(router, to, token, std::min(token + kBlockTokens, end), sum, scratch.get());
        }
      });
  Tensor grad_gate = torch::stable::new_empty(x, {given.need_gate ? router.experts : 0, width}, kType);
  if (!given.need_gate) return {grad_x, torch::stable::new_empty(arguments.gate_weight, {0})};
  auto* const out = static_cast<T*>(grad_gate.mutable_data_ptr());
  for_each_range(router.experts, 1, [&](int64_t e, int64_t) {
    for (int64_t run = 1; run < runs; ++run) {
      for (int64_t d = 0; d < width; ++d) sums[e * padded + d] += sums[run * each + e * padded + d];
    }
    std::copy_n(sums.get() + e * padded, width, out + e * width);
  });
  return {grad_x, torch::stable::to(grad_gate, arguments.gate_weight.scalar_type())};
}

Results backward(const std::optional<Tensor>& grad_weights, const std::optional<Tensor>& grad_losses, const Tensor& x,
                 const Tensor& gate_weight, const std::optional<Tensor>& modality, const std::optional<Tensor>& allowed,
                 const std::optional<Tensor>& valid, const Tensor& weights, const Tensor& experts, const Tensor& stats,
                 const std::string& score, bool renormalize, bool need_x, bool need_gate_weight) {
  const std::optional<Tensor> no_bias;  // it selects, and the selection is given
  const RouterArguments arguments{x, gate_weight, modality, allowed, no_bias, valid, weights.size(1), stats.size(0),
                                  score, renormalize};
  const BackwardArguments given{grad_weights, grad_losses, weights, experts, stats, need_x, need_gate_weight};
  return x.scalar_type() == ScalarType::Double ? backward_as<double>(arguments, given) : backward_as<float>(arguments, given);
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_routing_backward", TORCH_BOX(&mmrec::backward)); }
