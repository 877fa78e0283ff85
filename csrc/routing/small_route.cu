// The op of small_route.cuh: routing, losses and the experts' plan of few tokens in one launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../common/check.h"
#include "../common/cuda.cuh"
#include "small_route.cuh"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using elements::Float32;
using elements::Narrow;

template <typename X, typename G, int kE>
__global__ void __launch_bounds__(256) small_route_kernel(const __grid_constant__ SmallRouteParams p) {
  using Route = SmallRoute<X, G, kE>;
  __shared__ typename Route::Shared shared;
  Route route{p, shared, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x)};
  route.route_tokens();
  __syncthreads();
  route.add_tokens();
  __syncthreads();
  route.rank_slots();
  // What this block has written is there for others before it is counted as arrived.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(p.arrived, 1u) + 1 == gridDim.x ? 1 : 0;
  __syncthreads();
  if (shared.last == 0) return;
  __threadfence();
  route.add_blocks();
  __syncthreads();
  route.finish();
  __syncthreads();
  route.place();
}

template <typename X, typename G>
void launch(const SmallRouteParams& p, int padded, cudaStream_t stream) {
  const auto kernel = padded == 8    ? small_route_kernel<X, G, 8>
                      : padded == 16 ? small_route_kernel<X, G, 16>
                      : padded == 32 ? small_route_kernel<X, G, 32>
                                     : small_route_kernel<X, G, 64>;
  kernel<<<static_cast<unsigned>(p.blocks), 256, 0, stream>>>(p);
  MMREC_CUDA_CHECK(cudaGetLastError());
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Results route(const Tensor& x, const Tensor& gate_any, const std::optional<Tensor>& modality_any,
              const std::optional<Tensor>& allowed_any, const std::optional<Tensor>& bias_any,
              const std::optional<Tensor>& valid_any, int64_t k, int64_t modalities, const std::string& score,
              bool renormalize) {
  const int64_t tokens = x.size(0), width = x.size(1), experts = gate_any.size(0);
  const ScalarType dtype = x.scalar_type(), gate_dtype = gate_any.scalar_type();
  const bool narrow = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  MMREC_CHECK(narrow || dtype == ScalarType::Float, "x must be float32, bfloat16 or float16 for the CUDA C++ kernel");
  MMREC_CHECK(gate_dtype == dtype || gate_dtype == ScalarType::Float, "gate_weight must have the dtype of x or be float32");
  MMREC_CHECK(tokens <= kSmallTokens && experts <= kSmallExperts && modalities <= kSmallModalities && k <= kSmallExperts,
              "x must have at most ", kSmallTokens, " tokens, gate_weight ", kSmallExperts, " experts, k be at most ",
              kSmallExperts, " and num_modalities ", kSmallModalities, " for the CUDA C++ kernel");
  MMREC_CHECK(width <= 1 || x.stride(1) == 1, "x must have contiguous rows for the CUDA C++ kernel");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto contiguous = [](const std::optional<Tensor>& tensor) {
    return tensor ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
  };
  const Tensor gate = torch::stable::contiguous(gate_any);
  const auto modality = contiguous(modality_any), allowed = contiguous(allowed_any), bias = contiguous(bias_any),
             valid = contiguous(valid_any);

  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::new_empty(x, sizes, type);
  };
  Tensor weights = make({tokens, k}, ScalarType::Float), ids = make({tokens, k}, ScalarType::Int);
  Tensor stats = make({modalities, experts, 3}, ScalarType::Float), losses = make({4, modalities}, ScalarType::Float);
  Tensor starts = make({experts + 1}, ScalarType::Long), pair_tokens = make({tokens * k}, ScalarType::Long);
  Tensor pair_of = make({tokens, k}, ScalarType::Long);
  if (tokens == 0 || modalities == 0) {
    torch::stable::fill_(ids, -1);
    torch::stable::fill_(pair_of, -1);
    return {torch::stable::zero_(weights), ids, torch::stable::zero_(stats), torch::stable::zero_(losses), torch::stable::zero_(starts),
            pair_tokens, pair_of};
  }

  const int padded = experts <= 8 ? 8 : experts <= 16 ? 16 : experts <= 32 ? 32 : 64;
  const int64_t blocks = (tokens + 31) / 32;
  Tensor sums = make({blocks, modalities, 3, padded}, ScalarType::Float), totals = make({blocks, modalities, 3}, ScalarType::Float);
  Tensor counts = make({blocks, padded}, ScalarType::Int), ranks = make({tokens, k}, ScalarType::Int);
  Tensor arrived = make({1}, ScalarType::Int);
  torch::stable::zero_(arrived);

  SmallRouteParams p{};
  const int64_t bytes = narrow ? 2 : 4, gate_bytes = gate_dtype == ScalarType::Float ? 4 : 2;
  p.x = static_cast<const char*>(x.const_data_ptr());
  p.gate = static_cast<const char*>(gate.const_data_ptr());
  p.modality = modality ? modality->const_data_ptr<int64_t>() : nullptr;
  p.valid = valid ? static_cast<const uint8_t*>(valid->const_data_ptr()) : nullptr;
  p.allowed = allowed ? static_cast<const uint8_t*>(allowed->const_data_ptr()) : nullptr;
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.weights = weights.mutable_data_ptr<float>();
  p.experts = ids.mutable_data_ptr<int32_t>();
  p.stats = stats.mutable_data_ptr<float>();
  p.losses = losses.mutable_data_ptr<float>();
  p.starts = starts.mutable_data_ptr<int64_t>();
  p.pair_tokens = pair_tokens.mutable_data_ptr<int64_t>();
  p.pair_of = pair_of.mutable_data_ptr<int64_t>();
  p.sums = sums.mutable_data_ptr<float>();
  p.totals = totals.mutable_data_ptr<float>();
  p.counts = counts.mutable_data_ptr<int32_t>();
  p.ranks = ranks.mutable_data_ptr<int32_t>();
  p.arrived = reinterpret_cast<unsigned*>(arrived.mutable_data_ptr());
  p.x_row = x.stride(0) * bytes;
  p.tokens = static_cast<int>(tokens);
  p.width = static_cast<int>(width);
  p.num_experts = static_cast<int>(experts);
  p.modalities = static_cast<int>(modalities);
  p.k = static_cast<int>(k);
  p.blocks = static_cast<int>(blocks);
  const auto aligned = [&](const char* data, int64_t row) {
    return width % 8 == 0 && row % 16 == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0 ? 1 : 0;
  };
  p.x_aligned = aligned(p.x, p.x_row);
  p.gate_aligned = aligned(p.gate, width * gate_bytes);
  p.score = score == "sigmoid" ? SmallScore::kSigmoid : score == "softmax" ? SmallScore::kSoftmax : SmallScore::kTopkSoftmax;
  p.divides = renormalize || p.score == SmallScore::kTopkSoftmax ? 1 : 0;
  const cudaStream_t stream = current_stream(x.get_device_index());
  const bool wide_gate = gate_dtype == ScalarType::Float;
  if (!narrow) {
    launch<Float32, Float32>(p, padded, stream);
  } else if (dtype == ScalarType::Half) {
    wide_gate ? launch<Narrow<warp::Float16>, Float32>(p, padded, stream)
              : launch<Narrow<warp::Float16>, Narrow<warp::Float16>>(p, padded, stream);
  } else {
    wide_gate ? launch<Narrow<warp::BFloat16>, Float32>(p, padded, stream)
              : launch<Narrow<warp::BFloat16>, Narrow<warp::BFloat16>>(p, padded, stream);
  }
  return {weights, ids, stats, losses, starts, pair_tokens, pair_of};
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CUDA, m) { m.impl("_routing_forward_small", TORCH_BOX(&mmrec::route)); }
