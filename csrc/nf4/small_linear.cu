// The op of small_linear.cuh: the NF4 linear for up to 64 tokens in one launch, two where there are adapters.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../common/check.h"
#include "../common/cuda.cuh"
#include "small_linear.cuh"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
__global__ void __launch_bounds__(kSmallLinearThreads) small_low_rank_kernel(const __grid_constant__ SmallLinearParams p) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  using LowRank = SmallLowRank<T>;
  __shared__ typename LowRank::Shared shared;
  LowRank low{p, shared, static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y) * LowRank::kTokens,
              static_cast<int>(threadIdx.x)};
  low.multiply();
  __syncthreads();
  low.finish();
}

// A block to a multiprocessor at the least: with many rows and tokens its sums take most registers.
template <typename T, int kR, int kT>
__global__ void __launch_bounds__(kSmallLinearThreads, 1) small_linear_kernel(const __grid_constant__ SmallLinearParams p) {
  using Linear = SmallLinear<T, kR, kT>;
  extern __shared__ __align__(16) char memory[];
  Linear linear{p, *reinterpret_cast<typename Linear::Shared*>(memory), static_cast<int>(blockIdx.x) * Linear::kRows,
                static_cast<int>(threadIdx.x)};
  linear.fill();
  __syncthreads();
  float acc[kR][kT][4] = {};
  linear.multiply(acc);
  __syncthreads();
  linear.keep(acc);
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");  // for x aᵀ
#endif
  __syncthreads();
  linear.finish();
}

struct Device {
  int multiprocessors, major;

  explicit Device(int index) {
    MMREC_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
    MMREC_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  }
};

