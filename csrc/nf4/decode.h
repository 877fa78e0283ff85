// NF4 to numbers: W[n, k] = code · absmax of its block, a float32 product rounded once to the type of the operands.
//
// A block of 64 weights has 16 values: they are made once, and the nibbles choose among them in registers. Columns come
// in groups of 128. Their order within a group is the natural one; as operands of pairs it is kPairOrder, the order in which
// 64 bytes give up their nibbles without being unpacked, and tokens are brought into the same order instead.
#pragma once

#include "../common/rows.h"
#include "nf4_kernel.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

alignas(64) constexpr float kCodes[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f,
    -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// absmax of blocks [begin, end): one rounding after the product, one after the sum.
MMREC_INLINE void expand_some(const NF4Bytes& w, int64_t begin, int64_t end, float* out) {
  for (int64_t i = begin; i < end; ++i) {
    const float product = w.nested_code[w.nested[i]] * w.nested_absmax[i / kNestedBlock];
    out[i - begin] = product + w.offset;
  }
}

#if defined(__AVX512F__)
// 256 floats in registers, as their lower and upper halves, 64 of them in two.
struct HalfTable {
  __m512i words[8];

  MMREC_INLINE HalfTable(const float* values, int shift) {
    for (int i = 0; i < 8; ++i) {
      const __m512i first = _mm512_loadu_si512(values + 32 * i), second = _mm512_loadu_si512(values + 32 * i + 16);
      words[i] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi32_epi16(_mm512_srli_epi32(first, shift))),
                                    _mm512_cvtepi32_epi16(_mm512_srli_epi32(second, shift)), 1);
    }
  }
  MMREC_INLINE __m512i look_up(__m512i index, __mmask32 bit6, __mmask32 bit7) const {
    __m512i found[4];
    for (int i = 0; i < 4; ++i) found[i] = _mm512_permutex2var_epi16(words[2 * i], index, words[2 * i + 1]);
    const __m512i lower = _mm512_mask_mov_epi16(found[0], bit6, found[1]), upper = _mm512_mask_mov_epi16(found[2], bit6, found[3]);
    return _mm512_mask_mov_epi16(lower, bit7, upper);
  }
};

__attribute__((noinline)) inline void expand_absmax(const NF4Bytes& w, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kAtOnce = 32;
  int64_t i = at_most(round_up(begin, kAtOnce), end);
  expand_some(w, begin, i, out);
  const HalfTable low(w.nested_code, 0), high(w.nested_code, 16);
  const __m512 offset = _mm512_set1_ps(w.offset);
  for (; i + kAtOnce <= end; i += kAtOnce) {
    // In an order that interleaving the halves undoes.
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w.nested + i));
    const __m512i index = _mm512_cvtepu8_epi16(_mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    const __mmask32 bit6 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
    const __mmask32 bit7 = _mm512_test_epi16_mask(index, _mm512_set1_epi16(128));
    const __m512i lows = low.look_up(index, bit6, bit7), highs = high.look_up(index, bit6, bit7);
    const __m512 scale = _mm512_set1_ps(w.nested_absmax[i / kNestedBlock]);
    const __m512 first = _mm512_castsi512_ps(_mm512_unpacklo_epi16(lows, highs));
    const __m512 second = _mm512_castsi512_ps(_mm512_unpackhi_epi16(lows, highs));
    _mm512_storeu_ps(out + i - begin, _mm512_add_ps(_mm512_mul_ps(first, scale), offset));
    _mm512_storeu_ps(out + i - begin + 16, _mm512_add_ps(_mm512_mul_ps(second, scale), offset));
  }
  expand_some(w, i, end, out + i - begin);
}
#else
MMREC_INLINE void expand_absmax(const NF4Bytes& w, int64_t begin, int64_t end, float* out) { expand_some(w, begin, end, out); }
#endif

// A weight and the absmax of its blocks, of all or of some rows' blocks.
struct Weight {
  const NF4Bytes& bytes;
  const float* absmax;  // of block 0, even if that is not among those that may be read

  float absmax_of(int64_t flat) const { return absmax[flat >> bytes.block_shift]; }
};

// Those of rows [begin, end); `scratch` has absmax_count(bytes, end - begin) floats.
MMREC_INLINE int64_t absmax_count(const NF4Bytes& w, int64_t rows) {
  return w.absmax != nullptr ? 0 : ((rows * w.columns) >> w.block_shift) + 2;
}
MMREC_INLINE Weight weight_rows(const NF4Bytes& w, int64_t begin, int64_t end, float* scratch) {
  if (w.absmax != nullptr) return {w, w.absmax};
  const int64_t first = (begin * w.columns) >> w.block_shift, last = (end * w.columns - 1) >> w.block_shift;
  if (first <= last) expand_absmax(w, first, last + 1, scratch);
  return {w, scratch - first};
}

