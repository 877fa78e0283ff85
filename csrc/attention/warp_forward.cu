// The op of warp_forward.cuh: a warp per sequence and KV head, for a few queries onto a few keys.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/check.h"
#include "../common/cuda.cuh"
#include "warp_forward.cuh"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kWarpsPerBlock = 4;

// At least one block to a multiprocessor: left to itself the compiler spills some bytes for a fourth.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kWarpsPerBlock, 1) warp_forward_kernel(const __grid_constant__ WarpParams p) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + (threadIdx.x >> 5);
  if (unit < p.batch * p.kv_heads) WarpForward<T, D>(p, unit).run();
}

template <typename T>
void launch(const WarpParams& p, int64_t width, cudaStream_t stream) {
  const auto kernel = width == 16   ? warp_forward_kernel<T, 16>
                      : width == 32 ? warp_forward_kernel<T, 32>
                      : width == 64 ? warp_forward_kernel<T, 64>
                                    : warp_forward_kernel<T, 128>;
  const int64_t blocks = (p.batch * p.kv_heads + kWarpsPerBlock - 1) / kWarpsPerBlock;
  kernel<<<static_cast<unsigned>(blocks), 32 * kWarpsPerBlock, 0, stream>>>(p);
  MMREC_CUDA_CHECK(cudaGetLastError());
}

// A row is read 16 bytes at a time (8 where it has 16 elements).
void check_rows(const char* name, const Tensor& rows) {
  const bool last = rows.size(2) <= 1 || rows.stride(2) == 1;
  const bool apart = rows.stride(0) % 8 == 0 && rows.stride(1) % 8 == 0;
  MMREC_CHECK(last && apart && reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0, name,
              " must have contiguous rows at addresses that 16 divides for the CUDA C++ kernel");
}

const float* floats(const char* name, const std::optional<Tensor>& vector) {
  if (!vector) return nullptr;
  MMREC_CHECK(vector->scalar_type() == ScalarType::Float && (vector->size(0) <= 1 || vector->stride(0) == 1), name,
              " must be float32 and contiguous for the CUDA C++ kernel");
  return vector->const_data_ptr<float>();
}

WarpPerSegment per_segment(const char* name, const std::optional<Tensor>& tensor) {
  if (!tensor) return {};
  MMREC_CHECK(tensor->scalar_type() == ScalarType::Float, name, " must be float32 for the CUDA C++ kernel");
  const auto step = [&](int64_t axis) { return tensor->size(axis) == 1 ? int64_t{0} : tensor->stride(axis); };
  return {tensor->const_data_ptr<float>(), step(0), step(1), step(2)};
}

using Results = std::tuple<Tensor, Tensor, Tensor>;

Results forward(const Tensor& query, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                const Tensor& offsets_any, const std::vector<Tensor>& index,
                const std::optional<Tensor>& query_offsets, const std::optional<Tensor>& log_bias,
                const std::optional<Tensor>& value_gate, const std::optional<Tensor>& sink,
                const std::optional<Tensor>& query_norm, const std::optional<Tensor>& key_norm, double scale,
                double norm_eps, int64_t indexed, int64_t causal, bool return_mass) {
  const ScalarType dtype = query.scalar_type();
  const int64_t width = query.size(2), heads = query.size(1), kv_heads = keys[0].size(1);
  const auto segments = static_cast<int64_t>(keys.size());
  MMREC_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
              "query must be bfloat16 or float16 for the CUDA C++ kernel");
  MMREC_CHECK(values[0].size(2) == width && (width == 16 || width == 32 || width == 64 || width == 128),
              "query, key and value must be 16, 32, 64 or 128 wide for the CUDA C++ kernel, got ", width, " and ",
              values[0].size(2));
  MMREC_CHECK(segments <= kWarpSegments, "segments must hold at most ", kWarpSegments,
              " segments for the CUDA C++ kernel, got ", segments);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Tensor offsets = torch::stable::contiguous(offsets_any);

  WarpParams p{};
  p.batch = offsets.size(1) - 1;
  const int64_t rows = query_offsets ? query.size(0) : query.size(0) * p.batch;
  Tensor out = torch::stable::new_empty(query, {rows, heads, width});
  Tensor lse = torch::stable::new_empty(query, {rows, heads}, ScalarType::Double);
  Tensor mass = return_mass ? torch::stable::new_empty(query, {rows, heads, segments}, ScalarType::Float)
                            : torch::stable::new_empty(query, {0}, ScalarType::Float);
  if (p.batch == 0) {
    torch::stable::fill_(lse, -__builtin_huge_val());
    return {torch::stable::zero_(out), lse, torch::stable::zero_(mass)};
  }
  if (rows == 0 || heads == 0) return {out, lse, mass};

  constexpr int64_t kBytes = 2;
  check_rows("query", query);
  p.query = static_cast<const char*>(query.const_data_ptr());
  p.query_row = query.stride(0) * kBytes;
  p.query_head = query.stride(1) * kBytes;
  p.query_rows = query.size(0);
  const auto positions = query_offsets ? std::optional<Tensor>(torch::stable::contiguous(*query_offsets)) : std::nullopt;
  p.query_offsets = positions ? positions->const_data_ptr<int64_t>() : nullptr;
  p.offsets = offsets.const_data_ptr<int64_t>();
  p.sink = floats("sink", sink);
  p.query_norm = floats("query_norm", query_norm);
  p.key_norm = floats("key_norm", key_norm);
  p.log_bias = per_segment("log_bias", log_bias);
  p.value_gate = per_segment("value_gate", value_gate);
  p.out = static_cast<char*>(out.mutable_data_ptr());
  p.lse = static_cast<double*>(lse.mutable_data_ptr());
  p.mass = return_mass ? static_cast<float*>(mass.mutable_data_ptr()) : nullptr;
  p.kv_heads = static_cast<int>(kv_heads);
  p.group = static_cast<int>(heads / kv_heads);
  p.segments = static_cast<int>(segments);
  p.causal = static_cast<int>(causal);
  p.scale = static_cast<float>(scale);
  p.norm_eps = static_cast<float>(norm_eps);
  std::vector<Tensor> held;
  size_t next = 0;
  for (int64_t m = 0; m < segments; ++m) {
    const Tensor &key = keys[m], &value = values[m];
    check_rows("key", key);
    check_rows("value", value);
    WarpSegment& segment = p.segment[m];
    segment = {static_cast<const char*>(key.const_data_ptr()), static_cast<const char*>(value.const_data_ptr()), nullptr,
               key.stride(0) * kBytes, key.stride(1) * kBytes, value.stride(0) * kBytes, value.stride(1) * kBytes,
               key.size(0), key.size(0)};
    if (indexed >> m & 1) {
      held.push_back(torch::stable::contiguous(index[next++]));
      segment.index = held.back().const_data_ptr<int64_t>();
      segment.entries = held.back().size(0);
    }
  }
  const cudaStream_t stream = current_stream(query.get_device_index());
  if (dtype == ScalarType::Half) {
    launch<warp::Float16>(p, width, stream);
  } else {
    launch<warp::BFloat16>(p, width, stream);
  }
  return {out, lse, mass};
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CUDA, m) { m.impl("_attention_forward_warp", TORCH_BOX(&mmrec::forward)); }
