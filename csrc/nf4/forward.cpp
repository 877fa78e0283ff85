// NF4 linear on CPU, the forward and the decoder: rows of W over threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "../common/tensors.h"
#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor>;

// Tokens whose sums a task keeps.
constexpr int64_t kPassTokens = 1024;

template <typename T>
Results forward_as(const Tensor& x, const NF4Bytes& weight, const std::optional<Tensor>& bias, const AdapterArguments& lora,
                   bool save_lora_x) {
  constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const auto& kernels = nf4_kernels_here<NF4Forward<T>>();
  const int64_t tokens = x.size(0), width = x.size(1), panel = kernels.panel;
  const Adapters adapters(lora, tokens);
  Tensor y = torch::stable::new_empty(x, {tokens, weight.rows});
  Tensor saved = save_lora_x && lora.a ? torch::stable::new_empty(x, {tokens, adapters.rank}, kType)
                                       : torch::stable::new_empty(x, {0}, kType);
  Tensor wide_bias = x;
  if (bias) wide_bias = torch::stable::contiguous(torch::stable::to(*bias, kType));
  if (tokens == 0) return {y, saved};

  NF4Pass<T> pass{};
  pass.element = element_of(x);
  pass.weight = weight;
  pass.bias = bias ? static_cast<const T*>(wide_bias.const_data_ptr()) : nullptr;
  const std::vector<const void*> rows = row_pointers(x, adapters);
  std::vector<void*> outputs(rows.size());
  auto* const first_output = static_cast<char*>(y.mutable_data_ptr());
  const int64_t output_bytes = weight.rows * y.element_size();
  for (int64_t i = 0; i < tokens; ++i) outputs[static_cast<size_t>(i)] = first_output + adapters.token(i) * output_bytes;
  const bool few = pass.few = tokens <= kernels.most_few(pass.element);

  // x aᵀ, once for all rows of W: as it is, to be kept, and scaled, in the form that the kernels read.
  const int64_t panels = (tokens + panel - 1) / panel, rank = adapters.any() ? adapters.rank : 0;
  const int64_t padded_rank = kernels.padded_rank(rank);
  const Buffer<T> products(panels * panel * rank), of_few(few ? tokens * padded_rank : 0);
  std::vector<int64_t> few_adapters(few ? static_cast<size_t>(tokens) : 0, -1);
  if (few) std::fill(of_few.get(), of_few.get() + tokens * padded_rank, T(0));
  if (rank > 0) {
    panel_products<T>(pass.element, rows, width, adapters.a, adapters, false, kernels.skinny_bytes, kernels.skinny, products.get());
  }
  auto* const kept = saved.numel() > 0 ? static_cast<T*>(saved.mutable_data_ptr()) : nullptr;
  if (kept != nullptr && rank == 0) std::fill(kept, kept + saved.numel(), T(0));
  for (int64_t i = 0; i < tokens && rank > 0; ++i) {
    const int64_t adapter = adapters.at(i);
    const T scaling = adapter < 0 ? T(0) : static_cast<T>(adapters.scaling(adapter));
    if (few) few_adapters[static_cast<size_t>(i)] = adapter;
    for (int64_t r = 0; r < rank; ++r) {
      T& product = products[(i / panel * rank + r) * panel + i % panel];
      if (kept != nullptr) kept[adapters.token(i) * rank + r] = product;
      product *= scaling;
      if (few) of_few[i * padded_rank + r] = product;
    }
  }
  pass.rank = rank;
  pass.b = adapters.b;

  const int64_t token_bytes = kernels.token_bytes(pass.element, width), step = few ? tokens : kPassTokens;
  const int64_t pass_panels = (std::min(step, tokens) + panel - 1) / panel;
  const Buffer<char> staged((few ? tokens : pass_panels * panel) * token_bytes);
  pass.tokens = staged.get();
  for (int64_t first = 0; first < tokens; first += step) {
    pass.count = std::min(step, tokens - first);
    pass.outputs = outputs.data() + first;
    std::vector<AdapterRange> ranges;
    std::vector<int64_t> first_range{0};
    if (few) {
      kernels.stage(pass.element, width, rows.data(), tokens, staged.get());
      pass.lora_x = of_few.get();
      pass.adapters = few_adapters.data();
    } else {
      const int64_t here = (pass.count + panel - 1) / panel, bytes = kernels.pack_bytes(pass.element);
      for_each_task(
          here, [&] { return Buffer<char>(bytes); },
          [&](int64_t p, const Buffer<char>& scratch) {
            kernels.pack(pass.element, width, rows.data() + first + p * panel, std::min(panel, pass.count - p * panel),
                         staged.get() + p * panel * token_bytes, scratch.get());
          });
      for (int64_t p = 0; p < here; ++p) {
        adapters.append_ranges(first + p * panel, first + std::min((p + 1) * panel, pass.count), ranges);
        first_range.push_back(static_cast<int64_t>(ranges.size()));
      }
      pass.lora_x = products.get() + first * rank;
      pass.ranges = ranges.data();
      pass.first_range = first_range.data();
    }
    const int64_t each = kernels.rows_per_task, bytes = kernels.scratch_bytes(pass);
    for_each_task(
        (weight.rows + each - 1) / each, [&] { return Buffer<char>(bytes); },
        [&](int64_t task, const Buffer<char>& scratch) {
          kernels.multiply(pass, scratch.get(), task * each, std::min((task + 1) * each, weight.rows));
        });
  }
  return {y, saved};
}

