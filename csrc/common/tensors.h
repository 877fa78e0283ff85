// Tensors as what the kernels read.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"
#include "element.h"
#include "isa.h"

namespace mmrec {

inline Element element_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::BFloat16:
      return cpu_isa() == Isa::kAvx512Bf16 ? Element::kBFloat16Pairs : Element::kBFloat16;
    default:
      MMREC_CHECK(false, "query must be float32, bfloat16 or float64");
      return Element::kFloat32;
  }
}

}  // namespace mmrec
