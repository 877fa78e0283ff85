// Experts, the forward: a tile of tokens through an expert's whole network, and what the gates make of the results.
//
//     h = x W_inᵀ + b_in        a = act(h)        y = a W_outᵀ + b_out        out_g = Σ_slots weight · y (+ σ(x · gate) · y_shared)
//
// Tokens lie in lanes: a weight's row is broadcast from where it lies, element by element, so that no weight is packed, and the
// activated product of one layer is, as it comes, the packed operand of the next. The hidden width is taken kHidden at a time,
// whose pre-activations stay in the second level of cache. With so few tokens that lanes would be empty, the width lies in lanes.
//
// Work: 6 · pairs · width · hidden flops if gated, else 4; weights are read once per tile.

#include "experts_tile.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Words from one row of results to the next, where tokens are few.
constexpr int64_t kFewStride = 8;

template <typename Kind, typename T>
class Task : Tile<Kind, T> {
  using Base = Tile<Kind, T>;
  using typename Base::Dot;
  using typename Base::Raw;
  using typename Base::V;
  using typename Base::Word;
  using Base::gate_;
  using Base::kLanes;
  using Base::p_;
  using Base::packed_;
  using Base::padded_;
  using Base::y_;

 public:
  Task(const ExpertPass<T>& pass, Arena& arena) : Base(pass, arena) {
    if (p_.few) {
      const int64_t widest = p_.width > p_.most_hidden ? p_.width : p_.most_hidden;
      few_rows_ = arena.take<const Raw*>(kRows);
      queries_ = arena.take<T>(kFewRows * widest);
      gate_ = arena.take<T>((p_.most_hidden + 4) * kFewStride);
      up_ = arena.take<T>((p_.most_hidden + 4) * kFewStride);
      y_ = arena.take<T>((padded_ + 4) * kFewStride);
      return;
    }
    up_ = arena.take<T>((kHidden + 1) * kTileTokens);
    words_ = arena.take<Word>(Dot::kColumns == 2 ? kHidden / 2 * kTileTokens : 0);
    turned_ = arena.take<T>(kTileTokens * kHidden);
  }

  void run(const ExpertTile& tile) { p_.few ? few(tile) : many(tile); }

 private:
  // Tokens in lanes.
  void many(const ExpertTile& tile) {
    const Expert& expert = tile.expert;
    const int64_t lanes = round_up(tile.count, kLanes), width = p_.width, hidden = expert.hidden;
    this->pack_tokens(tile, lanes);
    const auto* const w_in = static_cast<const Raw*>(expert.w_in);
    const auto* const w_out = static_cast<const Raw*>(expert.w_out);
    this->start_outputs(hidden, lanes);
    for (int64_t first = 0; first < hidden; first += kHidden) {
      const int64_t count = at_most(kHidden, hidden - first);
      this->template multiply_rows<false>(w_in + first * width, count, width, width, packed_, lanes, gate_);
      finish_hidden(tile, first, count, lanes, gate_);
      if (is_gated(p_.activation)) {
        this->template multiply_rows<false>(w_in + (hidden + first) * width, count, width, width, packed_, lanes, up_);
        finish_hidden(tile, hidden + first, count, lanes, up_);
      }
      activate(p_.activation, gate_, up_, count * lanes);
      const Word* activated = nullptr;
      if constexpr (Dot::kColumns == 2) {
#if defined(__AVX512BF16__)
        for (int64_t n = 0; n < count; n += 2) {
          for (int64_t lane = 0; lane < lanes; lane += kLanes) {
            store(words_ + n / 2 * lanes + lane, pair_bf16(load(gate_ + n * lanes + lane), load(gate_ + (n + 1) * lanes + lane)));
          }
        }
        activated = words_;
#endif
      } else {
        activated = gate_;
      }
      if (first == 0) {
        this->template multiply_rows<false>(w_out + first, width, hidden, count, activated, lanes, y_);
      } else {
        this->template multiply_rows<true>(w_out + first, width, hidden, count, activated, lanes, y_);
      }
    }
    this->add_bias(expert.b_out, 0, width, lanes, y_);
    if (padded_ > width) std::memset(y_ + width * lanes, 0, sizeof(T) * static_cast<size_t>((padded_ - width) * lanes));
    pack_lanes<Plain<T>>(y_, lanes, padded_, tile.count, padded_, p_.y + tile.first * padded_);
  }

  // Rows [first, first + count) of the pre-activations: their bias, and a copy to be kept.
  void finish_hidden(const ExpertTile& tile, int64_t first, int64_t count, int64_t lanes, T* rows) {
    this->add_bias(tile.expert.b_in, first, count, lanes, rows);
    if (tile.hidden == nullptr) return;
    const int64_t padded = round_up(count, kLanes);
    pack_lanes<Plain<T>>(rows, lanes, count, tile.count, padded, turned_);
    for (int64_t i = 0; i < tile.count; ++i) {
      write_row(turned_ + i * padded, T(1), count, this->kept_row(tile, i) + first);
    }
  }

