#include "problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../common/tensors.h"

namespace mmrec {

using torch::headeronly::ScalarType;

namespace {

Score score_of(const std::string& name) {
  return name == "softmax" ? Score::kSoftmax : name == "topk_softmax" ? Score::kTopkSoftmax : Score::kSigmoid;
}

// The most numbers that all runs keep.
constexpr int64_t kMostWords = int64_t{1} << 22, kMostRuns = 64;

}  // namespace

template <typename T>
RouterProblem<T>::RouterProblem(const RouterArguments& arguments) {
  const auto held = [&](const Tensor& tensor) {
    held_.push_back(torch::stable::contiguous(tensor));
    return held_.back().const_data_ptr();
  };
  const Tensor &x = arguments.x, &gate = arguments.gate_weight;
  router.tokens = x.size(0);
  router.width = x.size(1);
  router.experts = gate.size(0);
  router.modalities = arguments.modalities;
  router.k = arguments.k;
  router.score = score_of(arguments.score);
  router.renormalize = arguments.renormalize;
  router.element = element_of(x);
  // Pairs need a gate of the same type and rows of whole pairs.
  if (router.element == Element::kBFloat16Pairs && (gate.scalar_type() != x.scalar_type() || router.width % 2 != 0)) {
    router.element = Element::kBFloat16;
  }
  if (router.width <= 1 || x.stride(1) == 1) {
    held_.push_back(x);
    router.x = x.const_data_ptr();
    router.x_stride = x.stride(0);
  } else {
    router.x = held(x);
    router.x_stride = router.width;
  }
  if (arguments.modality) {
    router.modality = static_cast<const int64_t*>(held(*arguments.modality));
    if (router.tokens > 0) {
      const auto [low, high] = std::minmax_element(router.modality, router.modality + router.tokens);
      MMREC_CHECK(*low >= -1 && *high < router.modalities, "modality must be in [0, ", router.modalities,
                  ") or -1 for absent, got values from ", *low, " to ", *high);
    }
  }
  if (arguments.valid) router.valid = static_cast<const uint8_t*>(held(*arguments.valid));
  if (arguments.bias) router.bias = static_cast<const T*>(held(*arguments.bias));
  const uint8_t* const allowed = arguments.allowed ? static_cast<const uint8_t*>(held(*arguments.allowed)) : nullptr;
  choice_offsets_.push_back(0);
  for (int64_t m = 0; m < router.modalities; ++m) {
    for (int64_t e = 0; e < router.experts; ++e) {
      if (allowed == nullptr || allowed[m * router.experts + e] != 0) choices_.push_back(e);
    }
    choice_offsets_.push_back(static_cast<int64_t>(choices_.size()));
  }
  router.choice_offsets = choice_offsets_.data();
  router.choices = choices_.data();
  const auto& kernels = routing_kernels_here<RouteForward<T>>();
  router.lanes = kernels.gate_lanes(router.experts);
  gate_ = Buffer<char>(router.lanes * router.width * static_cast<int64_t>(sizeof(T)) + 64);
  constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  kernels.pack_gate(router, held(router.element == Element::kBFloat16Pairs ? gate : torch::stable::to(gate, kType)),
                    gate_.get());
  router.gate = gate_.get();
}

template <typename T>
int64_t RouterProblem<T>::runs(int64_t words) const {
  const int64_t blocks = (router.tokens + kBlockTokens - 1) / kBlockTokens;
  return std::min(blocks, std::clamp<int64_t>(kMostWords / std::max<int64_t>(words, 1), 1, kMostRuns));
}

template <typename T>
int64_t RouterProblem<T>::begin_of(int64_t run, int64_t runs) const {
  const int64_t blocks = (router.tokens + kBlockTokens - 1) / kBlockTokens;
  return std::min(blocks * run / runs * kBlockTokens, router.tokens);
}

template class RouterProblem<float>;
template class RouterProblem<double>;

}  // namespace mmrec