Results forward(const Tensor& x, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset, int64_t out_features,
                int64_t blocksize, const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_a,
                const std::optional<Tensor>& lora_b, double scaling, const std::optional<Tensor>& scalings,
                const std::optional<Tensor>& adapter_ids, bool save_lora_x) {
  const NF4Bytes weight = nf4_bytes({packed, absmax, nested_absmax, nested_code, offset}, out_features, x.size(1), blocksize);
  const AdapterArguments lora{lora_a, lora_b, scaling, scalings, adapter_ids};
  return x.scalar_type() == ScalarType::Double ? forward_as<double>(x, weight, bias, lora, save_lora_x)
                                               : forward_as<float>(x, weight, bias, lora, save_lora_x);
}

Tensor dequantize(const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                  const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset, int64_t out_features,
                  int64_t in_features, int64_t blocksize, const std::string& dtype) {
  const NF4Bytes weight = nf4_bytes({packed, absmax, nested_absmax, nested_code, offset}, out_features, in_features, blocksize);
  constexpr std::tuple<const char*, ScalarType, Decoded> kTypes[] = {{"float32", ScalarType::Float, Decoded::kFloat32},
                                                                     {"bfloat16", ScalarType::BFloat16, Decoded::kBFloat16},
                                                                     {"float16", ScalarType::Half, Decoded::kFloat16},
                                                                     {"float64", ScalarType::Double, Decoded::kFloat64}};
  const auto* const type = std::find_if(std::begin(kTypes), std::end(kTypes), [&](const auto& t) { return dtype == std::get<0>(t); });
  MMREC_CHECK(type != std::end(kTypes), "dtype must be float32, bfloat16, float16 or float64, got ", dtype);
  Tensor w = torch::stable::new_empty(packed, {out_features, in_features}, std::get<1>(*type));
  const auto& kernels = nf4_kernels_here<NF4Decode>();
  void* const out = w.mutable_data_ptr();
  const int64_t bytes = kernels.scratch_bytes(weight), each = kernels.rows_per_task;
  for_each_task(
      (out_features + each - 1) / each, [&] { return Buffer<char>(bytes); },
      [&](int64_t task, const Buffer<char>& scratch) {
        kernels.decode(weight, task * each, std::min((task + 1) * each, out_features), std::get<2>(*type), out, scratch.get());
      });
  return w;
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) {
  m.impl("_nf4_forward", TORCH_BOX(&mmrec::forward));
  m.impl("_nf4_dequantize", TORCH_BOX(&mmrec::dequantize));
}
