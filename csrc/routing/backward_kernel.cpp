// Routing, the backward: the logits again, and what the gradients of weights and losses make of them.
//
//     du = p̄ (dp − Σ p̄ dp) + entropy's        dl = z's + du · (1 or σ(−l))        dx = dl W        dW = dlᵀ x
//
// dp collects the gradients of p̄; those of divided weights go to u, those of single sigmoids to l. What balance and global
// entropy give dp is one number per modality and expert. Work: three times the flops of the forward's logits.

#include "router.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename Kind, typename T>
class Task {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

 public:
  Task(const Router<T>& router, const RouterGradients<T>& to, Arena& arena)
      : r_(router), to_(to), groups_(router, arena), padded_(round_up(router.width, kLanes)) {
    log_scores_ = arena.take<T>(r_.experts * kLanes);
    powers_ = arena.take<T>(r_.experts * kLanes);
    dp_ = arena.take<T>(r_.experts * kLanes);
    du_ = arena.take<T>(r_.experts * kLanes);
    slopes_ = arena.take<T>((r_.experts + kGroup) * kGroupTokens);
    place_ = arena.take<int64_t>(r_.experts);
    gate_rows_ = arena.take<const T*>(r_.experts);
    rows_ = arena.take<T>(padded_ == r_.width ? 0 : kGroupTokens * padded_);
    row_pointers_ = arena.take<const T*>(padded_ == r_.width ? 0 : kGroupTokens);
    grad_x_ = arena.take<T>((kGroupTokens + 1) * padded_);
    grad_gate_ = arena.take<T>((r_.experts + 1) * padded_);
  }

  void run(int64_t first, int64_t last, T* grad_gate) {
    groups_.order(first, last, [&](int64_t token) {
      if (to_.x != nullptr) {
        std::memset(static_cast<Raw*>(to_.x) + token * r_.width, 0, sizeof(Raw) * static_cast<size_t>(r_.width));
      }
    });
    groups_.for_each(
        [&](int64_t m) {
          const Choices choices(r_, m);
          for (int64_t i = 0; i < choices.count; ++i) {
            place_[choices.experts[i]] = i;
            gate_rows_[i] = to_.gate + choices.experts[i] * padded_;
          }
          if (grad_gate != nullptr) std::memset(grad_gate_, 0, sizeof(T) * static_cast<size_t>(choices.count * padded_));
        },
        [&](int64_t m, const int64_t* tokens, int64_t count) {
          const Choices choices(r_, m);
          for (int64_t at = 0; at < count; at += kLanes) differentiate(m, choices, tokens + at, at_most(kLanes, count - at), at);
          if (to_.x != nullptr) find_grad_x(choices, tokens, count);
          if (grad_gate != nullptr) add_to_gate(choices, tokens, count);
        },
        [&](int64_t m) {
          const Choices choices(r_, m);
          for (int64_t i = 0; grad_gate != nullptr && i < choices.count; ++i) {
            T* const sum = grad_gate + choices.experts[i] * padded_;
            for (int64_t d = 0; d < padded_; ++d) sum[d] += grad_gate_[i * padded_ + d];
          }
        });
    fence();
  }

 private:
  using Raw = typename Kind::Raw;

  bool is_sigmoid() const { return r_.score == Score::kSigmoid; }

  // dl of the tokens in lanes, to the columns of `slopes` from `at` on.
  void differentiate(int64_t m, const Choices& choices, const int64_t* tokens, int64_t count, int64_t at) {
    const V zero = broadcast(T(0)), one = broadcast(T(1));
    const int64_t n = choices.count;
    const auto logit = [&](int64_t i) __attribute__((always_inline)) { return load(groups_.column(choices.experts[i]) + at); };
    const auto slope = [&](int64_t i) __attribute__((always_inline)) { return slopes_ + i * kGroupTokens + at; };
    V top_logit = logit(0);
    for (int64_t i = 1; i < n; ++i) top_logit = max(logit(i), top_logit);
    const V z = broadcast(to_.z == nullptr ? T(0) : to_.z[m]), local = broadcast(to_.local == nullptr ? T(0) : to_.local[m]);
    V top = top_logit, lse = zero, scale = zero;
    if (is_sigmoid()) {
      V sum = zero;
      for (int64_t i = 0; i < n; ++i) {
        store(log_scores_ + i * kLanes, log_sigmoid<T>(logit(i)));
        const V power = exp_of<T>(sub(logit(i), top_logit));
        store(slope(i), power);
        sum = add(sum, power);
      }
      lse = add(top_logit, log(sum));
      scale = div(mul(z, lse), sum);
      top = log_sigmoid<T>(top_logit);
    }
    const auto log_score = [&](int64_t i) __attribute__((always_inline)) {
      return is_sigmoid() ? load(log_scores_ + i * kLanes) : logit(i);
    };
    V sum = zero, spread = zero;
    for (int64_t i = 0; i < n; ++i) {
      const V below = sub(log_score(i), top), power = exp_of<T>(below);
      store(powers_ + i * kLanes, power);
      sum = add(sum, power);
      spread = add(spread, select(greater(power, zero), mul(power, below), zero));
    }
    const V inverse = div(one, sum), log_sum = log(sum), entropy = sub(log_sum, mul(spread, inverse));
    if (!is_sigmoid()) {
      lse = add(top, log_sum);
      scale = mul(mul(z, lse), inverse);
    }
    const V shift = sub(entropy, log_sum);
    for (int64_t i = 0; i < n; ++i) {
      // p (log p + H), 0 where p is.
      const V power = load(powers_ + i * kLanes), p = mul(power, inverse);
      const V term = mul(p, add(sub(log_score(i), top), shift));
      store(du_ + i * kLanes, select(greater(power, zero), sub(zero, mul(local, term)), mul(p, local)));
      store(dp_ + i * kLanes, broadcast(to_.shares == nullptr ? T(0) : to_.shares[m * r_.experts + choices.experts[i]]));
      store(slope(i), mul(scale, is_sigmoid() ? load(slope(i)) : power));
      store(powers_ + i * kLanes, p);
    }
    if (to_.grad_weights != nullptr) take_weights(tokens, count, at);
    V mean = zero;
    for (int64_t i = 0; i < n; ++i) mean = fma(load(powers_ + i * kLanes), load(dp_ + i * kLanes), mean);
    for (int64_t i = 0; i < n; ++i) {
      const V p = load(powers_ + i * kLanes);
      V du = fma(p, sub(load(dp_ + i * kLanes), mean), load(du_ + i * kLanes));
      if (is_sigmoid()) du = mul(du, sigmoid<T>(sub(zero, logit(i))));
      store(slope(i), add(load(slope(i)), du));
    }
  }

