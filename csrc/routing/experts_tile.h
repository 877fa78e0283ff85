// A tile of an expert's tokens: these in lanes, and weights' rows times them.
#pragma once

#include "../common/arena.h"
#include "../common/pack.h"
#include "../common/rows.h"
#include "../common/tiles.h"
#include "activation.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// kRows: weights' rows that are multiplied while they stay in the first level of cache.
// kHidden: of the hidden width at a time.
constexpr int64_t kHidden = 128, kRows = 2 * kGroup, kChain = 256;

template <typename T>
int64_t padded_width(int64_t width) {
  return round_up(width, Vec<T>::kLanes);
}

// σ(sign · x · gate).
template <typename Raw, typename T>
T shared_coefficient(const Raw* x, const T* gate, int64_t width, T sign) {
  T lanes[Vec<T>::kLanes];
  store(lanes, sigmoid<T>(broadcast(sign * static_cast<T>(dot_in_double(x, gate, width)))));
  return lanes[0];
}

template <typename Kind, typename T>
class Tile {
 protected:
  using Raw = typename Kind::Raw;
  using Dot = typename Kind::Dot;
  using Word = typename Dot::Word;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr bool kInPlace = std::is_same_v<Raw, Staged<Kind>>;

  Tile(const ExpertPass<T>& pass, Arena& arena) : p_(pass), padded_(padded_width<T>(pass.width)) {
    rows_ = arena.take<const Staged<Kind>*>(kRows + 1);
    part_ = arena.take<const Staged<Kind>*>(kRows + 1);
    ahead_ = arena.take<const char*>(kRows);
    if (p_.few) return;
    const int64_t widest = p_.width > p_.most_hidden ? p_.width : p_.most_hidden;
    staged_ = arena.take<Staged<Kind>>(kInPlace ? 0 : kRows * (widest + 2));
    tokens_ = arena.take<Staged<Kind>>(kTileTokens * (p_.width + 2));
    packed_ = arena.take<Word>(words_of(p_.width, Dot::kColumns) * kTileTokens + 64);
    gate_ = arena.take<T>((kHidden + 1) * kTileTokens);
    y_ = arena.take<T>((padded_ + kGroup) * kTileTokens);
  }

  const Raw* token(const ExpertTile& tile, int64_t i) const {
    return static_cast<const Raw*>(p_.x) + p_.tokens[tile.first + i] * p_.x_stride;
  }

  // The tile's tokens, [word of width][lanes].
  void pack_tokens(const ExpertTile& tile, int64_t lanes) {
    const int64_t width = p_.width;
    for (int64_t i = 0; i < tile.count; ++i) stage(token(tile, i), width, width, tokens_ + i * width);
    pack_lanes<Dot>(tokens_, width, tile.count, width, lanes, packed_);
  }

  // out [row][lanes] = or += `count` rows, `depth` elements of each, times the tokens.
  template <bool kAdd>
  void multiply_rows(const Raw* matrix, int64_t count, int64_t stride, int64_t depth, const Word* tokens, int64_t lanes, T* out) {
    const int64_t words = words_of(depth, Dot::kColumns);
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t here = at_most(kRows, count - row), next = at_most(kRows, count - row - here);
      for (int64_t i = 0; i < here; ++i) {
        const Raw* const from = matrix + (row + i) * stride;
        if constexpr (kInPlace) {
          rows_[i] = from;
        } else {
          rows_[i] = staged_ + i * depth;
          stage(from, depth, depth, staged_ + i * depth);
        }
      }
      rows_[here] = rows_[here - 1];
      for (int64_t i = 0; i < next; ++i) ahead_[i] = reinterpret_cast<const char*>(matrix + (row + here + i) * stride);
      Fetch fetch{ahead_, next, depth * static_cast<int64_t>(sizeof(Raw)), 0};
      for (int64_t word = 0; word == 0 || word < words; word += kChain) {
        for (int64_t i = 0; i <= here; ++i) part_[i] = rows_[i] + word * Dot::kColumns;
        const auto* const keys = reinterpret_cast<const Word* const*>(part_);
        const int64_t chain = at_most(kChain, words - word);
        if (kAdd || word > 0) {
          score_block<Dot, true>(keys, here, tokens + word * lanes, lanes, chain, out + row * lanes, lanes, fetch);
        } else {
          score_block<Dot>(keys, here, tokens + word * lanes, lanes, chain, out + row * lanes, lanes, fetch);
        }
        fetch = {};
      }
    }
  }

  // y [row][lanes] before the first product is added to it. Without any it is 0.
  void start_outputs(int64_t hidden, int64_t lanes) {
    if (hidden == 0) std::memset(y_, 0, sizeof(T) * static_cast<size_t>(p_.width * lanes));
  }

  void add_bias(const void* bias, int64_t first, int64_t count, int64_t stride, T* rows) const {
    if (bias == nullptr) return;
    for (int64_t n = 0; n < count; ++n) {
      const V b = broadcast(converted<T>(static_cast<const Raw*>(bias)[first + n]));
      for (int64_t lane = 0; lane < stride; lane += kLanes) store(rows + n * stride + lane, add(load(rows + n * stride + lane), b));
    }
  }

  Raw* kept_row(const ExpertTile& tile, int64_t i) const {
    const int64_t row = tile.by_token ? p_.tokens[tile.first + i] : i;
    return static_cast<Raw*>(tile.hidden) + row * tile.expert.rows(p_.activation);
  }

  const ExpertPass<T>& p_;
  const int64_t padded_;
  Word* packed_ = nullptr;
  T *gate_ = nullptr, *y_ = nullptr;  // [row][lanes]

 private:
  const Staged<Kind>**rows_, **part_;
  const char** ahead_;
  Staged<Kind>*staged_ = nullptr, *tokens_ = nullptr;
};

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
