// NF4 linear on CPU, the backward: groups of W's columns over threads, and columns of the sums over tokens.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "../common/tensors.h"
#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Tokens whose sums a task keeps, and blocks of absmax that one expands.
constexpr int64_t kPassTokens = 512, kExpandedBlocks = 4096;

template <typename T>
class Backward {
 public:
  Backward(const Tensor& dy, const NF4Bytes& weight, const AdapterArguments& lora)
      : kernels_(nf4_kernels_here<NF4Backward<T>>()),
        dy_(dy),
        element_(element_of(dy)),
        weight_(weight),
        tokens_(dy.size(0)),
        adapters_(lora, tokens_),
        rank_(adapters_.any() ? adapters_.rank : 0),
        panels_((tokens_ + kernels_.panel - 1) / kernels_.panel),
        rows_(row_pointers(dy, adapters_)) {}

  // dS in the order of the tokens, [panel][rank][panel width].
  void find_lora_dy() {
    lora_dy_ = Buffer<T>((panels_ + 1) * rank_ * kernels_.panel);
    std::fill(lora_dy_.get() + panels_ * rank_ * kernels_.panel, lora_dy_.get() + (panels_ + 1) * rank_ * kernels_.panel, T(0));
    panel_products<T>(element_, rows_, weight_.rows, adapters_.b, adapters_, true, kernels_.skinny_bytes, kernels_.skinny, lora_dy_.get());
  }

  void input(Tensor& dx) {
    expand_absmax();
    const int64_t width = weight_.columns, row_bytes = width * dx.element_size();
    std::vector<void*> outputs(rows_.size());
    for (int64_t i = 0; i < tokens_; ++i) {
      outputs[static_cast<size_t>(i)] = static_cast<char*>(dx.mutable_data_ptr()) + adapters_.token(i) * row_bytes;
    }
    std::vector<const void*> rows = rows_;
    Buffer<char> staged;
    if (!kernels_.reads_in_place(element_, weight_.rows)) {
      const int64_t each = kernels_.row_bytes(element_, weight_.rows);
      staged = Buffer<char>(tokens_ * each);
      for_each_range(tokens_, 16, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          kernels_.stage_row(element_, weight_.rows, rows_[static_cast<size_t>(i)], staged.get() + i * each);
          rows[static_cast<size_t>(i)] = staged.get() + i * each;
        }
      });
    }
    const int64_t passes = (tokens_ + kPassTokens - 1) / kPassTokens, groups = (width + kGroupColumns - 1) / kGroupColumns;
    const int64_t panel = kernels_.panel;
    std::vector<AdapterRange> ranges;
    std::vector<int64_t> first_range{0};
    for (int64_t first = 0; rank_ > 0 && first < tokens_; first += panel) {
      adapters_.append_ranges(first, std::min(first + panel, tokens_), ranges);
      first_range.push_back(static_cast<int64_t>(ranges.size()));
    }
    const auto pass_at = [&](int64_t first) {
      NF4InputPass<T> pass{element_, weight_, rows.data() + first, std::min(kPassTokens, tokens_ - first), rank_, adapters_.a,
                           nullptr, nullptr, nullptr, outputs.data() + first};
      if (rank_ > 0) {
        pass.lora_dy = lora_dy_.get() + first * rank_;
        pass.ranges = ranges.data();
        pass.first_range = first_range.data() + first / panel;
      }
      return pass;
    };
    const int64_t bytes = kernels_.input_bytes(pass_at(0));
    for_each_task(
        passes * groups, [&] { return Buffer<char>(bytes); },
        [&](int64_t task, const Buffer<char>& scratch) {
          kernels_.input(pass_at(task / groups * kPassTokens), scratch.get(), task % groups * kGroupColumns);
        });
  }

  // da = dSᵀ x.
  void factor_a(const Tensor& x, Tensor& da) {
    sum_adapters(row_pointers(x, adapters_), x.size(1), lora_dy_.get(), da, false);
  }

  // db = (s S)ᵀ dy, transposed.
  void factor_b(const Tensor& lora_x, Tensor& db) {
    const int64_t panel = kernels_.panel;
    const Buffer<T> scaled((panels_ + 1) * rank_ * panel);
    std::fill(scaled.get(), scaled.get() + (panels_ + 1) * rank_ * panel, T(0));
    const auto* const s = static_cast<const T*>(lora_x.const_data_ptr());
    for (int64_t i = 0; i < tokens_; ++i) {
      if (adapters_.at(i) < 0) continue;
      const T scaling = static_cast<T>(adapters_.scaling(adapters_.at(i)));
      for (int64_t r = 0; r < rank_; ++r) {
        scaled[(i / panel * rank_ + r) * panel + i % panel] = s[adapters_.token(i) * rank_ + r] * scaling;
      }
    }
    sum_adapters(rows_, weight_.rows, scaled.get(), db, true);
  }

  void bias(Tensor& dbias) {
    // In the order of the tokens, not of their adapters.
    std::vector<const void*> rows(rows_.size());
    for (int64_t i = 0; i < tokens_; ++i) rows[static_cast<size_t>(adapters_.token(i))] = rows_[static_cast<size_t>(i)];
    for_each_range(weight_.rows, kernels_.columns_per_task, [&](int64_t begin, int64_t end) {
      kernels_.sum_columns(element_, rows.data(), tokens_, begin, end, static_cast<T*>(dbias.mutable_data_ptr()) + begin);
    });
  }

  bool adapted() const { return rank_ > 0 && tokens_ > 0; }

 private:
  void expand_absmax() {
    if (weight_.absmax != nullptr) return;
    absmax_ = Buffer<float>(std::max<int64_t>(weight_.blocks(), 1));
    const auto& kernels = nf4_kernels_here<NF4Decode>();
    for_each_range(weight_.blocks(), kExpandedBlocks,
                   [&](int64_t begin, int64_t end) { kernels.expand(weight_, begin, end, absmax_.get() + begin); });
    weight_.absmax = absmax_.get();
  }

  // Each adapter's sum over its tokens, a matrix of `gradient`.
  void sum_adapters(const std::vector<const void*>& rows, int64_t width, const T* weights, Tensor& gradient, bool transposed) {
    std::vector<AdapterRange> ranges;
    adapters_.append_ranges(0, tokens_, ranges);
    const int64_t step = kernels_.columns_per_task, parts = (width + step - 1) / step;
    auto* const out = static_cast<char*>(gradient.mutable_data_ptr());
    const int64_t matrix_bytes = rank_ * width * gradient.element_size();
    const AdapterSums<T> any{element_, rows.data(), weights, rank_, 0, 0, out, width, gradient.scalar_type() == ScalarType::Float, transposed};
    const int64_t bytes = kernels_.sums_bytes(any);
    for_each_task(
        static_cast<int64_t>(ranges.size()) * parts, [&] { return Buffer<char>(bytes); },
        [&](int64_t task, const Buffer<char>& scratch) {
          const AdapterRange& range = ranges[static_cast<size_t>(task / parts)];
          const int64_t begin = task % parts * step;
          AdapterSums<T> sums = any;
          sums.first = range.begin;
          sums.last = range.end;
          sums.out = out + range.adapter * matrix_bytes;
          kernels_.sum_adapter(sums, scratch.get(), begin, std::min(begin + step, width));
        });
  }

  const NF4Backward<T>& kernels_;
  const Tensor& dy_;
  const Element element_;
  NF4Bytes weight_;
  const int64_t tokens_;
  const Adapters adapters_;
  const int64_t rank_, panels_;
  const std::vector<const void*> rows_;
  Buffer<float> absmax_;
  Buffer<T> lora_dy_;
};

