// Experts on CPU, the backward: tiles over threads, then rows of the weights' gradients, then the tokens'; for as many tokens at a
// time as memory is meant to hold. Sums over tokens have the order of the pairs, sums over passes that of the passes.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "experts_problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The bits of `needs`, in the order of the results.
enum Need : size_t { kX, kWeights, kWIn, kWOut, kBIn, kBOut, kSharedWIn, kSharedWOut, kSharedGate, kNeeds };

// Tokens whose part of the shared gate's gradient is summed in T before it is added in double.
constexpr int64_t kGateRun = 1024;

template <typename T>
class Pass {
  static constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

 public:
  Pass(const ExpertsArguments& arguments, const Tensor& grad_out, const std::optional<Tensor>& hidden,
       const std::optional<Tensor>& shared_hidden, int64_t needs)
      : arguments_(arguments), problem_(arguments) {
    const auto held = [&](const Tensor& tensor) {
      held_.push_back(torch::stable::contiguous(tensor));
      return held_.back().const_data_ptr();
    };
    problem_.pass.few = false;
    grad_out_ = held(grad_out);
    weights_ = static_cast<const T*>(held(torch::stable::to(arguments.weights, kType)));
    if (arguments.shared_gate) gate_ = static_cast<const T*>(held(torch::stable::to(*arguments.shared_gate, kType)));
    if (hidden) {
      void* const kept = const_cast<void*>(held(*hidden));
      void* const shared = shared_hidden ? const_cast<void*>(held(*shared_hidden)) : nullptr;
      kept_ = problem_.kept_hidden(kept, shared, arguments.x.element_size());
    }
    inputs_ = {&arguments.x,   &arguments.weights,   &arguments.w_in,          &arguments.w_out,          of(arguments.b_in),
               of(arguments.b_out), of(arguments.shared_w_in), of(arguments.shared_w_out), of(arguments.shared_gate)};
    for (size_t n = 0; n < kNeeds; ++n) needed_[n] = inputs_[n] != nullptr && (needs >> n & 1) != 0;
    gate_sums_.assign(static_cast<size_t>(needed_[kSharedGate] ? problem_.pass.width : 0), 0.0);
  }

  Results run() {
    const int64_t width = problem_.pass.width;
    const int64_t rows = std::max(arguments_.w_in.size(1), arguments_.shared_w_in ? arguments_.shared_w_in->size(0) : 0);
    hidden_stride_ = rows;
    activated_stride_ = kernels_.whole_width(problem_.pass, problem_.pass.most_hidden);
    const int64_t staged = kernels_.staged_bytes(problem_.pass);
    const int64_t bytes = (hidden_stride_ + activated_stride_ + width) * staged + padded_ * static_cast<int64_t>(sizeof(T));
    int64_t sums = 0;
    for (size_t n = kWIn; n < kNeeds; ++n) sums += needed_[n] ? inputs_[n]->numel() : 0;
    const int64_t step = problem_.tokens_of_pass(bytes, sums * static_cast<int64_t>(sizeof(T)));
    if (problem_.tokens > 0 && problem_.tokens <= step) {
      const ExpertsPlan plan = problem_.plan(0, problem_.tokens);
      allocate(&plan);
      differentiate(plan, 0, problem_.tokens, staged);
    } else {
      allocate(nullptr);
      for (int64_t first = 0; first < problem_.tokens; first += step) {
        const int64_t last = std::min(first + step, problem_.tokens);
        differentiate(problem_.plan(first, last), first, last, staged);
      }
    }
    auto* const gate = needed_[kSharedGate] ? static_cast<T*>(sums_[kSharedGate].mutable_data_ptr()) : nullptr;
    for (size_t d = 0; d < gate_sums_.size(); ++d) gate[d] = static_cast<T>(gate_sums_[d]);
    for (size_t n = 0; n < kNeeds; ++n) {
      if (needed_[n]) sums_[n] = rounded(n);
    }
    return {sums_[0], sums_[1], sums_[2], sums_[3], sums_[4], sums_[5], sums_[6], sums_[7], sums_[8]};
  }

