// Routing, the forward: from logits to scores, the k best experts, their weights, and sums of statistics and losses.
//
//     u = l (softmax, topk_softmax) or log σ(l) (sigmoid)        p̄ = softmax(u)        H = log Σ e^(u − top) + Σ p̄ (top − u)
//
// Work: 2 · tokens · width · experts flops for the logits; x is read once, and nothing of size tokens · experts is written.

#include "router.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename Kind, typename T>
class Task {
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

 public:
  Task(const Router<T>& router, Arena& arena) : r_(router), groups_(router, arena), slots_(at_most(r_.k, r_.experts)) {
    log_scores_ = arena.take<T>(r_.experts * kLanes);
    powers_ = arena.take<T>(r_.experts * kLanes);
    keys_ = arena.take<T>(r_.experts * kLanes);
    shares_ = arena.take<T>(r_.experts * kLanes);
    places_ = arena.take<T>(slots_ * kLanes);
    weights_ = arena.take<T>(slots_ * kLanes);
  }

  void run(int64_t first, int64_t last, T* weights, int32_t* experts, double* sums) {
    groups_.order(first, last, [&](int64_t token) { clear(token, 0, weights, experts); });
    groups_.for_each(
        [&](int64_t m) {
          std::memset(shares_, 0, sizeof(T) * static_cast<size_t>(r_.choices_of(m) * kLanes));
          squares_ = entropies_ = broadcast(T(0));
        },
        [&](int64_t m, const int64_t* tokens, int64_t count) {
          double* const of = sums + m * sums_per_modality(r_.experts);
          for (int64_t at = 0; at < count; at += kLanes) {
            route(m, at, lanes_before<kLanes>(count - at));
            write(m, tokens + at, at_most(kLanes, count - at), weights, experts, of);
          }
          of[3 * r_.experts] += static_cast<double>(count);
        },
        [&](int64_t m) { finish(m, sums + m * sums_per_modality(r_.experts)); });
  }

 private:
  // Slots from `from` on are not used.
  void clear(int64_t token, int64_t from, T* weights, int32_t* experts) const {
    for (int64_t slot = from; slot < r_.k; ++slot) {
      weights[token * r_.k + slot] = T(0);
      experts[token * r_.k + slot] = -1;
    }
  }

  bool is_sigmoid() const { return r_.score == Score::kSigmoid; }
  bool divides() const { return r_.renormalize || r_.score == Score::kTopkSoftmax; }
  V logit(const Choices& choices, int64_t i, int64_t at) const { return load(groups_.column(choices.experts[i]) + at); }

  // log Σ exp(x), where x(i) are `count` vectors; their highest is left in `top`.
  template <typename X>
  static MMREC_INLINE V highest(int64_t count, const X& x) {
    V top = x(0);
    for (int64_t i = 1; i < count; ++i) top = max(x(i), top);
    return top;
  }

  // Tokens from `at` on, of which `live` are there.
  void route(int64_t m, int64_t at, uint32_t live) {
    const Choices choices(r_, m);
    const V zero = broadcast(T(0)), one = broadcast(T(1));
    const auto logit_of = [&](int64_t i) __attribute__((always_inline)) { return logit(choices, i, at); };
    const V top_logit = highest(choices.count, logit_of);
    V top = top_logit, lse = zero;
    if (is_sigmoid()) {
      V sum = zero;
      for (int64_t i = 0; i < choices.count; ++i) {
        store(log_scores_ + i * kLanes, log_sigmoid<T>(logit_of(i)));
        sum = add(sum, exp_of<T>(sub(logit_of(i), top_logit)));
      }
      lse = add(top_logit, log(sum));
      top = log_sigmoid<T>(top_logit);
    }
    const auto log_score = [&](int64_t i) __attribute__((always_inline)) {
      return is_sigmoid() ? load(log_scores_ + i * kLanes) : logit_of(i);
    };
    V sum = zero, spread = zero;
    for (int64_t i = 0; i < choices.count; ++i) {
      const V below = sub(log_score(i), top), power = exp_of<T>(below);
      store(powers_ + i * kLanes, power);
      sum = add(sum, power);
      spread = add(spread, select(greater(power, zero), mul(power, below), zero));
    }
    const V inverse = div(one, sum), log_sum = log(sum);
    if (!is_sigmoid()) lse = add(top, log_sum);
    squares_ = add(squares_, select(live, mul(lse, lse), zero));
    entropies_ = add(entropies_, select(live, sub(log_sum, mul(spread, inverse)), zero));
    for (int64_t i = 0; i < choices.count; ++i) {
      T* const share = shares_ + i * kLanes;
      store(share, add(load(share), select(live, mul(load(powers_ + i * kLanes), inverse), zero)));
    }
    find_keys(m, choices, at, inverse);
    const int64_t slots = at_most(r_.k, choices.count);
    select_best(choices.count, slots);
    weigh(choices, slots, at, top, inverse, sum);
  }

  // What the k highest of are selected: logits, or scores and biases.
  void find_keys(int64_t m, const Choices& choices, int64_t at, V inverse) {
    for (int64_t i = 0; i < choices.count; ++i) {
      V key = logit(choices, i, at);
      if (r_.bias != nullptr) {
        if (r_.score == Score::kSoftmax) key = mul(load(powers_ + i * kLanes), inverse);
        if (r_.score == Score::kSigmoid) key = sigmoid<T>(key);
        key = add(key, broadcast(r_.bias[m * r_.experts + choices.experts[i]]));
      }
      store(keys_ + i * kLanes, key);
    }
  }

