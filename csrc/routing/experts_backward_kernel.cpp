// Experts, the backward: what comes to the outputs of a tile's pairs goes back through the expert's network; then, for some rows
// of its weights at a time, their gradient over all of its pairs.
//
//     dy = Σ_g c_g dout_g      dc_g = dout_g · y      da = dy W_out      dh = da act'(h)
//     dW_out = dyᵀ a      db_out = Σ dy      dW_in = dhᵀ x      db_in = Σ dh      dx = dh W_in
//
// h is made again, or read where it was kept. With one gate dc = Σ (dout W_out) a, without y. Here the hidden width lies in lanes
// and tokens are rows: weights' rows are added up, with dy and dh as weights, from where they lie. A task of the second part owns
// rows of dW, so that sums over pairs have one order. Work: 16 · pairs · width · hidden flops if gated (18 with several gates).

#include "../common/pairs.h"
#include "experts_tile.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Rows of dW that a task of the second part owns.
constexpr int64_t kOuterRows = 4 * kGroup;

template <typename Kind, typename T>
class Backward : Tile<Kind, T> {
  using Base = Tile<Kind, T>;
  using typename Base::Dot;
  using typename Base::Raw;
  using typename Base::Word;
  using S = Staged<Kind>;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kWhole = kLanes * Dot::kColumns;

 public:
  Backward(const ExpertPass<T>& pass, const ExpertGradients<T>& to, Arena& arena)
      : Base(pass, arena), to_(to), wide_(round_up(pass.width, kWhole)) {
    const int64_t most = pass.width > kHidden ? pass.width : kHidden;
    grads_ = arena.take<T>(kTileTokens * this->padded_);
    grads_staged_ = arena.take<S>(kTileTokens * (pass.width + 2));
    packed_grads_ = arena.take<Word>((words_of(pass.width, Dot::kColumns) + 1) * kTileTokens);
    hidden_gate_ = arena.take<T>((kTileTokens + 1) * kHidden);
    hidden_up_ = arena.take<T>((kTileTokens + 1) * kHidden);
    slopes_ = arena.take<T>((kTileTokens + 1) * kHidden);
    activated_ = arena.take<T>((kTileTokens + 1) * kHidden);
    staged_gate_ = arena.take<S>((kTileTokens + 1) * kHidden);
    staged_up_ = arena.take<S>((kTileTokens + 1) * kHidden);
    packed_activated_ = arena.take<Word>(kHidden * kTileTokens + 64);
    matrix_ = arena.take<S>(pass.width * kHidden + kHidden * wide_);
    pointers_ = arena.take<const S*>(most + 2);
    zeros_ = arena.take<S>(wide_ > kHidden ? wide_ : kHidden);
    grad_rows_ = arena.take<T>((kTileTokens + 1) * wide_);
    turned_y_ = arena.take<T>(kTileTokens * this->padded_);
    if (arena.memory != nullptr) {
      std::memset(static_cast<void*>(zeros_), 0, sizeof(S) * static_cast<size_t>(wide_ > kHidden ? wide_ : kHidden));
    }
  }