 private:
  static const Tensor* of(const std::optional<Tensor>& tensor) { return tensor ? &*tensor : nullptr; }
  static std::vector<int64_t> sizes(const Tensor& tensor) {
    std::vector<int64_t> found;
    for (int64_t n = 0; n < tensor.dim(); ++n) found.push_back(tensor.size(n));
    return found;
  }
  static bool is_of_experts(size_t n) { return n >= kWIn && n <= kBOut; }

  // What is added to, in T; of the experts' parameters, where they are narrower, only of those that have tokens if these are
  // few: for one token the zeros of the others would be most of the work.
  void allocate(const ExpertsPlan* plan) {
    place_.resize(static_cast<size_t>(problem_.experts));
    int64_t used = 0;
    for (int64_t e = 0; e < problem_.experts; ++e) {
      place_[static_cast<size_t>(e)] = e;
      used += plan != nullptr && has_pairs(*plan, e) ? 1 : 0;
    }
    some_ = plan != nullptr && 2 * used <= problem_.experts && inputs_[kWIn]->scalar_type() != kType;
    for (int64_t e = 0, next = 0; some_ && e < problem_.experts; ++e) {
      place_[static_cast<size_t>(e)] = has_pairs(*plan, e) ? next++ : -1;
    }
    for (size_t n = 0; n < kNeeds; ++n) {
      if (!needed_[n]) {
        sums_.push_back(torch::stable::new_empty(arguments_.x, {0}));
        continue;
      }
      std::vector<int64_t> shape = sizes(*inputs_[n]);
      if (some_ && is_of_experts(n)) shape[0] = used;
      sums_.push_back(torch::stable::new_empty(*inputs_[n], shape, n == kX ? arguments_.x.scalar_type() : kType));
      if (n != kX && n != kWeights) {  // those are written, the others added to
        clear(sums_.back().mutable_data_ptr(), sums_.back().numel() * static_cast<int64_t>(sizeof(T)));
      }
    }
  }
  static bool has_pairs(const ExpertsPlan& plan, int64_t e) {
    return plan.first[static_cast<size_t>(e)] < plan.first[static_cast<size_t>(e + 1)];
  }

  // Sums in the type of their parameter.
  Tensor rounded(size_t n) const {
    const ScalarType type = inputs_[n]->scalar_type();
    if (!some_ || !is_of_experts(n)) return torch::stable::to(sums_[n], type);
    Tensor all = torch::stable::new_zeros(*inputs_[n], sizes(*inputs_[n]), type);
    for (int64_t e = 0; e < problem_.experts; ++e) {
      const int64_t at = place_[static_cast<size_t>(e)];
      if (at < 0) continue;
      Tensor one = torch::stable::select(all, 0, e);
      torch::stable::copy_(one, torch::stable::select(sums_[n], 0, at));
    }
    return all;
  }
  T* sums(Need need) { return needed_[need] ? static_cast<T*>(sums_[need].mutable_data_ptr()) : nullptr; }

