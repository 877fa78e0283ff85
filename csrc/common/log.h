// The natural logarithm in the lanes of a vector.
//
// x = 2^e f with f between the roots of 1/2 and 2, and log f = 2 atanh(z), z = (f − 1) / (f + 1), |z| < 0.172: the odd series up
// to z^9 (float) or z^21 (double) leaves less than half a unit in the last place of e ln 2 + log f, for positive normal x.
#pragma once

#include "simd.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename T>
struct FloatBits;
template <>
struct FloatBits<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23;
  static constexpr Int kRootOfHalf = 0x3f3504f3;
};
template <>
struct FloatBits<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52;
  static constexpr Int kRootOfHalf = 0x3fe6a09e667f3bcd;
};

// NaN and infinity give NaN.
template <typename V>
MMREC_INLINE V log(V x) {
  using T = decltype(reduce_add(V{}));
  using Bits = FloatBits<T>;
  constexpr int kLast = sizeof(T) == 4 ? 9 : 21;
  // The compiler turns this loop into vectors.
  T lanes[V::kLanes], exponents[V::kLanes];
  store(lanes, x);
  for (int i = 0; i < V::kLanes; ++i) {
    typename Bits::Int bits;
    std::memcpy(&bits, &lanes[i], sizeof(bits));
    const auto exponent = (bits - Bits::kRootOfHalf) >> Bits::kMantissa;
    bits -= static_cast<typename Bits::Int>(exponent << Bits::kMantissa);
    exponents[i] = static_cast<T>(exponent);
    std::memcpy(&lanes[i], &bits, sizeof(bits));
  }
  const V f = load(lanes), one = broadcast(T(1));
  const V z = div(sub(f, one), add(f, one)), z2 = mul(z, z);
  V series = broadcast(T(2) / T(kLast));
  for (int n = kLast - 2; n >= 1; n -= 2) series = fma(series, z2, broadcast(T(2) / static_cast<T>(n)));
  const V nan = sub(x, x);  // of those
  return add(fma(load(exponents), broadcast(T(0.69314718055994530942)), mul(z, series)), nan);
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
