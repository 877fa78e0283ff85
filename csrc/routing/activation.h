// The activations of the experts, in the lanes of vectors.
#pragma once

#include "../common/functions.h"
#include "experts_kernel.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename T, typename V = Vec<T>>
MMREC_INLINE V silu(V x) {
  return mul(x, sigmoid<T>(x));
}

// x Φ(x).
template <typename T, typename V = Vec<T>>
MMREC_INLINE V gelu(V x) {
  return mul(mul(x, broadcast(T(0.5))), erfc_of(mul(x, broadcast(T(-0.70710678118654752440)))));
}

template <typename T, typename Act>
MMREC_INLINE void map(T* h, int64_t count, const Act& act) {
  for (int64_t i = 0; i < count; i += Vec<T>::kLanes) store(h + i, act(load(h + i)));
}
template <typename T, typename Act>
MMREC_INLINE void map(T* h, const T* up, int64_t count, const Act& act) {
  for (int64_t i = 0; i < count; i += Vec<T>::kLanes) store(h + i, mul(act(load(h + i)), load(up + i)));
}

// h = act(h), or act(h) · up. `count` is a multiple of the lanes.
template <typename T>
void activate(Activation activation, T* h, const T* up, int64_t count) {
  using V = Vec<T>;
  const V zero = broadcast(T(0));
  switch (activation) {
    case Activation::kSwiglu: return map(h, up, count, [](V x) __attribute__((always_inline)) { return silu<T>(x); });
    case Activation::kGeglu: return map(h, up, count, [](V x) __attribute__((always_inline)) { return gelu<T>(x); });
    case Activation::kGelu: return map(h, count, [](V x) __attribute__((always_inline)) { return gelu<T>(x); });
    case Activation::kRelu: return map(h, count, [&](V x) __attribute__((always_inline)) { return max(zero, x); });
    case Activation::kRelu2:
      return map(h, count, [&](V x) __attribute__((always_inline)) { return mul(max(zero, x), max(zero, x)); });
    case Activation::kSilu: return map(h, count, [](V x) __attribute__((always_inline)) { return silu<T>(x); });
    case Activation::kIdentity: return;
  }
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
