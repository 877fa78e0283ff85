// Single rows: what is O(width), beside the products.
#pragma once

#include <type_traits>

#include "kind.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// What is staged of rows that cannot be read where they lie: the type whose words the products read.
template <typename Kind>
using Staged = std::conditional_t<Kind::Dot::kColumns == 2, BFloat16, typename Kind::Dot::Word>;

template <typename To, typename From>
MMREC_INLINE To converted(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (sizeof(To) == 2) {
    return narrow(static_cast<float>(x));
  } else {
    return static_cast<To>(widen(x));
  }
}

// Rows of `width` elements to rows of `padded` ones, the rest zero.
template <typename To, typename From>
void stage(const From* from, int64_t width, int64_t padded, To* to) {
  int64_t d = 0;
  if constexpr (requires { store(to, load(from)); } && !(std::is_same_v<To, From> && sizeof(To) == 2)) {
    using V = decltype(load(from));
    for (; d + V::kLanes <= width; d += V::kLanes) store(to + d, load(from + d));
  }
  for (; d < width; ++d) to[d] = converted<To>(from[d]);
  for (; d < padded; ++d) to[d] = To{};
}

// Eight chains, so that double precision costs little.
template <typename A, typename B>
double dot_in_double(const A* a, const B* b, int64_t width) {
  double sums[8] = {};
  int64_t d = 0;
  for (; d + 8 <= width; d += 8) {
    for (int l = 0; l < 8; ++l) sums[l] += static_cast<double>(widen(a[d + l])) * static_cast<double>(widen(b[d + l]));
  }
  for (; d < width; ++d) sums[d % 8] += static_cast<double>(widen(a[d])) * static_cast<double>(widen(b[d]));
  return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
}

// factor · row in whole vectors, past the caches.
template <typename Raw, typename T>
void stream_row(const T* row, T factor, int64_t width, Raw* out) {
  for (int64_t d = 0; d < width; d += Vec<T>::kLanes) stream(out + d, mul(load(row + d), broadcast(factor)));
}

// factor · row.
template <typename Raw, typename T>
void write_row(const T* row, T factor, int64_t width, Raw* out) {
  constexpr int kLanes = Vec<T>::kLanes;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes) store(out + d, mul(load(row + d), broadcast(factor)));
  for (; d < width; ++d) {
    if constexpr (sizeof(Raw) == 2) {
      out[d] = narrow(factor * row[d]);
    } else {
      out[d] = factor * row[d];
    }
  }
}

// row += factor · x.
template <typename Raw, typename T>
void add_row(T factor, const Raw* x, int64_t width, T* row) {
  for (int64_t d = 0; d < width; ++d) row[d] += factor * static_cast<T>(widen(x[d]));
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
