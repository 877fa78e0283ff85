#include "experts_problem.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>

#include "../common/tensors.h"

namespace mmrec {

using torch::headeronly::ScalarType;

namespace {

// In the order of Activation.
constexpr const char* kActivations[] = {"swiglu", "geglu", "gelu", "relu", "relu2", "silu", "identity"};
// Up to this many tokens the width lies in lanes.
constexpr int64_t kFewTokens = 6;
constexpr int64_t kPassBytes = int64_t{32} << 20, kLeastPass = 1024;

}  // namespace

template <typename T>
const void* ExpertsProblem<T>::rows_of(const Tensor& tensor) {
  held_.push_back(torch::stable::contiguous(tensor));
  return held_.back().const_data_ptr();
}

template <typename T>
ExpertsProblem<T>::ExpertsProblem(const ExpertsArguments& arguments)
    : gates(arguments.weights.size(0)),
      tokens(arguments.weights.size(1)),
      k(arguments.weights.size(2)),
      experts(arguments.w_in.size(0)),
      has_shared(arguments.shared_w_in.has_value()) {
  const auto* const found = std::find(std::begin(kActivations), std::end(kActivations), arguments.activation);
  pass.activation = static_cast<Activation>(found - std::begin(kActivations));
  pass.width = arguments.x.size(1);
  pass.x = rows_of(arguments.x);
  pass.x_stride = pass.width;
  all_ = {rows_of(arguments.w_in), rows_of(arguments.w_out), arguments.b_in ? rows_of(*arguments.b_in) : nullptr,
          arguments.b_out ? rows_of(*arguments.b_out) : nullptr, arguments.w_out.size(2)};
  if (has_shared) {
    shared_ = {rows_of(*arguments.shared_w_in), rows_of(*arguments.shared_w_out), nullptr, nullptr,
               arguments.shared_w_out->size(1)};
  }
  pass.most_hidden = std::max(all_.hidden, shared_.hidden);
  pass.element = element_of(arguments.x);
  const bool odd = pass.width % 2 != 0 || all_.hidden % 2 != 0 || shared_.hidden % 2 != 0;
  if (pass.element == Element::kBFloat16Pairs && odd) pass.element = Element::kBFloat16;
  const auto& kernels = experts_kernels_here<ExpertsForward<T>>();
  pass.few = tokens <= kFewTokens && kernels.is_whole(pass.width, all_.hidden) && kernels.is_whole(pass.width, shared_.hidden);
  ids_ = static_cast<const int64_t*>(rows_of(torch::stable::to(arguments.experts, ScalarType::Long)));
  const int64_t entries = gates * tokens * k;
  if (entries == 0) return;
  const auto [low, high] = std::minmax_element(ids_, ids_ + entries);
  MMREC_CHECK(*low >= -1 && *high < experts, "routing.experts must be in [0, ", experts,
              ") or -1 for none, got values from ", *low, " to ", *high);
}

template <typename T>
Expert ExpertsProblem<T>::expert(int64_t e) const {
  if (e == experts) return shared_;
  const int64_t bytes = pass.element == Element::kFloat64 ? 8 : pass.element == Element::kFloat32 ? 4 : 2;
  const int64_t rows = all_.rows(pass.activation);
  const auto at = [&](const void* from, int64_t elements) -> const void* {
    return from == nullptr ? nullptr : static_cast<const char*>(from) + e * elements * bytes;
  };
  return {at(all_.w_in, rows * pass.width), at(all_.w_out, pass.width * all_.hidden), at(all_.b_in, rows),
          at(all_.b_out, pass.width), all_.hidden};
}

template <typename T>
ExpertsPlan ExpertsProblem<T>::plan(int64_t begin, int64_t end) const {
  const int64_t count = end - begin;
  ExpertsPlan made;
  made.first.assign(static_cast<size_t>(experts + 2), 0);
  made.slots.assign(static_cast<size_t>(gates * count * k), -1);
  made.leads.assign(made.slots.size(), 0);
  std::vector<int64_t> seen(static_cast<size_t>(experts), -1), pair(static_cast<size_t>(experts), 0);
  // Calls run(slot, expert, whether it is the first of the token's slots that names it).
  const auto for_each_slot = [&](int64_t t, const auto& run) {
    for (int64_t g = 0; g < gates; ++g) {
      for (int64_t s = 0; s < k; ++s) {
        const int64_t e = ids_[(g * tokens + begin + t) * k + s];
        if (e < 0) continue;
        const bool is_first = seen[static_cast<size_t>(e)] != t;
        seen[static_cast<size_t>(e)] = t;
        run((g * count + t) * k + s, static_cast<size_t>(e), is_first);
      }
    }
  };
  int64_t* const first = made.first.data();
  for (int64_t t = 0; t < count; ++t) {
    for_each_slot(t, [&](int64_t, size_t e, bool is_first) { first[e + 1] += is_first ? 1 : 0; });
  }
  for (int64_t e = 0; e < experts; ++e) first[e + 1] += first[e];
  made.tokens.resize(static_cast<size_t>(first[experts] + (has_shared ? count : 0)));
  std::vector<int64_t> next(made.first.begin(), made.first.end() - 1);
  std::fill(seen.begin(), seen.end(), -1);
  if (has_shared) made.shared.assign(static_cast<size_t>(count), -1);
  int64_t last = first[experts];
  for (int64_t t = 0; t < count; ++t) {
    bool alive = false;
    for_each_slot(t, [&](int64_t slot, size_t e, bool is_first) {
      alive = true;
      if (is_first) {
        pair[e] = next[e]++;
        made.tokens[static_cast<size_t>(pair[e])] = begin + t;
      }
      made.slots[static_cast<size_t>(slot)] = pair[e];
      made.leads[static_cast<size_t>(slot)] = is_first ? 1 : 0;
    });
    if (!has_shared || !alive) continue;
    made.shared[static_cast<size_t>(t)] = last;
    made.tokens[static_cast<size_t>(last++)] = begin + t;
  }
  first[experts + 1] = last;
  return made;
}

template <typename T>
int64_t ExpertsProblem<T>::tokens_of_pass(int64_t pair_bytes, int64_t sums_bytes) const {
  const int64_t pairs = std::min(gates * k, experts) + (has_shared ? 1 : 0);
  return std::max(kLeastPass, std::max(kPassBytes, sums_bytes) / std::max<int64_t>(pairs * pair_bytes, 1));
}

template <typename T>
KeptHidden ExpertsProblem<T>::kept_hidden(void* hidden, void* shared, int64_t element_bytes) const {
  KeptHidden kept{static_cast<char*>(hidden), static_cast<char*>(shared), all_.rows(pass.activation) * element_bytes, 0, {}};
  kept.next.assign(static_cast<size_t>(experts), 0);
  std::vector<int64_t> seen(static_cast<size_t>(experts), -1);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t g = 0; g < gates; ++g) {
      for (int64_t s = 0; s < k; ++s) {
        const int64_t e = ids_[(g * tokens + t) * k + s];
        if (e < 0 || seen[static_cast<size_t>(e)] == t) continue;
        seen[static_cast<size_t>(e)] = t;
        ++kept.next[static_cast<size_t>(e)];
      }
    }
  }
  for (int64_t& next : kept.next) {
    const int64_t count = next;
    next = kept.used;
    kept.used += count;
  }
  return kept;
}

template <typename T>
std::vector<ExpertTile> ExpertsProblem<T>::tiles(const ExpertsPlan& plan, KeptHidden* kept) const {
  std::vector<ExpertTile> made;
  for (int64_t e = 0; e <= experts; ++e) {
    const int64_t end = plan.first[static_cast<size_t>(e + 1)];
    for (int64_t at = plan.first[static_cast<size_t>(e)]; at < end; at += kTileTokens) {
      const int64_t count = std::min(kTileTokens, end - at);
      void* hidden = nullptr;
      if (kept != nullptr && e < experts) {
        hidden = kept->hidden + kept->next[static_cast<size_t>(e)] * kept->row_bytes;
        kept->next[static_cast<size_t>(e)] += count;
      }
      if (kept != nullptr && e == experts) hidden = kept->shared;
      made.push_back({expert(e), at, count, hidden, e == experts});
    }
  }
  return made;
}

template class ExpertsProblem<float>;
template class ExpertsProblem<double>;

}  // namespace mmrec