  // The gradients of the weights of the selected experts.
  void take_weights(const int64_t* tokens, int64_t count, int64_t at) {
    const bool divides = r_.renormalize || r_.score == Score::kTopkSoftmax;
    for (int64_t lane = 0; lane < count; ++lane) {
      const T* const grads = to_.grad_weights + tokens[lane] * r_.k;
      const T* const weights = to_.weights + tokens[lane] * r_.k;
      const int32_t* const experts = to_.experts + tokens[lane] * r_.k;
      T mean = 0;
      for (int64_t slot = 0; divides && slot < r_.k && experts[slot] >= 0; ++slot) mean += weights[slot] * grads[slot];
      for (int64_t slot = 0; slot < r_.k && experts[slot] >= 0; ++slot) {
        const int64_t e = experts[slot], i = place_[e];
        if (divides) {
          du_[i * kLanes + lane] += weights[slot] * (grads[slot] - mean);
        } else if (!is_sigmoid()) {
          dp_[i * kLanes + lane] += grads[slot];
        } else {
          T lanes[kLanes];
          const V l = broadcast(groups_.column(e)[at + lane]);
          store(lanes, mul(sigmoid<T>(l), sigmoid<T>(sub(broadcast(T(0)), l))));
          slopes_[i * kGroupTokens + at + lane] += grads[slot] * lanes[0];
        }
      }
    }
  }

  void find_grad_x(const Choices& choices, const int64_t* tokens, int64_t count) {
    std::memset(grad_x_, 0, sizeof(T) * static_cast<size_t>((count + 1) * padded_));
    weigh_values<1, kGroupTokens>(slopes_, count, gate_rows_, choices.count, padded_, grad_x_);
    for (int64_t i = 0; i < count; ++i) {
      Raw* const to = static_cast<Raw*>(to_.x) + tokens[i] * r_.width;
      to_.streamed ? stream_row(grad_x_ + i * padded_, T(1), r_.width, to) : write_row(grad_x_ + i * padded_, T(1), r_.width, to);
    }
  }

  void add_to_gate(const Choices& choices, const int64_t* tokens, int64_t count) {
    if (padded_ == r_.width) {
      return weigh_values<kGroupTokens, 1>(slopes_, choices.count, groups_.rows(), count, padded_, grad_gate_);
    }
    for (int64_t i = 0; i < count; ++i) {
      row_pointers_[i] = rows_ + i * padded_;
      stage(static_cast<const Raw*>(r_.x) + tokens[i] * r_.x_stride, r_.width, padded_, rows_ + i * padded_);
    }
    weigh_values<kGroupTokens, 1>(slopes_, choices.count, row_pointers_, count, padded_, grad_gate_);
  }

  const Router<T>& r_;
  const RouterGradients<T>& to_;
  Groups<Kind, T> groups_;
  const int64_t padded_;
  T *log_scores_, *powers_, *dp_, *du_;  // of the tokens in lanes, per choice
  T* slopes_;                            // [choices][kGroupTokens]
  int64_t* place_;                       // of an expert among the choices
  const T** gate_rows_;
  T* rows_;
  const T** row_pointers_;
  T *grad_x_, *grad_gate_;
};

template <typename T>
int64_t scratch_bytes(const Router<T>& router) {
  int64_t bytes = 0;
  with_kind<T>(router.element, [&](auto kind) {
    Arena arena{nullptr};
    Task<decltype(kind), T>(router, {}, arena);
    bytes = arena.used;
  });
  return bytes;
}

template <typename T>
void differentiate(const Router<T>& router, const RouterGradients<T>& to, int64_t first, int64_t last, T* grad_gate,
                   char* scratch) {
  with_kind<T>(router.element, [&](auto kind) {
    Arena arena{scratch};
    Task<decltype(kind), T>(router, to, arena).run(first, last, grad_gate);
  });
}

template <typename T>
constexpr RouteBackward<T> kKernels = {[](int64_t width) { return round_up(width, Vec<T>::kLanes); }, scratch_bytes<T>,
                                       differentiate<T>};

}  // namespace

void routing_kernels(RouteBackward<float>& kernels) { kernels = kKernels<float>; }
void routing_kernels(RouteBackward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
