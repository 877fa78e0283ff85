// log in double precision from functions that every supported system has: that of glibc 2.29 would ask for a newer one than all
// else does; log1p is older.
#pragma once

#include <cmath>

namespace mmrec {

inline double natural_log(double x) {
  constexpr double kLogTwo = 0.69314718055994530942;
  int exponent = 0;
  double fraction = std::frexp(x, &exponent);  // in [1/2, 1)
  if (fraction < 0.70710678118654752) {
    fraction *= 2;
    --exponent;
  }
  return exponent * kLogTwo + std::log1p(fraction - 1);
}

}  // namespace mmrec