template <typename T>
Results backward_as(const Tensor& dy, const std::optional<Tensor>& x, const NF4Bytes& weight, const AdapterArguments& lora,
                    const std::optional<Tensor>& lora_x, bool need_x, bool need_a, bool need_b, bool need_bias) {
  constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  const auto zeros_like = [&](const std::optional<Tensor>& t, bool needed) {
    if (!t || !needed) return torch::stable::new_empty(t ? *t : dy, {0});
    Tensor made = torch::stable::new_empty(*t, {t->size(0), t->size(1), t->size(2)});
    clear(made.mutable_data_ptr(), made.numel() * static_cast<int64_t>(made.element_size()));
    return made;
  };
  Tensor dx = need_x ? torch::stable::new_empty(dy, {dy.size(0), weight.columns}) : torch::stable::new_empty(dy, {0});
  Tensor da = zeros_like(lora.a, need_a), db = zeros_like(lora.b, need_b);
  Tensor dbias = need_bias ? torch::stable::new_empty(dy, {weight.rows}, kType) : torch::stable::new_empty(dy, {0}, kType);
  Backward<T> backward(dy, weight, lora);
  if (backward.adapted() && (need_x || need_a)) backward.find_lora_dy();
  if (need_x && dx.numel() > 0) backward.input(dx);
  if (need_a && backward.adapted()) backward.factor_a(*x, da);
  if (need_b && backward.adapted()) backward.factor_b(*lora_x, db);
  if (need_bias) backward.bias(dbias);
  return {dx, da, db, dbias};
}

Results backward(const Tensor& dy, const std::optional<Tensor>& x, const Tensor& packed, const Tensor& absmax,
                 const std::optional<Tensor>& nested_absmax, const std::optional<Tensor>& nested_code,
                 const std::optional<Tensor>& offset, int64_t in_features, int64_t blocksize,
                 const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, double scaling,
                 const std::optional<Tensor>& scalings, const std::optional<Tensor>& adapter_ids,
                 const std::optional<Tensor>& lora_x, bool need_x, bool need_a, bool need_b, bool need_bias) {
  const NF4Bytes weight = nf4_bytes({packed, absmax, nested_absmax, nested_code, offset}, dy.size(1), in_features, blocksize);
  const AdapterArguments lora{lora_a, lora_b, scaling, scalings, adapter_ids};
  return dy.scalar_type() == ScalarType::Double
             ? backward_as<double>(dy, x, weight, lora, lora_x, need_x, need_a, need_b, need_bias)
             : backward_as<float>(dy, x, weight, lora, lora_x, need_x, need_a, need_b, need_bias);
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_nf4_backward", TORCH_BOX(&mmrec::backward)); }
