// What is done to single rows of gradients: O(N · D), beside the products' O(N² · D).
#pragma once

#include "logits.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename Raw>
const Raw* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const Raw*>(matrix.values) + row * matrix.stride;
}

template <typename T>
bool all_zero(const T* row, int64_t width) {
  T most = 0;
  for (int64_t d = 0; d < width; ++d) most = row[d] == T(0) ? most : T(1);
  return most == T(0);
}

constexpr double kNormEps = 1e-12;

// From the gradient g of x / max(‖x‖, ε), in place, to that of x, written. Zero where g is, and where x is.
template <typename Raw, typename T>
void write_through_norm(T* g, const Raw* x, const double* norm, int64_t width, Raw* out) {
  if (norm != nullptr) {
    const double inverse = 1.0 / (*norm > kNormEps ? *norm : kNormEps);
    if (*norm > kNormEps) {
      add_row(static_cast<T>(-dot_in_double(x, g, width) * inverse * inverse), x, width, g);
    }
    for (int64_t d = 0; d < width; ++d) g[d] = *norm == 0.0 ? T(0) : g[d] * static_cast<T>(inverse);
  }
  write_row(g, T(1), width, out);
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
