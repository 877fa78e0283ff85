// Experts on CPU: the arguments, checked and brought into the form of the kernels, and the plan of who computes what.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../common/parallel.h"
#include "experts_kernel.h"

namespace mmrec {

using torch::stable::Tensor;

// The kernels of this machine's ISA.
template <typename K>
const K& experts_kernels_here() {
  static const K found = [] {
    using Find = void (*)(K&);
    static constexpr Find kTable[] = MMREC_ISA_TABLE(experts_kernels);
    K made;
    kTable[static_cast<int>(cpu_isa())](made);
    return made;
  }();
  return found;
}

// The arguments that both ops share, in the order of their schemas.
struct ExpertsArguments {
  const Tensor &x, &weights, &experts, &w_in, &w_out;
  const std::optional<Tensor>&b_in, &b_out, &shared_w_in, &shared_w_out, &shared_gate;
  const std::string& activation;
};

// The distinct (expert, token) pairs of some tokens, by expert, then by token; those of the shared expert come last.
struct ExpertsPlan {
  std::vector<int64_t> first;   // [experts + 2]: where the pairs of an expert begin
  std::vector<int64_t> tokens;  // of the pairs
  std::vector<int64_t> slots;   // [gates, tokens, k]: the pair that a slot names, or −1
  std::vector<uint8_t> leads;   // [gates, tokens, k]: whether no slot before it names that pair
  std::vector<int64_t> shared;  // [tokens]: the pair of the shared expert, or −1
};

// The pre-activations that the forward keeps for the backward.
struct KeptHidden {
  char *hidden = nullptr, *shared = nullptr;
  int64_t row_bytes = 0, used = 0;
  std::vector<int64_t> next;  // per expert, the row of its next pair over all tokens
};

template <typename T>
class ExpertsProblem {
 public:
  explicit ExpertsProblem(const ExpertsArguments& arguments);
  ExpertsProblem(const ExpertsProblem&) = delete;

  // Of the tokens [begin, end).
  ExpertsPlan plan(int64_t begin, int64_t end) const;
  // As many tokens at a time as memory is meant to hold, with so many bytes for each of their pairs: by sizes alone. A pass may
  // take as much as what it adds to, `sums_bytes`, which it reads and writes once.
  int64_t tokens_of_pass(int64_t pair_bytes, int64_t sums_bytes = 0) const;
  // Where pre-activations are, in the order of all tokens' pairs and in that of the tokens.
  KeptHidden kept_hidden(void* hidden, void* shared, int64_t element_bytes) const;
  // Those of a plan, the shared expert's last; `kept` (or null) moves on.
  std::vector<ExpertTile> tiles(const ExpertsPlan& plan, KeptHidden* kept) const;
  // `experts` is that of the shared expert.
  Expert expert(int64_t e) const;

  ExpertPass<T> pass{};
  int64_t gates, tokens, k, experts;
  bool has_shared;

 private:
  const void* rows_of(const Tensor& tensor);

  std::vector<Tensor> held_;  // what pointers point into
  const int64_t* ids_;        // [gates, tokens, k]
  Expert all_{}, shared_{};
};

}  // namespace mmrec