  void differentiate(const ExpertsPlan& plan, int64_t first, int64_t last, int64_t staged) {
    const int64_t gates = problem_.gates, width = problem_.pass.width;
    const auto pairs = static_cast<int64_t>(plan.tokens.size());
    const int64_t used_pairs = plan.first[static_cast<size_t>(problem_.experts + 1)];
    problem_.pass.tokens = plan.tokens.data();
    std::vector<T> coefficients(static_cast<size_t>(gates * pairs), T(0)), grads(coefficients.size(), T(0));
    std::vector<uint8_t> used(coefficients.size(), 0);
    find_coefficients(plan, first, last, pairs, used_pairs, coefficients, used);

    const bool to_in = needed_[kWIn] || needed_[kBIn] || needed_[kSharedWIn];
    const bool to_out = needed_[kWOut] || needed_[kBOut] || needed_[kSharedWOut];
    const bool to_rows = needed_[kX], to_weights = needed_[kWeights] || gate_ != nullptr;
    const Buffer<T> grad_rows(to_rows ? pairs * padded_ : 0);
    const Buffer<char> grad_hidden(to_in ? pairs * hidden_stride_ * staged : 0);
    const Buffer<char> activated(to_out ? pairs * activated_stride_ * staged : 0), grad_y(to_out ? pairs * width * staged : 0);
    const ExpertGradients<T> to{gates,
                                problem_.tokens,
                                pairs,
                                grad_out_,
                                coefficients.data(),
                                used.data(),
                                to_weights ? grads.data() : nullptr,
                                grad_rows.get(),
                                grad_hidden.get(),
                                activated.get(),
                                grad_y.get(),
                                hidden_stride_,
                                activated_stride_,
                                width};
    const std::vector<ExpertTile> tiles = problem_.tiles(plan, kept_.next.empty() ? nullptr : &kept_);
    const int64_t bytes = kernels_.scratch_bytes(problem_.pass);
    for_each_task(
        static_cast<int64_t>(tiles.size()), [&] { return Buffer<char>(bytes); },
        [&](int64_t n, const Buffer<char>& scratch) {
          kernels_.differentiate(problem_.pass, to, tiles[static_cast<size_t>(n)], scratch.get());
        });
    add_to_parameters(plan, to, bytes);
    if (needed_[kWeights]) {
      auto* const out = static_cast<T*>(sums_[kWeights].mutable_data_ptr());
      for_each_slot(plan, first, last, [&](int64_t g, int64_t at, int64_t pair) {
        out[at] = pair < 0 ? T(0) : grads[static_cast<size_t>(g * pairs + pair)];
      });
    }
    if (to_rows || needed_[kSharedGate]) add_to_tokens(plan, to, coefficients, grads, first, last);
  }

  // Calls run(gate, place in [gates, tokens, k], pair or −1).
  template <typename Run>
  void for_each_slot(const ExpertsPlan& plan, int64_t first, int64_t last, const Run& run) const {
    for (int64_t g = 0; g < problem_.gates; ++g) {
      for (int64_t n = 0; n < (last - first) * problem_.k; ++n) {
        const int64_t pair = plan.slots[static_cast<size_t>(g * (last - first) * problem_.k + n)];
        run(g, (g * problem_.tokens + first) * problem_.k + n, pair);
      }
    }
  }

  void find_coefficients(const ExpertsPlan& plan, int64_t first, int64_t last, int64_t pairs, int64_t used_pairs,
                         std::vector<T>& coefficients, std::vector<uint8_t>& used) {
    const int64_t shared_begin = plan.first[static_cast<size_t>(problem_.experts)];
    std::vector<T> own(static_cast<size_t>(used_pairs - shared_begin), T(1));
    rest_.assign(own.size(), T(0));
    if (gate_ != nullptr) {
      for_each_range(used_pairs - shared_begin, 256, [&](int64_t begin, int64_t end) {
        kernels_.find_shared_coefficients(problem_.pass, gate_, shared_begin + begin, shared_begin + end, own.data() + begin,
                                          rest_.data() + begin);
      });
    }
    for_each_slot(plan, first, last, [&](int64_t g, int64_t at, int64_t pair) {
      if (pair < 0) return;
      coefficients[static_cast<size_t>(g * pairs + pair)] += weights_[at];
      used[static_cast<size_t>(g * pairs + pair)] = 1;
      if (!problem_.has_shared) return;
      const int64_t token = at / problem_.k - g * problem_.tokens - first;
      const int64_t shared = plan.shared[static_cast<size_t>(token)];
      coefficients[static_cast<size_t>(g * pairs + shared)] = own[static_cast<size_t>(shared - shared_begin)];
      used[static_cast<size_t>(g * pairs + shared)] = 1;
    });
  }

