// The NF4 linear on CPU: the arguments that forward and backward share, checked and brought into the form of the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "../common/parallel.h"
#include "nf4_kernel.h"

namespace mmrec {

using torch::stable::Tensor;

// The kernels of this machine's ISA.
template <typename K>
const K& nf4_kernels_here() {
  static const K found = [] {
    using Find = void (*)(K&);
    static constexpr Find kTable[] = MMREC_ISA_TABLE(nf4_kernels);
    K made;
    kTable[static_cast<int>(cpu_isa())](made);
    return made;
  }();
  return found;
}

// The weight's tensors, in the order of the schemas.
struct WeightArguments {
  const Tensor &packed, &absmax;
  const std::optional<Tensor>&nested_absmax, &nested_code, &offset;
};
NF4Bytes nf4_bytes(const WeightArguments& arguments, int64_t rows, int64_t columns, int64_t blocksize);

// The adapters, in the order of the schemas.
struct AdapterArguments {
  const std::optional<Tensor>&a, &b;
  double scaling;
  const std::optional<Tensor>&scalings, &ids;
};

// Which adapter each token takes. Tokens are taken in an order in which those of an adapter are together, so that panels of them
// meet few adapters; tokens without one come last.
class Adapters {
 public:
  Adapters(const AdapterArguments& arguments, int64_t tokens);

  bool any() const { return count > 0 && rank > 0; }
  double scaling(int64_t adapter) const { return scalings_.empty() ? scaling_ : scalings_[static_cast<size_t>(adapter)]; }
  // The adapter of the token at position i of the order, or -1.
  int64_t at(int64_t i) const { return ids_ == nullptr ? (count > 0 ? 0 : -1) : ids_[token(i)]; }
  int64_t token(int64_t i) const { return order_.empty() ? i : order_[static_cast<size_t>(i)]; }
  // The ranges of the order's positions [begin, end), counted from `begin`, that take one adapter each.
  void append_ranges(int64_t begin, int64_t end, std::vector<AdapterRange>& ranges) const;

  int64_t count = 0, rank = 0;
  LoRAFactor a{}, b{};

 private:
  double scaling_;
  std::vector<double> scalings_;
  const int64_t* ids_ = nullptr;
  std::vector<int64_t> order_;
};

// rows[i] = where row order(i) of a matrix lies.
std::vector<const void*> row_pointers(const Tensor& matrix, const Adapters& adapters);

// A product with a factor of the adapters for all positions of the order, if `scaled` times the adapters' scalings:
// [panel][rank][panel width], 0 where a token has no adapter. `multiply` is one of the kernels' skinny products.
template <typename T>
void panel_products(Element element, const std::vector<const void*>& rows, int64_t width, const LoRAFactor& factor,
                    const Adapters& adapters, bool scaled, int64_t (*scratch_bytes)(const SkinnyProduct<T>&),
                    void (*multiply)(const SkinnyProduct<T>&, char* scratch, T* out), T* out);

}  // namespace mmrec
