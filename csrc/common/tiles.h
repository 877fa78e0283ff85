// Products of up to a few dozen rows that lie where they are, named by pointers, with others that are few: nothing that is large
// is packed, and an index into a store costs no copy.
//
// score_block: scores [key][stride], rows in lanes. The rows ("queries") are packed [word of width][lanes]; a key's words are
//     broadcast. Per word: NV loads of queries and R broadcasts for R · NV multiply-adds.
// few_scores: scores [key][stride] of up to kFewRows rows, the width in lanes.
// weigh_values: out [row][width] += Σ_j weight_rj · v_j, the width in lanes, R rows at a time: per key NV loads and R
//     broadcasts for R · NV multiply-adds. With pairs two keys share a step.
#pragma once

#include <type_traits>

#include "kind.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Up to this many rows are one part.
constexpr int64_t kFewRows = 6;

// Calls run(R, first) for parts of [0, count) with a constant R: count itself up to kFewRows, else even numbers up to kGroup, as
// equal as they get, of which the last may reach one beyond `count`.
template <typename Run>
MMREC_INLINE void in_parts(int64_t count, const Run& run) {
  const int64_t parts = (count + kGroup - 1) / kGroup;
  const int64_t most = count <= kFewRows ? count : ((count + parts - 1) / parts + 1) / 2 * 2;
  for (int64_t first = 0; first < count; first += most) {
    const int64_t left = count - first;
    switch (left >= most ? most : (left + 1) / 2 * 2) {
      case 1: run(std::integral_constant<int, 1>(), first); break;
      case 2: run(std::integral_constant<int, 2>(), first); break;
      case 3: run(std::integral_constant<int, 3>(), first); break;
      case 4: run(std::integral_constant<int, 4>(), first); break;
      case 5: run(std::integral_constant<int, 5>(), first); break;
      case 6: run(std::integral_constant<int, 6>(), first); break;
#if defined(__AVX512F__)
      case 8: run(std::integral_constant<int, 8>(), first); break;
      case 10: run(std::integral_constant<int, 10>(), first); break;
      case 12: run(std::integral_constant<int, 12>(), first); break;
#endif
      default: break;
    }
  }
}

template <typename Dot, int R, int NV, bool kAdd>
__attribute__((noinline)) void score_tile(const typename Dot::Word* const* keys, const typename Dot::Word* queries,
                                          int64_t lanes, int64_t depth, typename Dot::Sum* scores, int64_t stride) {
  using V = Vec<typename Dot::Sum>;
  V sums[R][NV];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) sums[r][v] = broadcast(typename Dot::Sum(0));
  }
  for (int64_t k = 0; k < depth; ++k) {
    V q[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) q[v] = load(queries + k * lanes + v * V::kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      typename Dot::Word word;
      std::memcpy(&word, keys[r] + k, sizeof(word));  // a pair of bfloat16 may lie at any even address
      const V x = broadcast(word);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) sums[r][v] = Dot::Step::add(q[v], x, sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) {
      typename Dot::Sum* const to = scores + r * stride + v * V::kLanes;
      store(to, kAdd ? add(load(to), sums[r][v]) : sums[r][v]);
    }
  }
}

// Asks for rows that are needed soon, a few at a time between products: they are too short for the processor to see how they
// follow each other. Into the second level of cache: rows of one head, a power of two apart, would push each other out of the
// first.
struct Fetch {
  const char* const* rows = nullptr;
  int64_t count = 0, bytes = 0, offset = 0;

  MMREC_INLINE void operator()(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < (end < count ? end : count); ++j) {
      for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(rows[j] + offset + b, 0, 2);
    }
  }
  // How many rows at a time, if they are asked for in so many steps.
  int64_t each(int64_t steps) const { return steps == 0 ? 0 : (count + steps - 1) / steps; }

  // Its part n of `parts`.
  Fetch part(int64_t n, int64_t parts) const {
    const int64_t first = count * n / parts;
    return {rows + first, count * (n + 1) / parts - first, bytes, offset};
  }
};

// `scores` = or, with kAdd, += the products. `keys` has one entry more than `count`; `scores` one row more. While some keys are
// multiplied, as many rows are fetched.
template <typename Dot, bool kAdd = false>
void score_block(const typename Dot::Word* const* keys, int64_t count, const typename Dot::Word* queries, int64_t lanes,
                 int64_t depth, typename Dot::Sum* scores, int64_t stride, const Fetch& fetch = {}) {
  constexpr int64_t kLanes = Vec<typename Dot::Sum>::kLanes;
  for (int64_t lane = 0; lane < lanes; lane += 2 * kLanes) {
    in_parts(count, [&](auto part, int64_t first) __attribute__((always_inline)) {
      constexpr int R = decltype(part)::value;
      if (lane == 0) fetch(first, first + R < count ? first + R : fetch.count);
      if (lanes - lane > kLanes) {
        score_tile<Dot, R, 2, kAdd>(keys + first, queries + lane, lanes, depth, scores + first * stride + lane, stride);
      } else {
        score_tile<Dot, R, 1, kAdd>(keys + first, queries + lane, lanes, depth, scores + first * stride + lane, stride);
      }
    });
  }
}

