// Rows of W in natural order and in any type: the float32 products, rounded once to nearest even.

#include "decode.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// To the nearest float16, ties to even.
MMREC_INLINE uint16_t to_float16(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 2^16 and more
  if (magnitude >= 0x38800000u) {
    // The exponent's bias falls from 127 to 15; rounding may carry into it, up to infinity.
    const uint32_t shifted = magnitude - (112u << 23);
    return static_cast<uint16_t>(sign | (shifted + 0xfffu + (shifted >> 13 & 1u)) >> 13);
  }
  // Subnormal: the sum with 0.5, whose last bit is the unit of float16's subnormals, rounds as it should.
  float small;
  std::memcpy(&small, &magnitude, sizeof(small));
  small += 0.5f;
  std::memcpy(&bits, &small, sizeof(bits));
  return static_cast<uint16_t>(sign | (bits - 0x3f000000u));
}

int64_t scratch_bytes(const NF4Bytes& weight) {
  return round_up(absmax_count(weight, 1) * static_cast<int64_t>(sizeof(float)), 64);
}

void decode(const NF4Bytes& bytes, int64_t begin, int64_t end, Decoded type, void* out, char* scratch) {
  alignas(64) float values[kGroupColumns];
  const int64_t columns = bytes.columns;
  for (int64_t n = begin; n < end; ++n) {
    const Weight w = weight_rows(bytes, n, n + 1, reinterpret_cast<float*>(scratch));
    for (int64_t column = 0; column < columns; column += kGroupColumns) {
      decode_group<false>(w, n, column, values);
      const int64_t count = at_most(kGroupColumns, columns - column), at = n * columns + column;
      switch (type) {
        case Decoded::kFloat32:
          std::memcpy(static_cast<float*>(out) + at, values, sizeof(float) * static_cast<size_t>(count));
          break;
        case Decoded::kBFloat16:
          for (int64_t k = 0; k < count; ++k) static_cast<BFloat16*>(out)[at + k] = narrow(values[k]);
          break;
        case Decoded::kFloat16:
          for (int64_t k = 0; k < count; ++k) static_cast<uint16_t*>(out)[at + k] = to_float16(values[k]);
          break;
        case Decoded::kFloat64:
          for (int64_t k = 0; k < count; ++k) static_cast<double*>(out)[at + k] = values[k];
          break;
      }
    }
  }
}

void expand(const NF4Bytes& weight, int64_t begin, int64_t end, float* out) { expand_absmax(weight, begin, end, out); }

}  // namespace

void nf4_kernels(NF4Decode& kernels) { kernels = {16, scratch_bytes, decode, expand}; }

}  // namespace MMREC_ISA
}  // namespace mmrec
