// What every CUDA launcher needs of torch: the current stream and a check. Only symbols of torch 2.10's stable ABI.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "check.h"

#define MMREC_CUDA_CHECK(call)                                                        \
  do {                                                                                \
    const cudaError_t error_ = (call);                                                \
    STD_TORCH_CHECK(error_ == cudaSuccess, "CUDA error: ", cudaGetErrorString(error_)); \
  } while (false)

namespace mmrec {

inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

}  // namespace mmrec
