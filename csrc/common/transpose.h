// Transposed panels: `lanes` rows of a row-major matrix become vectors of one column each.
//
// A block of kLanes rows x kLanes 32-bit words is transposed in registers; a word holds one float32, two bfloat16 or four
// int8 of a row. Rows are read exactly up to their length.
#pragma once

#include "simd.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

#if defined(__AVX512F__)
using Word = __m512i;
MMREC_INLINE Word load_words(const void* p) { return _mm512_loadu_si512(p); }
// The first `bytes` bytes, fewer than a vector, then zeros. Memory behind them is not touched.
MMREC_INLINE Word load_words(const void* p, int64_t bytes) {
  return _mm512_maskz_loadu_epi8((uint64_t{1} << bytes) - 1, p);
}

MMREC_INLINE void transpose_words(Word* r) {
  Word t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}
MMREC_INLINE F32 as_float(Word a) { return {_mm512_castsi512_ps(a)}; }
MMREC_INLINE Word every_word(uint32_t bits) { return _mm512_set1_epi32(static_cast<int>(bits)); }
MMREC_INLINE Word both(Word a, Word b) { return _mm512_and_si512(a, b); }
MMREC_INLINE Word larger_words(Word a, Word b) { return _mm512_max_epu32(a, b); }
MMREC_INLINE Word larger_halves(Word a, Word b) { return _mm512_max_epu16(a, b); }
MMREC_INLINE F32 bf16_low(Word a) { return as_float(_mm512_slli_epi32(a, 16)); }
MMREC_INLINE F32 bf16_high(Word a) { return as_float(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xffff0000u)))); }
// The four int8 of a word, in order. x + 128 is laid into the mantissa of 2^23 or 2^15, whose last bit is the byte's last bit;
// what is subtracted again is exact. (Shifts and conversions would compete with the transposition for its two ports.)
MMREC_INLINE void int8_columns(Word a, F32* out) {
  // Bit by bit, of (a, b, c): b ? a ^ c : c. So b takes the byte, and c flips its sign and sets the exponent.
  const auto lay = [](Word word, int byte, int exponent) __attribute__((always_inline)) {
    const Word select = _mm512_set1_epi32(0xff << byte), base = _mm512_set1_epi32(exponent | (0x80 << byte));
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(word, select, base, 0x6a));
  };
  constexpr int k2To23 = 0x4b000000, k2To15 = 0x47000000;
  const __m512 low = _mm512_set1_ps(8388608.0f + 128.0f), high = _mm512_set1_ps(32768.0f + 128.0f);
  const Word upper = _mm512_srli_epi32(a, 16);
  out[0] = {_mm512_sub_ps(lay(a, 0, k2To23), low)};
  out[1] = {_mm512_sub_ps(lay(a, 8, k2To15), high)};
  out[2] = {_mm512_sub_ps(lay(upper, 0, k2To23), low)};
  out[3] = {_mm512_sub_ps(lay(upper, 8, k2To15), high)};
}

#elif defined(__AVX2__)
using Word = __m256i;
MMREC_INLINE Word load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
MMREC_INLINE Word load_words(const void* p, int64_t bytes) {
  alignas(32) char copy[32] = {};
  std::memcpy(copy, p, static_cast<size_t>(bytes));
  return load_words(copy);
}

MMREC_INLINE void transpose_words(Word* r) {
  Word t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}
MMREC_INLINE F32 as_float(Word a) { return {_mm256_castsi256_ps(a)}; }
MMREC_INLINE Word every_word(uint32_t bits) { return _mm256_set1_epi32(static_cast<int>(bits)); }
MMREC_INLINE Word both(Word a, Word b) { return _mm256_and_si256(a, b); }
MMREC_INLINE Word larger_words(Word a, Word b) { return _mm256_max_epu32(a, b); }
MMREC_INLINE Word larger_halves(Word a, Word b) { return _mm256_max_epu16(a, b); }
MMREC_INLINE F32 bf16_low(Word a) { return as_float(_mm256_slli_epi32(a, 16)); }
MMREC_INLINE F32 bf16_high(Word a) { return as_float(_mm256_and_si256(a, _mm256_set1_epi32(static_cast<int>(0xffff0000u)))); }
// The four int8 of a word, in order.
MMREC_INLINE void int8_columns(Word a, F32* out) {
  out[0] = {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 24), 24))};
  out[1] = {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 24))};
  out[2] = {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(a, 8), 24))};
  out[3] = {_mm256_cvtepi32_ps(_mm256_srai_epi32(a, 24))};
}
#endif

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