  // The width in lanes. Rows of results are [row][kFewStride].
  void few(const ExpertTile& tile) {
    const Expert& expert = tile.expert;
    const int64_t width = p_.width, hidden = expert.hidden;
    for (int64_t i = 0; i < tile.count; ++i) stage(this->token(tile, i), width, width, queries_ + i * width);
    few_rows(tile, expert.w_in, hidden, width, gate_);
    finish_few(tile, 0, hidden, gate_);
    if (is_gated(p_.activation)) {
      few_rows(tile, static_cast<const Raw*>(expert.w_in) + hidden * width, hidden, width, up_);
      finish_few(tile, hidden, hidden, up_);
    }
    activate(p_.activation, gate_, up_, round_up(hidden * kFewStride, kLanes));
    pack_lanes<Plain<T>>(gate_, kFewStride, hidden, tile.count, hidden, queries_);
    few_rows(tile, expert.w_out, width, hidden, y_);
    add_few_bias(expert.b_out, 0, width, y_);
    pack_lanes<Plain<T>>(y_, kFewStride, width, tile.count, padded_, p_.y + tile.first * padded_);
  }

  void few_rows(const ExpertTile& tile, const void* matrix, int64_t count, int64_t width, T* out) {
    const auto* const first = static_cast<const Raw*>(matrix);
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t here = at_most(kRows, count - row);
      for (int64_t i = 0; i < here; ++i) few_rows_[i] = first + (row + i) * width;
      few_scores(few_rows_, here, queries_, tile.count, width, out + row * kFewStride, kFewStride);
    }
  }

  void add_few_bias(const void* bias, int64_t first, int64_t count, T* rows) const {
    for (int64_t n = 0; bias != nullptr && n < count; ++n) {
      const T b = converted<T>(static_cast<const Raw*>(bias)[first + n]);
      for (int64_t i = 0; i < kFewStride; ++i) rows[n * kFewStride + i] += b;
    }
  }

  void finish_few(const ExpertTile& tile, int64_t first, int64_t count, T* rows) const {
    add_few_bias(tile.expert.b_in, first, count, rows);
    if (tile.hidden == nullptr) return;
    for (int64_t i = 0; i < tile.count; ++i) {
      Raw* const to = this->kept_row(tile, i) + first;
      for (int64_t n = 0; n < count; ++n) to[n] = converted<Raw>(rows[n * kFewStride + i]);
    }
  }

  const Raw** few_rows_ = nullptr;
  Word* words_ = nullptr;
  T *queries_ = nullptr, *up_ = nullptr, *turned_ = nullptr;
};

template <typename T>
bool is_whole(int64_t width, int64_t hidden) {
  return width % Vec<T>::kLanes == 0 && hidden % Vec<T>::kLanes == 0;
}

template <typename T>
void compute(const ExpertPass<T>& pass, const ExpertTile& tile, char* scratch) {
  with_kind<T>(pass.element, [&](auto kind) {
    Arena arena{scratch};
    Task<decltype(kind), T>(pass, arena).run(tile);
  });
}

template <typename T>
void combine(const ExpertPass<T>& pass, const Combination<T>& c, int64_t begin, int64_t end) {
  with_kind<T>(pass.element, [&](auto kind) {
    using Raw = typename decltype(kind)::Raw;
    using V = Vec<T>;
    const int64_t width = pass.width, padded = padded_width<T>(width);
    T sums[4 * V::kLanes];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t token = c.first + t;
      const int64_t shared = c.shared != nullptr ? c.shared[t] : -1;
      const Raw* const x = static_cast<const Raw*>(pass.x) + token * pass.x_stride;
      const T own = shared < 0 ? T(0) : c.shared_gate == nullptr ? T(1) : shared_coefficient(x, c.shared_gate, width, T(1));
      for (int64_t g = 0; g < c.gates; ++g) {
        const int64_t* const slots = c.slots + (g * (c.last - c.first) + t) * c.k;
        const T* const weights = c.weights + (g * c.tokens + token) * c.k;
        Raw* const out = static_cast<Raw*>(c.out) + (g * c.tokens + token) * width;
        bool alive = false;
        for (int64_t s = 0; s < c.k; ++s) alive |= slots[s] >= 0;
        for (int64_t d = 0; d < padded; d += 4 * V::kLanes) {
          V sum[4];
          for (V& part : sum) part = broadcast(T(0));
          const int64_t vectors = at_most(4, (padded - d) / V::kLanes);
          const auto add_pair = [&](T weight, int64_t pair) __attribute__((always_inline)) {
            for (int64_t v = 0; v < vectors; ++v) {
              sum[v] = fma(broadcast(weight), load(pass.y + pair * padded + d + v * V::kLanes), sum[v]);
            }
          };
          for (int64_t s = 0; s < c.k; ++s) {
            if (slots[s] >= 0) add_pair(weights[s], slots[s]);
          }
          if (alive && shared >= 0) add_pair(own, shared);
          for (int64_t v = 0; v < vectors; ++v) store(sums + v * V::kLanes, sum[v]);
          write_row(sums, T(1), at_most(4 * V::kLanes, width - d), out + d);
        }
      }
    }
  });
}

template <typename T>
constexpr ExpertsForward<T> kKernels = {padded_width<T>, is_whole<T>, scratch_bytes_of<Task, T, ExpertPass<T>>, compute<T>,
                                        combine<T>};

}  // namespace

void experts_kernels(ExpertsForward<float>& kernels) { kernels = kKernels<float>; }
void experts_kernels(ExpertsForward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
