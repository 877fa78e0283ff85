// 2^x in the lanes of a vector, to about one unit in the last place.
//
// x = k + f with an integer k and |f| <= 1/2; 2^f is a polynomial, exactly 1 at 0, whose relative error is 2.6e-9 (float, degree
// 6) or 1.8e-17 (double, degree 11); both are minimax fits. Integers x give exact powers of two.
#pragma once

#include "simd.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename T>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr float kLowest = -126.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding it leaves the nearest integer in the last bits
  static constexpr float kCoefficients[] = {0x1.470b80p-13f, 0x1.5f7292p-10f, 0x1.3b270ep-7f, 0x1.c6ae72p-5f,
                                            0x1.ebfbe2p-3f,  0x1.62e432p-1f,  1.0f};
};
template <>
struct Exp2<double> {
  static constexpr double kLowest = -1022.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 · 2^52
  static constexpr double kCoefficients[] = {
      4.0780677271126797072e-10, 7.0725739441623438993e-9, 1.0180648211150693778e-7, 1.3215442657689006278e-6,
      1.5252727382511803179e-5,  1.5403530441601049261e-4, 1.3333558153444315068e-3, 9.6181291076069851565e-3,
      5.5504108664790368849e-2,  0.24022650695910098034,   0.69314718055994569715,   1.0};
};

// The largest x whose power is finite.
template <typename T>
constexpr T kHighestPower = sizeof(T) == 4 ? T(127) : T(1023);

// For x up to kHighestPower (bounded: larger ones are taken for it). Below the least normal number's exponent the result is that number: never zero, never subnormal.
// NaN stays NaN.
template <typename T, bool bounded = false, typename V = Vec<T>>
MMREC_INLINE V exp2(V x) {
  using Constants = Exp2<T>;
  constexpr int kTerms = sizeof(Constants::kCoefficients) / sizeof(T);
  if constexpr (bounded) x = sub(broadcast(T(0)), max(broadcast(-kHighestPower<T>), sub(broadcast(T(0)), x)));
  x = max(broadcast(Constants::kLowest), x);
  const V biased = add(x, broadcast(Constants::kRound));
  const V f = sub(x, sub(biased, broadcast(Constants::kRound)));
  V y = broadcast(Constants::kCoefficients[0]);
  for (int i = 1; i < kTerms; ++i) y = fma(y, f, broadcast(Constants::kCoefficients[i]));
  return mul(y, power_of_two(biased));
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
