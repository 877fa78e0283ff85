// Attention on CPU: the arguments that forward and backward share, checked and brought into the form of the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "attention_kernel.h"

namespace mmrec {

using torch::stable::Tensor;

// The arguments of both ops, in the order of their schemas.
struct AttentionArguments {
  const Tensor& query;
  const std::vector<Tensor>&keys, &values;
  const Tensor& offsets;
  const std::vector<Tensor>& index;
  const std::optional<Tensor>&query_offsets, &log_bias, &value_gate, &sink, &query_norm, &key_norm;
  double scale, norm_eps;
  int64_t indexed, causal;
};

// The kernels of this machine's ISA: K is AttentionForward<T> or AttentionBackward<T>.
template <typename K>
const K& kernels_here() {
  static const K found = [] {
    using Find = void (*)(K&);
    static constexpr Find kTable[] = MMREC_ISA_TABLE(attention_kernels);
    K made;
    kTable[static_cast<int>(cpu_isa())](made);
    return made;
  }();
  return found;
}

template <typename T>
class AttentionProblem {
 public:
  explicit AttentionProblem(const AttentionArguments& arguments);
  AttentionProblem(const AttentionProblem&) = delete;

  // Independent pieces of the sequences [first, last) in tasks of about the same size: task t has the units
  // [tasks[t], tasks[t + 1]). What a unit computes does not depend on how sequences are split. `whole`: sequences are split by
  // heads only, and those without queries are units too.
  void divide(int64_t threads, int64_t first, int64_t last, bool whole);

  int64_t queries_of(int64_t sequence) const {
    return kernel.query_offsets != nullptr ? kernel.query_offsets[sequence + 1] - kernel.query_offsets[sequence]
                                           : kernel.latent_rows;
  }

  int64_t heads() const { return kernel.kv_heads * kernel.group; }
  int64_t query_begin() const { return kernel.query_offsets != nullptr ? kernel.query_offsets[0] : 0; }
  int64_t query_end() const {
    return kernel.query_offsets != nullptr ? kernel.query_offsets[sequences] : sequences * kernel.latent_rows;
  }

  Attention<T> kernel{};
  int64_t sequences, rows;  // rows: of the result
  std::vector<AttentionUnit> units;
  std::vector<int64_t> tasks;

 private:
  HeadRows rows_of(const Tensor& tensor);
  void find_segments(const AttentionArguments& arguments);
  PerSegment<T> per_segment(const std::optional<Tensor>& tensor, double factor, double most);
  const T* vector_of(const std::optional<Tensor>& tensor);

  std::vector<Tensor> held_;  // what pointers point into
  std::vector<AttentionSegment> segments_;
  std::vector<std::vector<T>> scaled_;
};

}  // namespace mmrec