  void run(const ExpertTile& tile) {
    const ExpertPass<T>& p = this->p_;
    const Expert& expert = tile.expert;
    const int64_t width = p.width, hidden = expert.hidden, lanes = round_up(tile.count, kLanes);
    const bool gated = is_gated(p.activation), one_gate = to_.gates == 1;
    const bool outputs = to_.grad_coefficients != nullptr && !one_gate;
    start(tile);
    if (tile.hidden == nullptr) this->pack_tokens(tile, lanes);
    if (to_.grad_rows != nullptr) std::memset(grad_rows_, 0, sizeof(T) * static_cast<size_t>((tile.count + 1) * wide_));
    const auto* const w_in = static_cast<const Raw*>(expert.w_in);
    const auto* const w_out = static_cast<const Raw*>(expert.w_out);
    if (outputs) this->start_outputs(hidden, lanes);
    for (int64_t first = 0; first < hidden; first += kHidden) {
      const int64_t count = at_most(kHidden, hidden - first), whole = round_up(count, kWhole);
      find_hidden(tile, first, count, lanes, hidden_gate_);
      if (gated) find_hidden(tile, hidden + first, count, lanes, hidden_up_);
      std::memset(slopes_, 0, sizeof(T) * static_cast<size_t>((tile.count + 1) * whole));
      add_rows<1, kTileTokens>(packed_grads_, tile.count, w_out + first, width, hidden, count, whole, slopes_);
      for (int64_t i = 0; i < tile.count; ++i) differentiate(tile, i, first, count, whole);
      if (to_.grad_rows != nullptr) {
        add_rows<kHidden / Dot::kColumns, 1>(reinterpret_cast<const Word*>(staged_gate_), tile.count, w_in + first * width, count, width,
                                             width, wide_, grad_rows_);
        if (gated) {
          add_rows<kHidden / Dot::kColumns, 1>(reinterpret_cast<const Word*>(staged_up_), tile.count,
                                               w_in + (hidden + first) * width, count, width, width, wide_, grad_rows_);
        }
      }
      if (!outputs) continue;
      for (int64_t i = 0; i < tile.count; ++i) stage(activated_ + i * kHidden, count, count, staged_gate_ + i * kHidden);
      pack_lanes<Dot>(staged_gate_, kHidden, tile.count, count, lanes, packed_activated_);
      if (first == 0) {
        this->template multiply_rows<false>(w_out + first, width, hidden, count, packed_activated_, lanes, this->y_);
      } else {
        this->template multiply_rows<true>(w_out + first, width, hidden, count, packed_activated_, lanes, this->y_);
      }
    }
    finish(tile, lanes, outputs);
  }

 private:
  int64_t pair(const ExpertTile& tile, int64_t i) const { return tile.first + i; }
  const Raw* grad_out(const ExpertTile& tile, int64_t g, int64_t i) const {
    return static_cast<const Raw*>(to_.grad_out) + (g * to_.tokens + this->p_.tokens[pair(tile, i)]) * this->p_.width;
  }
  bool used(const ExpertTile& tile, int64_t g, int64_t i) const { return to_.used[g * to_.pairs + pair(tile, i)] != 0; }
  T coefficient(const ExpertTile& tile, int64_t g, int64_t i) const { return to_.coefficients[g * to_.pairs + pair(tile, i)]; }

  // dout of the one gate, or dy of several; dy is kept for the weights' gradients.
  void start(const ExpertTile& tile) {
    const int64_t width = this->p_.width;
    for (int64_t i = 0; i < tile.count; ++i) {
      T* const row = grads_ + i * this->padded_;
      factor_[i] = T(1);
      shares_[i] = broadcast(T(0));
      if (to_.gates == 1) {
        factor_[i] = coefficient(tile, 0, i);
        stage(grad_out(tile, 0, i), width, this->padded_, row);
      } else {
        std::memset(row, 0, sizeof(T) * static_cast<size_t>(this->padded_));
        for (int64_t g = 0; g < to_.gates; ++g) {
          if (used(tile, g, i)) add_row(coefficient(tile, g, i), grad_out(tile, g, i), width, row);
        }
      }
      stage(row, width, width, grads_staged_ + i * width);
      if (to_.grad_y == nullptr) continue;
      S* const kept = static_cast<S*>(to_.grad_y) + pair(tile, i) * to_.y_stride;
      write_row(row, factor_[i], width, kept);
    }
    pack_lanes<Dot>(grads_staged_, width, tile.count, width, kTileTokens, packed_grads_);
  }

  // Pre-activations, [token][kHidden], 0 behind `count`: made again, or as they were kept.
  void find_hidden(const ExpertTile& tile, int64_t row, int64_t count, int64_t lanes, T* out) {
    if (tile.hidden != nullptr) {
      for (int64_t i = 0; i < tile.count; ++i) stage(this->kept_row(tile, i) + row, count, kHidden, out + i * kHidden);
      return;
    }
    const int64_t width = this->p_.width;
    this->template multiply_rows<false>(static_cast<const Raw*>(tile.expert.w_in) + row * width, count, width, width,
                                        this->packed_, lanes, this->gate_);
    this->add_bias(tile.expert.b_in, row, count, lanes, this->gate_);
    pack_lanes<Plain<T>>(this->gate_, lanes, count, tile.count, kHidden, out);
  }