// To the nearest bfloat16, subnormals too.
MMREC_INLINE float rounded_to_bf16(float a) { return widen(narrow(a)); }

// The 16 values of a block.
template <bool kRound>
MMREC_INLINE void block_values(float absmax, float* values) {
  for (int c = 0; c < 16; ++c) {
    const float product = kCodes[c] * absmax;
    values[c] = kRound ? rounded_to_bf16(product) : product;
  }
}

// 32 weights of one block, 16 bytes.
#if defined(__AVX512F__)
template <bool kRound>
struct BlockTable {
  __m512 values;
  MMREC_INLINE explicit BlockTable(__m512 made) : values(made) {}
  MMREC_INLINE explicit BlockTable(float absmax) : values(_mm512_mul_ps(_mm512_load_ps(kCodes), _mm512_set1_ps(absmax))) {
    if constexpr (kRound) {
      const __m512i bits = _mm512_castps_si512(values), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
      const __m512i rounded = _mm512_and_si512(sum, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
      // NaN, which an absmax may be, would overflow into another number.
      values = _mm512_mask_mov_ps(_mm512_castsi512_ps(rounded), _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q), values);
    }
  }
  MMREC_INLINE void decode32(const uint8_t* bytes, F32 (&out)[2]) const {
    const __m512i even = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(8));
    const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(b, 4), values), low = _mm512_permutexvar_ps(b, values);
    out[0] = {_mm512_permutex2var_ps(high, even, low)};
    out[1] = {_mm512_permutex2var_ps(high, odd, low)};
  }
  MMREC_INLINE void decode32(const uint8_t* bytes, float* out) const {
    F32 found[2];
    decode32(bytes, found);
    store(out, found[0]);
    store(out + 16, found[1]);
  }
};
#elif defined(__AVX2__)
template <bool kRound>
struct BlockTable {
  __m256 lower, upper;
  MMREC_INLINE explicit BlockTable(float absmax) {
    alignas(32) float values[16];
    block_values<kRound>(absmax, values);
    lower = _mm256_load_ps(values);
    upper = _mm256_load_ps(values + 8);
  }
  MMREC_INLINE __m256 look_up(__m256i index) const {
    const __m256 is_upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index), _mm256_permutevar8x32_ps(upper, index), is_upper);
  }
  MMREC_INLINE void decode32(const uint8_t* bytes, float* out) const {
    for (int part = 0; part < 2; ++part) {
      const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * part)));
      const __m256 high = look_up(_mm256_srli_epi32(b, 4)), low = look_up(b);
      const __m256 first = _mm256_unpacklo_ps(high, low), second = _mm256_unpackhi_ps(high, low);
      _mm256_storeu_ps(out + 16 * part, _mm256_permute2f128_ps(first, second, 0x20));
      _mm256_storeu_ps(out + 16 * part + 8, _mm256_permute2f128_ps(first, second, 0x31));
    }
  }
};
#else
template <bool kRound>
struct BlockTable {
  float values[16];
  MMREC_INLINE explicit BlockTable(float absmax) { block_values<kRound>(absmax, values); }
  MMREC_INLINE void decode32(const uint8_t* bytes, float* out) const {
    for (int i = 0; i < 16; ++i) {
      out[2 * i] = values[bytes[i] >> 4];
      out[2 * i + 1] = values[bytes[i] & 15];
    }
  }
};
#endif

// Columns [column, column + count) of row n, wherever blocks begin; count is at most kGroupColumns.
template <bool kRound>
void decode_any(const Weight& w, int64_t n, int64_t column, int64_t count, float* out) {
  const int64_t begin = n * w.bytes.columns + column, end = begin + count;
  for (int64_t flat = begin; flat < end;) {
    const int64_t block = flat >> w.bytes.block_shift, stop = at_most(end, (block + 1) << w.bytes.block_shift);
    float values[16];
    block_values<kRound>(w.absmax[block], values);
    for (; flat < stop; ++flat) {
      const uint8_t byte = w.bytes.packed[flat / 2];
      out[flat - begin] = values[flat % 2 == 0 ? byte >> 4 : byte & 15];
    }
  }
}

// A group of row n's columns as float32, those behind the last one 0.
template <bool kRound>
void decode_group(const Weight& w, int64_t n, int64_t column, float* out) {
  const int64_t count = at_most(kGroupColumns, w.bytes.columns - column);
  if (w.bytes.is_aligned()) {
    for (int64_t half = 0; half < count; half += 64) {
      const int64_t flat = n * w.bytes.columns + column + half;
      const BlockTable<kRound> table(w.absmax_of(flat));
      table.decode32(w.bytes.packed + flat / 2, out + half);
      table.decode32(w.bytes.packed + flat / 2 + 16, out + half + 32);
    }
  } else {
    decode_any<kRound>(w, n, column, count, out);
  }
  for (int64_t k = count; k < kGroupColumns; ++k) out[k] = 0;
}