// Four keys and R rows: a key is loaded once for all of them.
template <int R, typename Raw, typename T>
MMREC_INLINE void few_scores_tile(const Raw* const (&keys)[4], const T* queries, int64_t padded_width, T* scores,
                                  int64_t stride) {
  using V = Vec<T>;
  V sums[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sums[r][i] = broadcast(T(0));
  }
  for (int64_t d = 0; d < padded_width; d += V::kLanes) {
    V k[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) k[i] = load(keys[i] + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const V q = load(queries + r * padded_width + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sums[r][i] = fma(k[i], q, sums[r][i]);
    }
  }
  transposed_sums<R>(sums, scores, stride);
}

// q_r · k_j for rows of whole vectors; `scores` has three keys more than `count`.
template <typename Raw, typename T>
void few_scores(const Raw* const* keys, int64_t count, const T* queries, int64_t rows, int64_t padded_width, T* scores,
                int64_t stride, const Fetch& fetch = {}) {
#if defined(__AVX512F__)
  constexpr int64_t kMost = 4;
#else
  constexpr int64_t kMost = 2;
#endif
  const int64_t each = fetch.each((count + 3) / 4);
  for (int64_t j = 0; j < count; j += 4) {
    fetch(j / 4 * each, (j / 4 + 1) * each);
    const Raw* const four[4] = {keys[j], keys[at_most(j + 1, count - 1)], keys[at_most(j + 2, count - 1)],
                                keys[at_most(j + 3, count - 1)]};
    // Six rows are twice three, and five three and two.
    const int64_t most = rows <= kMost ? rows : at_most((rows + 1) / 2, kMost);
    for (int64_t r = 0; r < rows; r += most) {
      const T* const q = queries + r * padded_width;
      T* const to = scores + j * stride + r;
      switch (at_most(most, rows - r)) {
        case 1: few_scores_tile<1>(four, q, padded_width, to, stride); break;
        case 2: few_scores_tile<2>(four, q, padded_width, to, stride); break;
#if defined(__AVX512F__)
        case 3: few_scores_tile<3>(four, q, padded_width, to, stride); break;
        case 4: few_scores_tile<4>(four, q, padded_width, to, stride); break;
#endif
        default: break;
      }
    }
  }
}

template <typename Step, int R, int NV, int64_t kRowStep, int64_t kKeyStep, typename Raw, typename T>
__attribute__((noinline)) void value_tile(const T* weights, const Raw* const* values, int64_t column, int64_t count, T* out,
                                          int64_t stride, const Fetch& fetch) {
  using V = Vec<T>;
  V sums[R][NV];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) sums[r][v] = load(out + r * stride + v * V::kLanes);
  }
  const int64_t each = fetch.each(count);
  for (int64_t j = 0; j < count; ++j) {
    fetch(j * each, (j + 1) * each);
    V x[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) x[v] = load(values[j] + column + v * V::kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const V w = broadcast(weights[r * kRowStep + j * kKeyStep]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sums[r][v] = Step::add(x[v], w, sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) store(out + r * stride + v * V::kLanes, sums[r][v]);
  }
}

// `out` and `weights` have room for one row more than `rows`, if these are more than kFewRows.
template <int64_t kRowStep, int64_t kKeyStep, typename Step = Multiply, typename Raw, typename T>
void weigh_values(const T* weights, int64_t rows, const Raw* const* values, int64_t count, int64_t padded_width, T* out,
                  const Fetch& fetch = {}) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  const int64_t tiles = (rows + kGroup - 1) / kGroup * ((padded_width + 2 * kLanes - 1) / (2 * kLanes));
  int64_t tile = 0;
  in_parts(rows, [&](auto part, int64_t first) __attribute__((always_inline)) {
    constexpr int R = decltype(part)::value;
    int64_t column = 0;
    for (; column + 2 * kLanes <= padded_width; column += 2 * kLanes) {
      value_tile<Step, R, 2, kRowStep, kKeyStep>(weights + first * kRowStep, values, column, count,
                                           out + first * padded_width + column, padded_width, fetch.part(tile, tiles));
      ++tile;
    }
    for (; column < padded_width; column += kLanes) {
      value_tile<Step, R, 1, kRowStep, kKeyStep>(weights + first * kRowStep, values, column, count,
                                           out + first * padded_width + column, padded_width, {});
    }
  });
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
