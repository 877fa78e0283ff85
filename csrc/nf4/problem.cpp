#include "problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>

#include "../common/tensors.h"

namespace mmrec {

using torch::headeronly::ScalarType;

namespace {

LoRAFactor factor_of(const Tensor& factor) {
  return {factor.const_data_ptr(), factor.scalar_type() == ScalarType::Float, factor.size(1) * factor.size(2)};
}

}  // namespace

NF4Bytes nf4_bytes(const WeightArguments& arguments, int64_t rows, int64_t columns, int64_t blocksize) {
  NF4Bytes bytes{};
  bytes.packed = static_cast<const uint8_t*>(arguments.packed.const_data_ptr());
  if (arguments.nested_absmax) {
    bytes.nested = static_cast<const uint8_t*>(arguments.absmax.const_data_ptr());
    bytes.nested_absmax = static_cast<const float*>(arguments.nested_absmax->const_data_ptr());
    bytes.nested_code = static_cast<const float*>(arguments.nested_code->const_data_ptr());
    bytes.offset = *static_cast<const float*>(arguments.offset->const_data_ptr());
  } else {
    bytes.absmax = static_cast<const float*>(arguments.absmax.const_data_ptr());
  }
  bytes.rows = rows;
  bytes.columns = columns;
  while ((int64_t{1} << bytes.block_shift) < blocksize) ++bytes.block_shift;
  return bytes;
}

Adapters::Adapters(const AdapterArguments& arguments, int64_t tokens) : scaling_(arguments.scaling) {
  if (!arguments.a) return;
  count = arguments.a->size(0);
  rank = arguments.a->size(1);
  a = factor_of(*arguments.a);
  b = factor_of(*arguments.b);
  if (arguments.scalings) {
    const bool wide = arguments.scalings->scalar_type() == ScalarType::Double;
    const void* const from = arguments.scalings->const_data_ptr();
    for (int64_t e = 0; e < count; ++e) {
      scalings_.push_back(wide ? static_cast<const double*>(from)[e] : static_cast<const float*>(from)[e]);
    }
  }
  if (!arguments.ids) return;
  ids_ = static_cast<const int64_t*>(arguments.ids->const_data_ptr());
  if (tokens == 0) return;
  const auto [low, high] = std::minmax_element(ids_, ids_ + tokens);
  MMREC_CHECK(*low >= -1 && *high < count, "adapter_ids must be inside [-1, ", count, "), got ", *low, " to ", *high);
  if (*low == *high) return;
  std::vector<int64_t> next(static_cast<size_t>(count + 1), 0);
  const auto place = [&](int64_t id) -> int64_t& { return next[static_cast<size_t>(id < 0 ? count : id)]; };
  for (int64_t i = 0; i < tokens; ++i) ++place(ids_[i]);
  std::exclusive_scan(next.begin(), next.end(), next.begin(), int64_t{0});
  order_.resize(static_cast<size_t>(tokens));
  for (int64_t i = 0; i < tokens; ++i) order_[static_cast<size_t>(place(ids_[i])++)] = i;
}

void Adapters::append_ranges(int64_t begin, int64_t end, std::vector<AdapterRange>& ranges) const {
  for (int64_t i = begin; i < end;) {
    int64_t stop = i + 1;
    while (stop < end && at(stop) == at(i)) ++stop;
    if (at(i) >= 0) ranges.push_back({at(i), i - begin, stop - begin});
    i = stop;
  }
}

std::vector<const void*> row_pointers(const Tensor& matrix, const Adapters& adapters) {
  const auto* const base = static_cast<const char*>(matrix.const_data_ptr());
  const int64_t bytes = matrix.size(1) * matrix.element_size();
  std::vector<const void*> rows(static_cast<size_t>(matrix.size(0)));
  for (int64_t i = 0; i < matrix.size(0); ++i) rows[static_cast<size_t>(i)] = base + adapters.token(i) * bytes;
  return rows;
}

template <typename T>
void panel_products(Element element, const std::vector<const void*>& rows, int64_t width, const LoRAFactor& factor,
                    const Adapters& adapters, bool scaled, int64_t (*scratch_bytes)(const SkinnyProduct<T>&),
                    void (*multiply)(const SkinnyProduct<T>&, char* scratch, T* out), T* out) {
  const auto& kernels = nf4_kernels_here<NF4Forward<T>>();
  const int64_t panel = kernels.panel, rank = adapters.rank, count = static_cast<int64_t>(rows.size());
  const int64_t panels = (count + panel - 1) / panel;
  const int64_t element_bytes = element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2;
  // All of a panel's tokens meet every adapter that one of them has: which kernel takes a token then depends on how many there
  // are, not on whose they are.
  SkinnyProduct<T> any{element, nullptr, std::min(panel, count), width, count <= kernels.most_few_skinny, nullptr,
                       factor.is_float32, rank, T(1)};
  const int64_t bytes = scratch_bytes(any);
  for_each_task(
      panels, [&] { return std::pair(Buffer<char>(bytes), Buffer<T>(rank * panel)); },
      [&](int64_t p, const auto& scratch) {
        const int64_t begin = p * panel, end = std::min(begin + panel, count);
        T* const to = out + begin * rank;
        std::fill(to, to + rank * panel, T(0));
        std::vector<AdapterRange> ranges;
        adapters.append_ranges(begin, end, ranges);
        for (const AdapterRange& range : ranges) {
          SkinnyProduct<T> product = any;
          product.rows = rows.data() + begin;
          product.count = end - begin;
          product.factor = factor.of(range.adapter, element_bytes);
          product.scale = static_cast<T>(scaled ? adapters.scaling(range.adapter) : 1.0);
          multiply(product, scratch.first.get(), scratch.second.get());
          for (int64_t r = 0; r < rank; ++r) {
            const T* const from = scratch.second.get() + r * panel;
            std::copy(from + range.begin, from + range.end, to + r * panel + range.begin);
          }
        }
      });
}

template void panel_products(Element, const std::vector<const void*>&, int64_t, const LoRAFactor&, const Adapters&, bool,
                             int64_t (*)(const SkinnyProduct<float>&), void (*)(const SkinnyProduct<float>&, char*, float*), float*);
template void panel_products(Element, const std::vector<const void*>&, int64_t, const LoRAFactor&, const Adapters&, bool,
                             int64_t (*)(const SkinnyProduct<double>&), void (*)(const SkinnyProduct<double>&, char*, double*), double*);

}  // namespace mmrec