  // Every task owns some rows of an expert's w_in or w_out, and of its bias.
  void add_to_parameters(const ExpertsPlan& plan, const ExpertGradients<T>& to, int64_t bytes) {
    struct Job {
      OuterProduct of;
      T *out, *bias;
    };
    std::vector<Job> jobs;
    std::vector<Buffer<T>> unwanted;  // products whose bias alone is needed
    const auto add = [&](OuterProduct of, int64_t rows, T* out, T* bias) {
      if (out == nullptr && bias == nullptr) return;
      for (int64_t row = 0; row < rows; row += kernels_.outer_rows) {
        of.first_row = row;
        of.rows = std::min(kernels_.outer_rows, rows - row);
        if (out == nullptr) {
          unwanted.emplace_back(of.rows * of.width);
          std::fill_n(unwanted.back().get(), of.rows * of.width, T(0));
        }
        jobs.push_back({of, out != nullptr ? out + row * of.width : unwanted.back().get(), bias != nullptr ? bias + row : nullptr});
      }
    };
    const int64_t width = problem_.pass.width;
    for (int64_t e = 0; e <= problem_.experts; ++e) {
      const int64_t begin = plan.first[static_cast<size_t>(e)], end = plan.first[static_cast<size_t>(e + 1)];
      if (begin == end) continue;
      const bool shared = e == problem_.experts;
      const Expert expert = problem_.expert(e);
      const int64_t rows = expert.rows(problem_.pass.activation), at = shared ? 0 : place_[static_cast<size_t>(e)];
      T *const w_in = sums(shared ? kSharedWIn : kWIn), *const w_out = sums(shared ? kSharedWOut : kWOut);
      T *const b_in = shared ? nullptr : sums(kBIn), *const b_out = shared ? nullptr : sums(kBOut);
      add({to.grad_hidden, to.hidden_stride, 0, 0, nullptr, 0, width, begin, end}, rows,
          w_in != nullptr ? w_in + at * rows * width : nullptr, b_in != nullptr ? b_in + at * rows : nullptr);
      add({to.grad_y, to.y_stride, 0, 0, to.activated, to.activated_stride, expert.hidden, begin, end}, width,
          w_out != nullptr ? w_out + at * width * expert.hidden : nullptr, b_out != nullptr ? b_out + at * width : nullptr);
    }
    for_each_task(
        static_cast<int64_t>(jobs.size()), [&] { return Buffer<char>(bytes); },
        [&](int64_t n, const Buffer<char>& scratch) {
          const Job& job = jobs[static_cast<size_t>(n)];
          kernels_.add_outer(problem_.pass, job.of, job.out, job.bias, scratch.get());
        });
  }

  // dx of a token is the sum of its pairs'; that of the shared gate sums over tokens.
  void add_to_tokens(const ExpertsPlan& plan, const ExpertGradients<T>& to, const std::vector<T>& coefficients,
                     const std::vector<T>& grads, int64_t first, int64_t last) {
    const int64_t count = last - first, width = problem_.pass.width, runs = (count + kGateRun - 1) / kGateRun;
    std::vector<std::vector<T>> sums(static_cast<size_t>(needed_[kSharedGate] ? runs : 0));
    void* const out = needed_[kX] ? sums_[kX].mutable_data_ptr() : nullptr;
    for_each_task(
        runs, [&] { return std::vector<T>(static_cast<size_t>(padded_)); },
        [&](int64_t run, std::vector<T>& row) {
          if (needed_[kSharedGate]) sums[static_cast<size_t>(run)].assign(static_cast<size_t>(width), T(0));
          for (int64_t t = run * kGateRun; t < std::min(count, (run + 1) * kGateRun); ++t) {
            const int64_t shared = problem_.has_shared ? plan.shared[static_cast<size_t>(t)] : -1;
            const T slope = shared >= 0 && gate_ != nullptr ? gate_slope(plan, shared, to, coefficients, grads) : T(0);
            if (needed_[kX]) {
              add_pairs(plan, to, t, count, shared, row);
              for (int64_t d = 0; shared >= 0 && gate_ != nullptr && d < width; ++d) row[static_cast<size_t>(d)] += slope * gate_[d];
              kernels_.write(problem_.pass, row.data(), first + t, out);
            }
            if (needed_[kSharedGate] && shared >= 0) {
              kernels_.add_token(problem_.pass, slope, first + t, sums[static_cast<size_t>(run)].data());
            }
          }
        });
    for (const std::vector<T>& sum : sums) {
      for (size_t d = 0; d < sum.size(); ++d) gate_sums_[d] += static_cast<double>(sum[d]);
    }
  }