template <typename T, int kR, int kT>
void launch_linear(const SmallLinearParams& p, const Device& device, cudaStream_t stream) {
  using Linear = SmallLinear<T, kR, kT>;
  const auto kernel = small_linear_kernel<T, kR, kT>;
  constexpr int kBytes = sizeof(typename Linear::Shared);
  if (kBytes > 48 * 1024) {
    MMREC_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((p.rows + Linear::kRows - 1) / Linear::kRows));
  config.blockDim = dim3(kSmallLinearThreads);
  config.dynamicSmemBytes = kBytes;
  config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  // Only behind the launch that lets it: behind any other x might not be there yet.
  config.numAttrs = p.low != nullptr && device.major >= 9 ? 1 : 0;
  MMREC_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

// 32 rows of W to a block share what is read of x, where there is a block for each multiprocessor then. 64 would not fit registers.
template <typename T, int kT>
void launch(const SmallLinearParams& p, const Device& device, cudaStream_t stream) {
  const bool shares = (p.rows + 31) / 32 >= device.multiprocessors;
  if (shares) return launch_linear<T, 2, kT>(p, device, stream);
  launch_linear<T, 1, kT>(p, device, stream);
}

template <typename T>
void launch(const SmallLinearParams& p, int device_index, cudaStream_t stream) {
  const Device device(device_index);
  if (p.low != nullptr) {
    const dim3 blocks(static_cast<unsigned>(p.rank), static_cast<unsigned>((p.tokens + 7) / 8));
    small_low_rank_kernel<T><<<blocks, kSmallLinearThreads, 0, stream>>>(p);
    MMREC_CUDA_CHECK(cudaGetLastError());
  }
  if (p.rows == 0) return;
  if (p.tokens <= 8) return launch<T, 1>(p, device, stream);
  if (p.tokens <= 16) return launch<T, 2>(p, device, stream);
  if (p.tokens <= 32) return launch<T, 4>(p, device, stream);
  launch<T, 8>(p, device, stream);
}

const char* bytes_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const char*>(tensor->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& x, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
    const std::optional<Tensor>& nested_code, const std::optional<Tensor>& offset, int64_t out_features, int64_t blocksize,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b,
    double scaling, const std::optional<Tensor>& scalings, const std::optional<Tensor>& adapter_ids, bool save_lora_x) {
  const int64_t tokens = x.size(0), width = x.size(1);
  const ScalarType dtype = x.scalar_type();
  MMREC_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
              "x must be bfloat16 or float16 for the CUDA C++ kernel");
  MMREC_CHECK(tokens <= kSmallLinearTokens, "x must have at most ", kSmallLinearTokens,
              " tokens for the CUDA C++ kernel, got ", tokens);
  MMREC_CHECK(width > 0 && width % 32 == 0, "x must have a width that 32 divides for the CUDA C++ kernel, got ", width);
  MMREC_CHECK(width < INT32_MAX / 4 && out_features < INT32_MAX / 4,
              "x and weight must be narrower for the CUDA C++ kernel, got ", width, " columns and ", out_features, " rows");
  const bool low_rank = lora_a && lora_a->size(0) > 0 && lora_a->size(1) > 0;
  const auto check_aligned = [](const char* name, const std::optional<Tensor>& tensor) {
    MMREC_CHECK(!tensor || (reinterpret_cast<uintptr_t>(tensor->const_data_ptr()) % 16 == 0 && tensor->is_contiguous()), name,
                " must be contiguous, at an address that 16 divides, for the CUDA C++ kernel");
  };
  check_aligned("x", x);
  check_aligned("weight", packed);
  check_aligned("lora.a", lora_a);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());

  Tensor y = torch::stable::new_empty(x, {tokens, out_features});
  const int64_t rank = lora_a ? lora_a->size(1) : 0;
  const bool makes_low = low_rank || (save_lora_x && lora_a);
  Tensor low = makes_low ? torch::stable::new_empty(x, {tokens, rank}, ScalarType::Float)
                         : torch::stable::new_empty(x, {0}, ScalarType::Float);
  if (makes_low && !low_rank) torch::stable::zero_(low);
  if (tokens > 0) {
    SmallLinearParams p{};
    p.x = static_cast<const char*>(x.const_data_ptr());
    p.packed = packed.const_data_ptr<uint8_t>();
    p.absmax = static_cast<const char*>(absmax.const_data_ptr());
    if (nested_absmax) {
      p.nested_absmax = nested_absmax->const_data_ptr<float>();
      p.nested_code = nested_code->const_data_ptr<float>();
      p.offset = offset->const_data_ptr<float>();
    }
    p.bias = bytes_of(bias);
    p.bias_wide = bias && bias->scalar_type() == ScalarType::Float;
    if (low_rank) {
      p.a = bytes_of(lora_a);
      p.b = bytes_of(lora_b);
      p.adapters_wide = lora_a->scalar_type() == ScalarType::Float;
      p.scalings = scalings ? scalings->const_data_ptr<float>() : nullptr;
      p.ids = adapter_ids ? adapter_ids->const_data_ptr<int64_t>() : nullptr;
      p.low = low.mutable_data_ptr<float>();
      p.rank = static_cast<int>(rank);
      p.adapters = static_cast<int>(lora_a->size(0));
      p.rank_aligned = rank % 8 == 0 && reinterpret_cast<uintptr_t>(p.b) % 16 == 0;
      p.scaling = static_cast<float>(scaling);
    }
    p.y = static_cast<char*>(y.mutable_data_ptr());
    p.tokens = static_cast<int>(tokens);
    p.width = static_cast<int>(width);
    p.rows = static_cast<int>(out_features);
    while (int64_t{1} << p.block_shift < blocksize) ++p.block_shift;
    const cudaStream_t stream = current_stream(x.get_device_index());
    dtype == ScalarType::Half ? launch<warp::Float16>(p, x.get_device_index(), stream)
                              : launch<warp::BFloat16>(p, x.get_device_index(), stream);
  }
  return {y, save_lora_x ? low : torch::stable::new_empty(x, {0}, ScalarType::Float)};
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CUDA, m) { m.impl("_nf4_forward_small", TORCH_BOX(&mmrec::forward)); }
