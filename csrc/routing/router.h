// Routing: the tokens of a block, modality by modality, and their logits.
//
// The routed tokens of a modality are a dense router of their own over the experts that it may use. Up to kGroupTokens of them
// at a time: their rows, where they lie, times the gate with experts in lanes; the logits are then turned so that tokens lie in
// lanes, where score, selection, statistics and gradients need nothing across lanes. A token's logits are one chain over the
// width (of parts of kLogitChain words), so that its bits depend on its own row alone.
#pragma once

#include "../common/arena.h"
#include "../common/functions.h"
#include "../common/pack.h"
#include "../common/rows.h"
#include "../common/tiles.h"
#include "routing_kernel.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

constexpr int64_t kGroupTokens = 64, kLogitChain = 256;

template <typename Kind, typename T>
class Groups {
  using Raw = typename Kind::Raw;
  using Dot = typename Kind::Dot;
  using Word = typename Dot::Word;
  static constexpr bool kInPlace = std::is_same_v<Raw, Staged<Kind>>;

 public:
  Groups(const Router<T>& router, Arena& arena) : r_(router) {
    begin_ = arena.take<int64_t>(router.modalities + 1);
    order_ = arena.take<int64_t>(kBlockTokens);
    rows_ = arena.take<const Staged<Kind>*>(kGroupTokens + 1);
    part_ = arena.take<const Staged<Kind>*>(kGroupTokens + 1);
    ahead_ = arena.take<const char*>(kGroupTokens);
    staged_ = arena.take<Staged<Kind>>(kInPlace ? 0 : kGroupTokens * router.width);
    logits_ = arena.take<T>((kGroupTokens + kGroup) * router.lanes);
    columns_ = arena.take<T>(router.experts * kGroupTokens);
  }

  // Orders the routed ones of the tokens [first, last) by modality; calls skip(token) for the others.
  template <typename Skip>
  void order(int64_t first, int64_t last, const Skip& skip) {
    next_ = last;
    std::memset(begin_, 0, sizeof(int64_t) * static_cast<size_t>(r_.modalities + 1));
    for (int64_t token = first; token < last; ++token) {
      const int64_t m = r_.modality_of(token);
      if (m < 0) {
        skip(token);
      } else {
        ++begin_[m + 1];
      }
    }
    for (int64_t m = 0; m < r_.modalities; ++m) begin_[m + 1] += begin_[m];
    // Each list is filled from its begin, which moves to its end; then the begins move back by one modality.
    for (int64_t token = first; token < last; ++token) {
      const int64_t m = r_.modality_of(token);
      if (m >= 0) order_[begin_[m]++] = token;
    }
    for (int64_t m = r_.modalities; m > 0; --m) begin_[m] = begin_[m - 1];
    begin_[0] = 0;
  }

  // Calls run(m, tokens, count) for up to kGroupTokens tokens of a modality, and before them start(m), after them finish(m).
  template <typename Start, typename Run, typename Finish>
  void for_each(const Start& start, const Run& run, const Finish& finish) {
    for (int64_t m = 0; m < r_.modalities; ++m) {
      const int64_t end = begin_[m + 1];
      if (begin_[m] == end) continue;
      start(m);
      for (int64_t at = begin_[m]; at < end; at += kGroupTokens) {
        const int64_t count = at_most(kGroupTokens, end - at);
        look_ahead(at, count);
        find_logits(order_ + at, count);
        run(m, order_ + at, count);
      }
      finish(m);
    }
  }

  // The logits of expert e and the tokens at hand.
  T* column(int64_t e) const { return columns_ + e * kGroupTokens; }
  const Staged<Kind>* const* rows() const { return rows_; }

 private:
  // The rows of the next block, as many and at the same places as those at hand: asked for while these are multiplied.
  void look_ahead(int64_t at, int64_t count) {
    const int64_t element = sizeof(Raw), first = next_ + at;
    count = at_most(count, r_.tokens - first);
    for (int64_t i = 0; i < count; ++i) {
      ahead_[i] = static_cast<const char*>(r_.x) + (first + i) * r_.x_stride * element;
    }
    fetch_ = {ahead_, count < 0 ? 0 : count, r_.width * element, 0};
  }

  void find_logits(const int64_t* tokens, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const Raw* const row = static_cast<const Raw*>(r_.x) + tokens[i] * r_.x_stride;
      if constexpr (kInPlace) {
        rows_[i] = row;
      } else {
        rows_[i] = staged_ + i * r_.width;
        stage(row, r_.width, r_.width, staged_ + i * r_.width);
      }
    }
    rows_[count] = rows_[count - 1];
    const auto* const gate = static_cast<const Word*>(r_.gate);
    const int64_t depth = words_of(r_.width, Dot::kColumns);
    for (int64_t word = 0; word == 0 || word < depth; word += kLogitChain) {
      for (int64_t i = 0; i <= count; ++i) part_[i] = rows_[i] + word * Dot::kColumns;
      const auto* const words = reinterpret_cast<const Word* const*>(part_);
      const int64_t chain = at_most(depth - word, kLogitChain);
      if (word == 0) {
        score_block<Dot>(words, count, gate, r_.lanes, chain, logits_, r_.lanes, fetch_);
      } else {
        score_block<Dot, true>(words, count, gate + word * r_.lanes, r_.lanes, chain, logits_, r_.lanes);
      }
    }
    pack_lanes<Plain<T>>(logits_, r_.lanes, count, r_.experts, kGroupTokens, columns_);
  }

  const Router<T>& r_;
  int64_t *begin_, *order_, next_ = 0;
  const char** ahead_;
  Fetch fetch_;
  const Staged<Kind>**rows_, **part_;
  Staged<Kind>* staged_;
  T *logits_, *columns_;
};

// The experts that a modality may use.
struct Choices {
  const int64_t* experts;
  int64_t count;

  template <typename T>
  Choices(const Router<T>& r, int64_t m) : experts(r.choices + r.choice_offsets[m]), count(r.choices_of(m)) {}
};

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