  // Through σ(x · gate), which is the same in all gates that use it.
  T gate_slope(const ExpertsPlan& plan, int64_t shared, const ExpertGradients<T>& to, const std::vector<T>& coefficients,
               const std::vector<T>& grads) const {
    const T rest = rest_[static_cast<size_t>(shared - plan.first[static_cast<size_t>(problem_.experts)])];
    T slope = 0;
    for (int64_t g = 0; g < problem_.gates; ++g) {
      const auto at = static_cast<size_t>(g * to.pairs + shared);
      if (to.used[at] != 0) slope += grads[at] * coefficients[at] * rest;
    }
    return slope;
  }

  void add_pairs(const ExpertsPlan& plan, const ExpertGradients<T>& to, int64_t t, int64_t count, int64_t shared,
                 std::vector<T>& row) const {
    std::fill(row.begin(), row.end(), T(0));
    const auto add = [&](int64_t pair) {
      for (int64_t d = 0; d < padded_; ++d) row[static_cast<size_t>(d)] += to.grad_rows[pair * padded_ + d];
    };
    for (int64_t g = 0; g < problem_.gates; ++g) {
      for (int64_t slot = (g * count + t) * problem_.k; slot < (g * count + t + 1) * problem_.k; ++slot) {
        if (plan.leads[static_cast<size_t>(slot)] != 0) add(plan.slots[static_cast<size_t>(slot)]);
      }
    }
    if (shared >= 0) add(shared);
  }

  const ExpertsArguments& arguments_;
  ExpertsProblem<T> problem_;
  const ExpertsBackward<T>& kernels_ = experts_kernels_here<ExpertsBackward<T>>();
  const int64_t padded_ = experts_kernels_here<ExpertsForward<T>>().padded_width(problem_.pass.width);
  int64_t hidden_stride_ = 0, activated_stride_ = 0;
  std::vector<Tensor> held_;  // what pointers point into
  const void* grad_out_ = nullptr;
  const T *weights_ = nullptr, *gate_ = nullptr;
  KeptHidden kept_;
  std::array<bool, kNeeds> needed_{};
  std::array<const Tensor*, kNeeds> inputs_{};
  std::vector<Tensor> sums_;  // the results, before they are rounded
  std::vector<int64_t> place_;  // of an expert among the sums, −1 without
  bool some_ = false;  // whether sums are of some experts only
  std::vector<double> gate_sums_;
  std::vector<T> rest_;  // of the shared expert's pairs: 1 − their coefficients
};

Results backward(const Tensor& grad_out, const Tensor& x, const Tensor& weights, const Tensor& experts, const Tensor& w_in,
                 const Tensor& w_out, const std::optional<Tensor>& b_in, const std::optional<Tensor>& b_out,
                 const std::optional<Tensor>& shared_w_in, const std::optional<Tensor>& shared_w_out,
                 const std::optional<Tensor>& shared_gate, const std::optional<Tensor>& hidden,
                 const std::optional<Tensor>& shared_hidden, const std::string& activation, int64_t needs) {
  const ExpertsArguments arguments{x,           weights,      experts,     w_in,      w_out, b_in, b_out,
                                   shared_w_in, shared_w_out, shared_gate, activation};
  if (x.scalar_type() == ScalarType::Double) return Pass<double>(arguments, grad_out, hidden, shared_hidden, needs).run();
  return Pass<float>(arguments, grad_out, hidden, shared_hidden, needs).run();
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_experts_backward", TORCH_BOX(&mmrec::backward)); }
