// The first pass of one query over int8 items, where the ISA has VNNI: products in integers.
//
// The query is rounded to Q_d · step, Q_d of 8 bits, or of 16 bits in two bytes, 256 · A + B. One load of a row then costs a dot
// product of bytes or two, and the 16 lanes of 16 rows are summed by a tree. What that sum can be off by is known:
//     |q·x - step · Q·x|  <=  128 · sum_d |q_d - step · Q_d|                        |x_d| <= 128
//     |chain - q·x|       <=  D · 2^-24 · 128 · sum_d |q_d|                         the exact score's own rounding
// A query whose largest element is below 1e-25 is not rounded: the second term is then far above all that is lost where sums
// become subnormal. Eight bits do where their bound is small beside what scores differ by; a query with a few large elements takes sixteen.
#pragma once

#include "first_pass.h"

#if defined(__AVX512VNNI__)

namespace mmrec {
namespace MMREC_ISA {
namespace {

struct RoundedQuery {
  // Sums of |Q_d| · 255 fit 32 bits up to here.
  static constexpr int64_t kMaxWidth = 256;

  alignas(64) int8_t high[kMaxWidth], low[kMaxWidth];  // A, B; or Q and nothing; zeros behind the width
  int bytes;                                           // of Q_d
  int32_t offset;                                      // 128 · sum of Q, as bytes are read as x + 128
  float step, margin;

  // `query` has a column every kQueryGroup floats. False: nothing to be gained or not representable.
  bool round(const float* query, int64_t width) {
    if (width > kMaxWidth) return false;
    float largest = 0;
    double squares = 0;
    for (int64_t d = 0; d < width; ++d) {
      const float size = __builtin_fabsf(query[d * kQueryGroup]);
      if (!(size < 1e30f)) return false;
      largest = size > largest ? size : largest;
      squares += static_cast<double>(size) * size;
    }
    if (largest < 1e-25f) return false;
    // Elements of a row whose largest is 127 are about 45 in the mean square if they are normal: scores differ by |q| times that.
    round(query, width, largest / 127, 1);
    const double most = 16 * __builtin_sqrt(squares);
    if (margin > most) round(query, width, largest / 32512, 2);
    return true;
  }

 private:
  void round(const float* query, int64_t width, float to, int of_bytes) {
    step = to;
    bytes = of_bytes;
    std::memset(high, 0, sizeof(high));
    std::memset(low, 0, sizeof(low));
    int32_t sum = 0;
    double missed = 0, total = 0;
    for (int64_t d = 0; d < width; ++d) {
      const double q = query[d * kQueryGroup];
      const int32_t rounded = static_cast<int32_t>(__builtin_rint(q / step));
      const int32_t upper = bytes == 1 ? rounded : (rounded + 128) >> 8;
      high[d] = static_cast<int8_t>(upper);
      low[d] = static_cast<int8_t>(bytes == 1 ? 0 : rounded - 256 * upper);
      sum += rounded;
      missed += __builtin_fabs(q - static_cast<double>(step) * rounded);
      total += __builtin_fabs(q);
    }
    offset = 128 * sum;
    margin = static_cast<float>(1.01 * 128 * (missed + static_cast<double>(width + 8) * 0x1p-24 * total));
  }
};

// Of 4 vectors, in each group of 4 lanes the sums of that group.
MMREC_INLINE __m512i sum_groups(const __m512i* rows) {
  const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
  const __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
  return _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
}

MMREC_INLINE __m512i add_groups(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}

// Rows of a line or two, whose lanes are summed between them, are not what a CPU reads ahead by itself (a Zen 5): far ahead into
// L2, so that much of memory is on its way, and from there into L1.
MMREC_INLINE void ask_ahead(const char* line) {
  _mm_prefetch(line + 16384, _MM_HINT_T1);
  _mm_prefetch(line + 2048, _MM_HINT_T0);
}

// Products of rows of kBlocks vectors each, with a query of kBytes.
template <int kBlocks, int kBytes>
class RoundedProducts {
 public:
  RoundedProducts(const RoundedQuery& query, int64_t width)
      : query_(query), end_(~__mmask64{0} >> (64 * kBlocks - width)) {}

  // Of a panel's rows; what each of them can be off by.
  template <typename Rows>
  MMREC_INLINE F32 operator()(const Rows& rows, F32 (&products)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) {
      __m512i groups[4];
#pragma GCC unroll 1
      for (int g = 0; g < 4; ++g) {
        __m512i sums[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[i] = row_sums(rows[v * F32::kLanes + 4 * g + i]);
        groups[g] = sum_groups(sums);
      }
      const __m512i sum = add_groups(add_groups(groups[0], groups[1]), add_groups(groups[2], groups[3]));
      const __m512i product = _mm512_sub_epi32(sum, _mm512_set1_epi32(query_.offset));
      products[v] = mul({_mm512_cvtepi32_ps(product)}, broadcast(query_.step));
    }
    return broadcast(query_.margin);
  }

 private:
  // Of every fourth column; only the bits of end_ count of the last vector.
  MMREC_INLINE __m512i row_sums(const char* row) const {
    for (int b = 0; b < kBlocks; ++b) ask_ahead(row + 64 * b);
    const __m512i to_unsigned = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i upper = _mm512_setzero_si512(), lower = upper;
    for (int b = 0; b < kBlocks; ++b) {
      const __m512i x = b + 1 < kBlocks ? load_words(row + 64 * b) : _mm512_maskz_loadu_epi8(end_, row + 64 * b);
      const __m512i bytes = _mm512_xor_si512(x, to_unsigned);
      upper = _mm512_dpbusd_epi32(upper, bytes, _mm512_load_si512(query_.high + 64 * b));
      if (kBytes == 2) lower = _mm512_dpbusd_epi32(lower, bytes, _mm512_load_si512(query_.low + 64 * b));
    }
    return kBytes == 2 ? _mm512_add_epi32(_mm512_slli_epi32(upper, 8), lower) : upper;
  }

  const RoundedQuery& query_;
  __mmask64 end_;
};

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec

#endif