  // out [token][whole] += Σ_j weight_j · row j of a matrix, `count` rows of `width` elements, `stride` apart.
  template <int64_t kRowStep, int64_t kKeyStep>
  void add_rows(const Word* weights, int64_t tokens, const Raw* matrix, int64_t count, int64_t stride, int64_t width,
                int64_t whole, T* out) {
    const bool in_place = std::is_same_v<Raw, S> && width == whole;
    for (int64_t j = 0; j < count; ++j) {
      const Raw* const from = matrix + j * stride;
      if constexpr (std::is_same_v<Raw, S>) {
        if (in_place) {
          pointers_[j] = from;
          continue;
        }
      }
      pointers_[j] = matrix_ + j * whole;
      stage(from, width, whole, matrix_ + j * whole);
    }
    pointers_[count] = zeros_;
    if constexpr (Dot::kColumns == 2) {
#if defined(__AVX512BF16__)
      weigh_value_pairs<kRowStep, kKeyStep>(weights, tokens, pointers_, (count + 1) / 2, whole, out);
#endif
    } else {
      weigh_values<kRowStep, kKeyStep>(weights, tokens, pointers_, count, whole, out);
    }
  }

  // From da to dh of a token, and a.
  void differentiate(const ExpertTile& tile, int64_t i, int64_t first, int64_t count, int64_t whole) {
    const bool gated = is_gated(this->p_.activation);
    T *const gate = hidden_gate_ + i * kHidden, *const up = hidden_up_ + i * kHidden;
    T *const slopes = slopes_ + i * whole, *const activated = activated_ + i * kHidden;
    // An infinite gradient makes a NaN even of the zeros behind a row.
    for (int64_t n = count; n < whole; ++n) slopes[n] = T(0);
    const V factor = broadcast(factor_[i]);
    V share = shares_[i];
    with_slope<T>(this->p_.activation, [&](const auto& act) __attribute__((always_inline)) {
      for (int64_t n = 0; n < whole; n += kLanes) {
        V value, slope;
        act(load(gate + n), value, slope);
        const V da = load(slopes + n), scaled = mul(da, factor), a = gated ? mul(value, load(up + n)) : value;
        share = fma(da, a, share);
        store(activated + n, a);
        store(gate + n, gated ? mul(mul(scaled, load(up + n)), slope) : mul(scaled, slope));
        if (gated) store(up + n, mul(scaled, value));
      }
    });
    shares_[i] = share;
    stage(gate, whole, whole, staged_gate_ + i * kHidden);
    if (gated) stage(up, whole, whole, staged_up_ + i * kHidden);
    if (to_.activated != nullptr) {
      stage(activated, whole, whole, static_cast<S*>(to_.activated) + pair(tile, i) * to_.activated_stride + first);
    }
    if (to_.grad_hidden == nullptr) return;
    const int64_t hidden = tile.expert.hidden;
    S* const kept = static_cast<S*>(to_.grad_hidden) + pair(tile, i) * to_.hidden_stride;
    std::memcpy(static_cast<void*>(kept + first), staged_gate_ + i * kHidden, sizeof(S) * static_cast<size_t>(count));
    if (gated) std::memcpy(static_cast<void*>(kept + hidden + first), staged_up_ + i * kHidden, sizeof(S) * static_cast<size_t>(count));
  }

  void finish(const ExpertTile& tile, int64_t lanes, bool outputs) {
    const int64_t width = this->p_.width, padded = this->padded_;
    if (outputs) {
      this->add_bias(tile.expert.b_out, 0, width, lanes, this->y_);
      if (padded > width) std::memset(this->y_ + width * lanes, 0, sizeof(T) * static_cast<size_t>((padded - width) * lanes));
      pack_lanes<Plain<T>>(this->y_, lanes, padded, tile.count, padded, turned_y_);
    }
    for (int64_t i = 0; i < tile.count; ++i) {
      if (to_.grad_rows != nullptr) {
        std::memcpy(to_.grad_rows + pair(tile, i) * padded, grad_rows_ + i * wide_, sizeof(T) * static_cast<size_t>(padded));
      }
      if (to_.grad_coefficients == nullptr) continue;
      for (int64_t g = 0; g < to_.gates; ++g) {
        double share = 0;
        if (used(tile, g, i)) {
          if (outputs) {
            share = dot_in_double(grad_out(tile, g, i), turned_y_ + i * padded, width);
          } else {
            share = static_cast<double>(reduce_add(shares_[i]));
            if (tile.expert.b_out != nullptr) {
              share += dot_in_double(grads_ + i * padded, static_cast<const Raw*>(tile.expert.b_out), width);
            }
          }
        }
        to_.grad_coefficients[g * to_.pairs + pair(tile, i)] = static_cast<T>(share);
      }
    }
  }

