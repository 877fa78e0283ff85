// Routing on CPU: the arguments that forward and backward share, checked and brought into the form of the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "../common/parallel.h"
#include "routing_kernel.h"

namespace mmrec {

using torch::stable::Tensor;

// The arguments of both ops, in the order of their schemas.
struct RouterArguments {
  const Tensor &x, &gate_weight;
  const std::optional<Tensor>&modality, &allowed, &bias, &valid;
  int64_t k, modalities;
  const std::string& score;
  bool renormalize;
};

// The kernels of this machine's ISA.
template <typename K>
const K& routing_kernels_here() {
  static const K found = [] {
    using Find = void (*)(K&);
    static constexpr Find kTable[] = MMREC_ISA_TABLE(routing_kernels);
    K made;
    kTable[static_cast<int>(cpu_isa())](made);
    return made;
  }();
  return found;
}

template <typename T>
class RouterProblem {
 public:
  explicit RouterProblem(const RouterArguments& arguments);
  RouterProblem(const RouterProblem&) = delete;

  // Runs of whole blocks, whose sums are added in their order. How many depends on sizes alone, and so do the results' bits;
  // `words`: what each keeps, in numbers of 8 bytes.
  int64_t runs(int64_t words) const;
  // The tokens of a run are [begin_of(run, runs), begin_of(run + 1, runs)).
  int64_t begin_of(int64_t run, int64_t runs) const;

  Router<T> router{};

 private:
  std::vector<Tensor> held_;  // what pointers point into
  std::vector<int64_t> choice_offsets_, choices_;
  Buffer<char> gate_;
};

}  // namespace mmrec