  // The places among the choices of the `slots` highest keys, ties to the earlier one. Each pass takes out what the one before
  // it has found.
  void select_best(int64_t count, int64_t slots) {
    const V none = broadcast(T(-1)), least = broadcast(-static_cast<T>(__builtin_huge_val()));
    V found = none;
    for (int64_t slot = 0; slot < slots; ++slot) {
      V best = least, place = none;
      for (int64_t i = 0; i < count; ++i) {
        const V here = broadcast(static_cast<T>(i));
        V key = load(keys_ + i * kLanes);
        if (slot > 0) {
          key = select(same(found, here), least, key);
          store(keys_ + i * kLanes, key);
        }
        const uint32_t higher = greater(key, best);
        best = select(higher, key, best);
        place = select(higher, here, place);
      }
      store(places_ + slot * kLanes, place);
      found = place;
    }
    // What is −∞ or NaN beside others is taken in order, behind them.
    if (greater(broadcast(T(0)), found) == 0) return;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int64_t next = 0;
      for (int64_t slot = 0; slot < slots; ++slot) {
        if (places_[slot * kLanes + lane] >= T(0)) continue;
        const auto taken = [&](int64_t place) {
          for (int64_t s = 0; s < slots; ++s) {
            if (places_[s * kLanes + lane] == static_cast<T>(place)) return true;
          }
          return false;
        };
        while (taken(next)) ++next;
        places_[slot * kLanes + lane] = static_cast<T>(next);
      }
    }
  }

  void weigh(const Choices& choices, int64_t slots, int64_t at, V top, V inverse, V sum) {
    const V zero = broadcast(T(0));
    for (int64_t slot = 0; slot < slots; ++slot) {
      T* const logits = weights_ + slot * kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const auto place = static_cast<int64_t>(places_[slot * kLanes + lane]);
        logits[lane] = groups_.column(choices.experts[place])[at + lane];
      }
      const V l = load(logits);
      if (!divides()) {
        store(logits, is_sigmoid() ? sigmoid<T>(l) : mul(exp_of<T>(sub(l, top)), inverse));
      } else if (is_sigmoid()) {
        store(logits, log_sigmoid<T>(l));
      }
    }
    if (divides()) {
      const auto of = [&](int64_t slot) __attribute__((always_inline)) { return load(weights_ + slot * kLanes); };
      const V highest_of = highest(slots, of);
      V total = zero;
      for (int64_t slot = 0; slot < slots; ++slot) {
        const V power = exp_of<T>(sub(of(slot), highest_of));
        store(weights_ + slot * kLanes, power);
        total = add(total, power);
      }
      for (int64_t slot = 0; slot < slots; ++slot) store(weights_ + slot * kLanes, div(of(slot), total));
    }
    // A NaN among the logits is one of their sum.
    const V nan = sub(sum, sum);
    for (int64_t slot = 0; slot < slots; ++slot) {
      store(weights_ + slot * kLanes, add(load(weights_ + slot * kLanes), nan));
    }
  }

  void write(int64_t m, const int64_t* tokens, int64_t count, T* weights, int32_t* experts, double* of) const {
    const Choices choices(r_, m);
    const int64_t slots = at_most(r_.k, choices.count);
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t to = tokens[lane] * r_.k;
      for (int64_t slot = 0; slot < slots; ++slot) {
        const int64_t e = choices.experts[static_cast<int64_t>(places_[slot * kLanes + lane])];
        const T weight = weights_[slot * kLanes + lane];
        weights[to + slot] = weight;
        experts[to + slot] = static_cast<int32_t>(e);
        of[3 * e] += 1;
        of[3 * e + 2] += static_cast<double>(weight);
      }
      clear(tokens[lane], slots, weights, experts);
    }
  }

  static double sum_of(V x) {
    T lanes[kLanes];
    store(lanes, x);
    double sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(lanes[lane]);
    return sum;
  }

  void finish(int64_t m, double* of) const {
    const Choices choices(r_, m);
    for (int64_t i = 0; i < choices.count; ++i) of[3 * choices.experts[i] + 1] += sum_of(load(shares_ + i * kLanes));
    of[3 * r_.experts + 1] += sum_of(squares_);
    of[3 * r_.experts + 2] += sum_of(entropies_);
  }

  const Router<T>& r_;
  Groups<Kind, T> groups_;
  const int64_t slots_;
  // Of the tokens in lanes, per choice and per slot.
  T *log_scores_, *powers_, *keys_, *shares_, *places_, *weights_;
  V squares_, entropies_;
};

int64_t gate_lanes(int64_t experts, int64_t lanes) { return round_up(experts, lanes); }

template <typename T>
void pack_gate(const Router<T>& router, const void* gate, void* packed) {
  with_kind<T>(router.element, [&](auto kind) {
    using Dot = typename decltype(kind)::Dot;
    using Rows = Staged<decltype(kind)>;
    pack_lanes<Dot>(static_cast<const Rows*>(gate), router.width, router.experts, router.width, router.lanes,
                    static_cast<typename Dot::Word*>(packed));
  });
}

template <typename T>
void route(const Router<T>& router, int64_t first, int64_t last, T* weights, int32_t* experts, double* sums, char* scratch) {
  with_kind<T>(router.element, [&](auto kind) {
    Arena arena{scratch};
    Task<decltype(kind), T>(router, arena).run(first, last, weights, experts, sums);
  });
}

template <typename T>
constexpr RouteForward<T> kKernels = {[](int64_t experts) { return gate_lanes(experts, Vec<T>::kLanes); }, pack_gate<T>,
                                      scratch_bytes_of<Task, T, Router<T>>, route<T>};

}  // namespace

void routing_kernels(RouteForward<float>& kernels) { kernels = kKernels<float>; }
void routing_kernels(RouteForward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
