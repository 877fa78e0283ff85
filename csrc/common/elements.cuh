// Elements of rows as float32, whatever they are stored as.
#pragma once

#include <cstring>

#include "warp.cuh"

namespace mmrec {
namespace elements {

struct Float32 {
  static constexpr int kBytes = 4;
  static MMREC_DEVICE float one(const char* at) { return *reinterpret_cast<const float*>(at); }
  static MMREC_DEVICE void eight(const char* at, float (&out)[8]) {
    for (int half = 0; half < 2; ++half) {
      const auto four = *(reinterpret_cast<const warp::Words<4>*>(at) + half);
      for (int i = 0; i < 4; ++i) memcpy(&out[4 * half + i], &four.word[i], 4);
    }
  }
};

template <typename T>
struct Narrow {
  static constexpr int kBytes = 2;
  static MMREC_DEVICE float one(const char* at) { return T::low(*reinterpret_cast<const uint16_t*>(at)); }
  static MMREC_DEVICE void eight(const char* at, float (&out)[8]) {
    const auto four = *reinterpret_cast<const warp::Words<4>*>(at);
    for (int i = 0; i < 4; ++i) {
      out[2 * i] = T::low(four.word[i]);
      out[2 * i + 1] = T::high(four.word[i]);
    }
  }
};

// Elements [d, d + 8) of a row of `width`, 0 behind it.
template <typename T>
MMREC_DEVICE void load_eight(const char* row, int d, int width, bool aligned, float (&out)[8]) {
  if (aligned) return T::eight(row + d * T::kBytes, out);
  for (int i = 0; i < 8; ++i) out[i] = d + i < width ? T::one(row + (d + i) * T::kBytes) : 0.0f;
}

}  // namespace elements
}  // namespace mmrec