  const ExpertGradients<T>& to_;
  const int64_t wide_;  // the width in whole vectors, as products read it
  T factor_[kTileTokens];
  V shares_[kTileTokens];
  T *grads_, *hidden_gate_, *hidden_up_, *slopes_, *activated_, *grad_rows_, *turned_y_;
  S *grads_staged_, *staged_gate_, *staged_up_, *matrix_, *zeros_;
  Word *packed_grads_, *packed_activated_;
  const S** pointers_;
};

// Rows [first, first + count) of dW, over the pairs of an expert: Σ weight_pair · values of the pair.
template <typename Kind, typename T>
class Outer {
  using Raw = typename Kind::Raw;
  using Dot = typename Kind::Dot;
  using Word = typename Dot::Word;
  using S = Staged<Kind>;
  using V = Vec<T>;
  static constexpr int64_t kWhole = V::kLanes * Dot::kColumns, kPairs = kTileTokens;

 public:
  Outer(const ExpertPass<T>& pass, Arena& arena) : p_(pass) {
    const int64_t widest = pass.width > pass.most_hidden ? pass.width : pass.most_hidden;
    weights_ = arena.take<Word>((kPairs + 1) * kOuterRows + kGroup);
    rows_ = arena.take<S>(kPairs * kOuterRows + 64);
    staged_ = arena.take<S>(kPairs * round_up(widest, kWhole));
    zeros_ = arena.take<S>(round_up(widest, kWhole));
    values_ = arena.take<const S*>(kPairs + 1);
    sums_ = arena.take<T>((kOuterRows + kGroup) * round_up(widest, kWhole));
    if (arena.memory != nullptr) {
      std::memset(static_cast<void*>(zeros_), 0, sizeof(S) * static_cast<size_t>(round_up(widest, kWhole)));
    }
  }

  void run(const OuterProduct& of, T* out, T* bias) {
    const int64_t whole = round_up(of.width, kWhole);
    std::memset(sums_, 0, sizeof(T) * static_cast<size_t>((of.rows + 1) * whole));
    double biases[kOuterRows] = {};
    for (int64_t at = of.begin; at < of.end; at += kPairs) {
      const int64_t count = at_most(kPairs, of.end - at);
      for (int64_t j = 0; j < count; ++j) {
        const S* const from = static_cast<const S*>(of.weights) + (at + j) * of.weights_stride + of.first_row;
        std::memcpy(static_cast<void*>(rows_ + j * kOuterRows), from, sizeof(S) * static_cast<size_t>(of.rows));
        for (int64_t r = 0; bias != nullptr && r < of.rows; ++r) biases[r] += static_cast<double>(widen(from[r]));
        values_[j] = value_of(of, at + j, j, whole);
      }
      values_[count] = zeros_;
      add(of.rows, count, whole);
    }
    for (int64_t r = 0; r < of.rows; ++r) {
      for (int64_t d = 0; d < of.width; ++d) out[r * of.width + d] += sums_[r * whole + d];
      if (bias != nullptr) bias[r] += static_cast<T>(biases[r]);
    }
  }

 private:
  // A pair's token, or its activated row.
  const S* value_of(const OuterProduct& of, int64_t pair, int64_t j, int64_t whole) {
    if (of.activated != nullptr) return static_cast<const S*>(of.activated) + pair * of.activated_stride;
    const Raw* const row = static_cast<const Raw*>(p_.x) + p_.tokens[pair] * p_.x_stride;
    if constexpr (std::is_same_v<Raw, S>) {
      if (of.width == whole) return row;
    }
    stage(row, of.width, whole, staged_ + j * whole);
    return staged_ + j * whole;
  }

