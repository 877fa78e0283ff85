// Elementary functions in the lanes of a vector, to a few units in the last place.
#pragma once

#include "exp2.h"
#include "log.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// e^x for x up to about 88 (709); 0 where that would not be a normal number.
template <typename T, typename V = Vec<T>>
MMREC_INLINE V exp_of(V x) {
  const V y = mul(x, broadcast(T(1.4426950408889634074)));
  return select(greater(broadcast(T(Exp2<T>::kLowest)), y), broadcast(T(0)), exp2<T>(y));
}

template <typename T, typename V = Vec<T>>
MMREC_INLINE V magnitude(V x) {
  return max(sub(broadcast(T(0)), x), x);
}

// log σ(x) = min(x, 0) − log(1 + e^−|x|).
template <typename T, typename V = Vec<T>>
MMREC_INLINE V log_sigmoid(V x) {
  const V zero = broadcast(T(0)), least = sub(zero, max(zero, sub(zero, x)));
  return sub(least, log(add(broadcast(T(1)), exp_of<T>(sub(zero, magnitude<T>(x))))));
}

template <typename T, typename V = Vec<T>>
MMREC_INLINE V sigmoid(V x) {
  const V zero = broadcast(T(0)), one = broadcast(T(1)), y = exp_of<T>(sub(zero, magnitude<T>(x)));
  return div(select(greater(zero, x), y, one), add(one, y));
}

// 2 / √π ∫_x^∞ e^(−t²) dt. In float a fit of degree 9 in t = 1 / (1 + |x| / 2), of relative error 1.2e-7 everywhere (Press et al.,
// Numerical Recipes, "erfcc").
MMREC_INLINE F32 erfc_of(F32 x) {
  constexpr float kFit[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                            -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  const F32 z = magnitude<float>(x), one = broadcast(1.0f), t = div(one, fma(z, broadcast(0.5f), one));
  F32 series = broadcast(kFit[0]);
  for (int n = 1; n < 10; ++n) series = fma(series, t, broadcast(kFit[n]));
  const F32 tail = mul(t, exp_of<float>(sub(series, mul(z, z))));
  return select(greater(broadcast(0.0f), x), sub(broadcast(2.0f), tail), tail);
}
MMREC_INLINE F64 erfc_of(F64 x) {
  double lanes[F64::kLanes];
  store(lanes, x);
  for (double& lane : lanes) lane = __builtin_erfc(lane);
  return load(lanes);
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
