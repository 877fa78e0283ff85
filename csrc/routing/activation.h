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

// Calls run(act) with act(h, value, slope), which finds the activation of h, or of the gate, and its derivative.
template <typename T, typename Run>
MMREC_INLINE void with_slope(Activation activation, const Run& run) {
  using V = Vec<T>;
  const V zero = broadcast(T(0)), one = broadcast(T(1));
  switch (activation) {
    case Activation::kSwiglu:
    case Activation::kSilu:
      return run([&](V h, V& value, V& slope) __attribute__((always_inline)) {
        const V s = sigmoid<T>(h);
        value = mul(h, s);
        slope = mul(s, fma(h, sub(one, s), one));
      });
    case Activation::kGeglu:
    case Activation::kGelu:
      return run([&](V h, V& value, V& slope) __attribute__((always_inline)) {
        const V half = broadcast(T(0.5)), share = mul(half, erfc_of(mul(h, broadcast(T(-0.70710678118654752440)))));
        const V density = mul(broadcast(T(0.39894228040143267794)), exp_of<T>(sub(zero, mul(half, mul(h, h)))));
        value = mul(h, share);
        slope = fma(h, density, share);
      });
    case Activation::kRelu:
      return run([&](V h, V& value, V& slope) __attribute__((always_inline)) {
        value = max(zero, h);
        slope = select(greater(h, zero), one, zero);
      });
    case Activation::kRelu2:
      return run([&](V h, V& value, V& slope) __attribute__((always_inline)) {
        const V positive = max(zero, h);
        value = mul(positive, positive);
        slope = add(positive, positive);
      });
    case Activation::kIdentity:
      return run([&](V h, V& value, V& slope) __attribute__((always_inline)) {
        value = h;
        slope = one;
      });
  }
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