  void add(int64_t rows, int64_t count, int64_t whole) {
    if constexpr (Dot::kColumns == 2) {
#if defined(__AVX512BF16__)
      for (int64_t j = 0; j < count; j += 2) {
        for (int64_t r = 0; r < rows; ++r) {
          weights_[j / 2 * kOuterRows + r] =
              pair(rows_[j * kOuterRows + r].bits, j + 1 < count ? rows_[(j + 1) * kOuterRows + r].bits : 0);
        }
      }
      weigh_value_pairs<1, kOuterRows>(weights_, rows, values_, (count + 1) / 2, whole, sums_);
#endif
    } else {
      weigh_values<1, kOuterRows>(rows_, rows, values_, count, whole, sums_);
    }
  }

  const ExpertPass<T>& p_;
  Word* weights_;
  S *rows_, *staged_, *zeros_;
  const S** values_;
  T* sums_;
};

template <typename T>
int64_t whole_width(const ExpertPass<T>& pass, int64_t width) {
  int64_t whole = 0;
  with_kind<T>(pass.element, [&](auto kind) { whole = round_up(width, Vec<T>::kLanes * decltype(kind)::Dot::kColumns); });
  return whole;
}

template <typename T>
int64_t element_bytes(const ExpertPass<T>& pass) {
  int64_t bytes = 0;
  with_kind<T>(pass.element, [&](auto kind) { bytes = sizeof(Staged<decltype(kind)>); });
  return bytes;
}

template <typename T>
int64_t scratch_bytes(const ExpertPass<T>& pass) {
  int64_t bytes = 0;
  with_kind<T>(pass.element, [&](auto kind) {
    Arena tile{nullptr}, outer{nullptr};
    Backward<decltype(kind), T>(pass, {}, tile);
    Outer<decltype(kind), T>(pass, outer);
    bytes = tile.used > outer.used ? tile.used : outer.used;
  });
  return bytes;
}

template <typename T>
void differentiate(const ExpertPass<T>& pass, const ExpertGradients<T>& to, const ExpertTile& tile, char* scratch) {
  with_kind<T>(pass.element, [&](auto kind) {
    Arena arena{scratch};
    Backward<decltype(kind), T>(pass, to, arena).run(tile);
  });
}

template <typename T>
void add_outer(const ExpertPass<T>& pass, const OuterProduct& of, T* out, T* bias, char* scratch) {
  with_kind<T>(pass.element, [&](auto kind) {
    Arena arena{scratch};
    Outer<decltype(kind), T>(pass, arena).run(of, out, bias);
  });
}

template <typename T>
void find_shared_coefficients(const ExpertPass<T>& pass, const T* gate, int64_t begin, int64_t end, T* coefficients,
                              T* rest) {
  with_kind<T>(pass.element, [&](auto kind) {
    using Raw = typename decltype(kind)::Raw;
    for (int64_t n = begin; n < end; ++n) {
      const Raw* const x = static_cast<const Raw*>(pass.x) + pass.tokens[n] * pass.x_stride;
      coefficients[n - begin] = shared_coefficient(x, gate, pass.width, T(1));
      rest[n - begin] = shared_coefficient(x, gate, pass.width, T(-1));
    }
  });
}

template <typename T>
void add_token(const ExpertPass<T>& pass, T factor, int64_t token, T* sums) {
  with_kind<T>(pass.element, [&](auto kind) {
    using Raw = typename decltype(kind)::Raw;
    add_row(factor, static_cast<const Raw*>(pass.x) + token * pass.x_stride, pass.width, sums);
  });
}

template <typename T>
void write(const ExpertPass<T>& pass, const T* row, int64_t token, void* out) {
  with_kind<T>(pass.element, [&](auto kind) {
    using Raw = typename decltype(kind)::Raw;
    write_row(row, T(1), pass.width, static_cast<Raw*>(out) + token * pass.width);
  });
}

template <typename T>
constexpr ExpertsBackward<T> kKernels = {kOuterRows,       whole_width<T>, element_bytes<T>,
                                         scratch_bytes<T>, differentiate<T>, add_outer<T>, find_shared_coefficients<T>, add_token<T>, write<T>};

}  // namespace

void experts_kernels(ExpertsBackward<float>& kernels) { kernels = kKernels<float>; }
void experts_kernels(ExpertsBackward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