#if defined(__AVX512BF16__)
// Vector c holds the columns 4 i + kPairOrder[c], i from 0 to 31, of a group.
constexpr int kPairOrder[4] = {1, 0, 3, 2};

struct PairGroup {
  __m512i columns[4];
};

// 64 bytes whose halves are of blocks with these absmax.
MMREC_INLINE PairGroup decode_pairs(__m512i bytes, float first, float second) {
  const __m512 codes = _mm512_load_ps(kCodes);
  const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(codes, _mm512_set1_ps(second)),
                                                      _mm512_mul_ps(codes, _mm512_set1_ps(first)));
  // An index has five bits, of which the fifth tells the halves apart; of (a, b, c): a & b | c.
  const __m512i nibbles = _mm512_set1_epi16(0x0f0f);
  const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(0x1010), 1);
  const __m512i low = _mm512_ternarylogic_epi32(bytes, nibbles, half, 0xea);
  const __m512i high = _mm512_ternarylogic_epi32(_mm512_srli_epi16(bytes, 4), nibbles, half, 0xea);
  return {{_mm512_permutexvar_epi16(low, values), _mm512_permutexvar_epi16(high, values),
           _mm512_permutexvar_epi16(_mm512_srli_epi16(low, 8), values),
           _mm512_permutexvar_epi16(_mm512_srli_epi16(high, 8), values)}};
}

// A group in natural order to kPairOrder.
MMREC_INLINE PairGroup in_pair_order(const BFloat16* row) {
  __m512i part[4];
  for (int i = 0; i < 4; ++i) part[i] = _mm512_loadu_si512(row + 32 * i);
  const __m512i fours = _mm512_set_epi16(60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0, 60, 56, 52, 48, 44, 40, 36,
                                         32, 28, 24, 20, 16, 12, 8, 4, 0);
  PairGroup group;
  for (int c = 0; c < 4; ++c) {
    const __m512i index = _mm512_add_epi16(fours, _mm512_set1_epi16(static_cast<short>(kPairOrder[c])));
    const __m512i first = _mm512_permutex2var_epi16(part[0], index, part[1]);
    const __m512i second = _mm512_permutex2var_epi16(part[2], index, part[3]);
    group.columns[c] = _mm512_mask_mov_epi64(first, 0xf0, second);
  }
  return group;
}

// The other way: 128 sums in the order that the interleaved vectors of two rows give them, c's lower and upper halves.
MMREC_INLINE void from_pair_order(const float* sums, float* out) {
  for (int h = 0; h < 2; ++h) {
    __m512 x[4], y[4], t[4];
    for (int c = 0; c < 4; ++c) x[kPairOrder[c]] = _mm512_loadu_ps(sums + 32 * c + 16 * h);
    for (int i = 0; i < 4; i += 2) {
      t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      y[2 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
      y[2 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(t[i]), _mm512_castps_pd(t[i + 2])));
    }
    // Lane L of y[q] holds the columns 32 L + 16 h + 4 q and the three behind it.
    for (int i = 0; i < 2; ++i) {
      t[2 * i] = _mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0x44);
      t[2 * i + 1] = _mm512_shuffle_f32x4(y[2 * i], y[2 * i + 1], 0xee);
    }
    _mm512_storeu_ps(out + 16 * h, _mm512_shuffle_f32x4(t[0], t[2], 0x88));
    _mm512_storeu_ps(out + 32 + 16 * h, _mm512_shuffle_f32x4(t[0], t[2], 0xdd));
    _mm512_storeu_ps(out + 64 + 16 * h, _mm512_shuffle_f32x4(t[1], t[3], 0x88));
    _mm512_storeu_ps(out + 96 + 16 * h, _mm512_shuffle_f32x4(t[1], t[3], 0xdd));
  }
}

// Columns [column, column + 128) of row n.
MMREC_INLINE PairGroup pair_group(const Weight& w, int64_t n, int64_t column) {
  const int64_t flat = n * w.bytes.columns + column;
  const uint8_t* const bytes = w.bytes.packed + flat / 2;
  return decode_pairs(_mm512_loadu_si512(bytes), w.absmax_of(flat), w.absmax_of(flat + 64));
}

// The same where the weight is not aligned or the row ends within the group.
__attribute__((noinline)) inline PairGroup odd_pair_group(const Weight& w, int64_t n, int64_t column) {
  alignas(64) float values[kGroupColumns];
  alignas(64) BFloat16 rounded[kGroupColumns];
  decode_group<true>(w, n, column, values);
  for (int64_t k = 0; k < kGroupColumns; k += F32::kLanes) store(rounded + k, load(values + k));
  return in_pair_order(rounded);
}
#endif

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
