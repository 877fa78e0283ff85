// Fixed-width vectors of float and double for the ISA that the including source is compiled for.
//
// Only what the kernels use; every function is internal to the translation unit (see isa.h). fma() is one rounding where
// the ISA has it (AVX2 up) and two in `base`.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define MMREC_INLINE inline __attribute__((always_inline))

namespace mmrec {
namespace MMREC_ISA {
namespace {

#if defined(__AVX512F__)

struct F32 {
  static constexpr int kLanes = 16;
  __m512 v;
};
struct F64 {
  static constexpr int kLanes = 8;
  __m512d v;
};
MMREC_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
MMREC_INLINE F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
MMREC_INLINE void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
MMREC_INLINE void store(double* p, F64 a) { _mm512_storeu_pd(p, a.v); }
// Past the caches, to addresses that the size of what is stored divides: memory is not read first. Whole lines of 64 bytes, one
// after the other, and fence() before another thread reads them. Where there is no such store, it is an ordinary one.
MMREC_INLINE void stream(float* p, F32 a) { _mm512_stream_ps(p, a.v); }
MMREC_INLINE void stream(double* p, F64 a) { _mm512_stream_pd(p, a.v); }
MMREC_INLINE F32 broadcast(float a) { return {_mm512_set1_ps(a)}; }
MMREC_INLINE F64 broadcast(double a) { return {_mm512_set1_pd(a)}; }
MMREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
MMREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
MMREC_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
MMREC_INLINE F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
MMREC_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
MMREC_INLINE F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
MMREC_INLINE F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
MMREC_INLINE F64 sub(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
MMREC_INLINE F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
MMREC_INLINE F64 div(F64 a, F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
// The larger; b where either is NaN.
MMREC_INLINE F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
MMREC_INLINE F64 max(F64 a, F64 b) { return {_mm512_max_pd(a.v, b.v)}; }
MMREC_INLINE F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
// Bit i: not a[i] <= b[i]; true where either is NaN.
MMREC_INLINE uint32_t not_at_most(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
// Bit i: a[i] > b[i]; false where either is NaN.
MMREC_INLINE uint32_t greater(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
MMREC_INLINE uint32_t greater(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }
// Bit i: a[i] == b[i].
MMREC_INLINE uint32_t same(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
MMREC_INLINE uint32_t same(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ); }
// Lane i: bit i is set ? a[i] : b[i].
MMREC_INLINE F32 select(uint32_t bits, F32 a, F32 b) {
  return {_mm512_mask_mov_ps(b.v, static_cast<__mmask16>(bits), a.v)};
}
MMREC_INLINE F64 select(uint32_t bits, F64 a, F64 b) {
  return {_mm512_mask_mov_pd(b.v, static_cast<__mmask8>(bits), a.v)};
}
// 2^k of lanes that hold an integer k of at least -126 (-1022) in the last bits of their mantissa.
MMREC_INLINE F32 power_of_two(F32 a) {
  return {_mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(_mm512_castps_si512(a.v), 23), _mm512_set1_epi32(127 << 23)))};
}
MMREC_INLINE F64 power_of_two(F64 a) {
  return {_mm512_castsi512_pd(
      _mm512_add_epi64(_mm512_slli_epi64(_mm512_castpd_si512(a.v), 52), _mm512_set1_epi64(int64_t{1023} << 52)))};
}
// Bit i: p[i] == a, for the lanes of an F32.
MMREC_INLINE uint32_t equal(const int32_t* p, int32_t a) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(a));
}

#elif defined(__AVX2__)

struct F32 {
  static constexpr int kLanes = 8;
  __m256 v;
};
struct F64 {
  static constexpr int kLanes = 4;
  __m256d v;
};
MMREC_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
MMREC_INLINE F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
MMREC_INLINE void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
MMREC_INLINE void store(double* p, F64 a) { _mm256_storeu_pd(p, a.v); }
MMREC_INLINE void stream(float* p, F32 a) { _mm256_stream_ps(p, a.v); }
MMREC_INLINE void stream(double* p, F64 a) { _mm256_stream_pd(p, a.v); }
MMREC_INLINE F32 broadcast(float a) { return {_mm256_set1_ps(a)}; }
MMREC_INLINE F64 broadcast(double a) { return {_mm256_set1_pd(a)}; }
MMREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
MMREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
MMREC_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
MMREC_INLINE F64 mul(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
MMREC_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
MMREC_INLINE F64 add(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
MMREC_INLINE F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
MMREC_INLINE F64 sub(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
MMREC_INLINE F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
MMREC_INLINE F64 div(F64 a, F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
MMREC_INLINE F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
MMREC_INLINE F64 max(F64 a, F64 b) { return {_mm256_max_pd(a.v, b.v)}; }
MMREC_INLINE F32 select(uint32_t bits, F32 a, F32 b) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
  return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(set))};
}
MMREC_INLINE F64 select(uint32_t bits, F64 a, F64 b) {
  const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
  const __m256i set = _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), lane), lane);
  return {_mm256_blendv_pd(b.v, a.v, _mm256_castsi256_pd(set))};
}
MMREC_INLINE F32 power_of_two(F32 a) {
  return {_mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(a.v), 23), _mm256_set1_epi32(127 << 23)))};
}
MMREC_INLINE F64 power_of_two(F64 a) {
  return {_mm256_castsi256_pd(
      _mm256_add_epi64(_mm256_slli_epi64(_mm256_castpd_si256(a.v), 52), _mm256_set1_epi64x(int64_t{1023} << 52)))};
}
MMREC_INLINE F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
MMREC_INLINE uint32_t not_at_most(F32 a, F32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ)));
}
MMREC_INLINE uint32_t equal(const int32_t* p, int32_t a) {
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(values, _mm256_set1_epi32(a)))));
}
MMREC_INLINE uint32_t greater(F32 a, F32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
MMREC_INLINE uint32_t greater(F64 a, F64 b) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)));
}
MMREC_INLINE uint32_t same(F32 a, F32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)));
}
MMREC_INLINE uint32_t same(F64 a, F64 b) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)));
}

#else

// The compiler lowers these to SSE2, NEON or scalar code.
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef int64_t Long2 __attribute__((vector_size(16)));
struct F32 {
  static constexpr int kLanes = 4;
  Float4 v;
};
struct F64 {
  static constexpr int kLanes = 2;
  Double2 v;
};

template <typename V, typename T>
MMREC_INLINE V load_generic(const T* p) {
  V a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
MMREC_INLINE F32 load(const float* p) { return load_generic<F32>(p); }
MMREC_INLINE F64 load(const double* p) { return load_generic<F64>(p); }
MMREC_INLINE void store(float* p, F32 a) { std::memcpy(p, &a.v, sizeof(a.v)); }
MMREC_INLINE void store(double* p, F64 a) { std::memcpy(p, &a.v, sizeof(a.v)); }
MMREC_INLINE void stream(float* p, F32 a) { store(p, a); }
MMREC_INLINE void stream(double* p, F64 a) { store(p, a); }
MMREC_INLINE F32 broadcast(float a) { return {Float4{a, a, a, a}}; }
MMREC_INLINE F64 broadcast(double a) { return {Double2{a, a}}; }
MMREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
MMREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return {a.v * b.v + c.v}; }
MMREC_INLINE F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
MMREC_INLINE F64 mul(F64 a, F64 b) { return {a.v * b.v}; }
MMREC_INLINE F32 add(F32 a, F32 b) { return {a.v + b.v}; }
MMREC_INLINE F64 add(F64 a, F64 b) { return {a.v + b.v}; }
MMREC_INLINE F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
MMREC_INLINE F64 sub(F64 a, F64 b) { return {a.v - b.v}; }
MMREC_INLINE F32 div(F32 a, F32 b) { return {a.v / b.v}; }
MMREC_INLINE F64 div(F64 a, F64 b) { return {a.v / b.v}; }
MMREC_INLINE F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
MMREC_INLINE F64 max(F64 a, F64 b) { return {a.v > b.v ? a.v : b.v}; }
MMREC_INLINE F32 select(uint32_t bits, F32 a, F32 b) {
  const Int4 lane = {1, 2, 4, 8}, all = {static_cast<int>(bits), static_cast<int>(bits), static_cast<int>(bits), static_cast<int>(bits)};
  return {(all & lane) != 0 ? a.v : b.v};
}
MMREC_INLINE F64 select(uint32_t bits, F64 a, F64 b) {
  const Long2 lane = {1, 2}, all = {bits, bits};
  return {(all & lane) != 0 ? a.v : b.v};
}
MMREC_INLINE F32 power_of_two(F32 a) {
  Int4 bits;
  std::memcpy(&bits, &a.v, sizeof(bits));
  bits = (bits << 23) + (127 << 23);
  return load_generic<F32>(&bits);
}
MMREC_INLINE F64 power_of_two(F64 a) {
  Long2 bits;
  std::memcpy(&bits, &a.v, sizeof(bits));
  bits = (bits << 52) + (int64_t{1023} << 52);
  return load_generic<F64>(&bits);
}
MMREC_INLINE uint32_t equal(const int32_t* p, int32_t a) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(p[i] == a) << i;
  return bits;
}
MMREC_INLINE uint32_t greater(F32 a, F32 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
  return bits;
}
MMREC_INLINE uint32_t greater(F64 a, F64 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 2; ++i) bits |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
  return bits;
}
MMREC_INLINE uint32_t same(F32 a, F32 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
  return bits;
}
MMREC_INLINE uint32_t same(F64 a, F64 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 2; ++i) bits |= static_cast<uint32_t>(a.v[i] == b.v[i]) << i;
  return bits;
}

#endif

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = F32;
};
template <>
struct VectorOf<double> {
  using type = F64;
};
template <typename T>
using Vec = typename VectorOf<T>::type;

// The first `count` lanes.
template <int kLanes>
MMREC_INLINE uint32_t lanes_before(int64_t count) {
  return count >= kLanes ? (uint64_t{1} << kLanes) - 1 : (uint32_t{1} << count) - 1;
}

MMREC_INLINE float widen(float a) { return a; }
MMREC_INLINE double widen(double a) { return a; }
MMREC_INLINE float widen(int8_t a) { return static_cast<float>(a); }
// bfloat16 is the upper half of a float32.
struct BFloat16 {
  uint16_t bits;
};
MMREC_INLINE float widen(BFloat16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
// To the nearest bfloat16, ties to even; NaN stays NaN.
MMREC_INLINE BFloat16 narrow(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

#if defined(__AVX512F__)
MMREC_INLINE F32 load(const BFloat16* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
#if defined(__AVX512BF16__)
// Subnormals become zero.
MMREC_INLINE void store(BFloat16* p, F32 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
// 32 bfloat16: those of a, then those of b.
MMREC_INLINE F32 append_bf16(F32 a, F32 b) { return {_mm512_castsi512_ps((__m512i)_mm512_cvtne2ps_pbh(b.v, a.v))}; }
// Lane i: a[i] in the lower half, b[i] in the upper one.
MMREC_INLINE F32 pair_bf16(F32 a, F32 b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v)))};
}
#else
MMREC_INLINE void store(BFloat16* p, F32 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc0))));
}
#endif
#else
// The compiler turns these loops into vectors.
MMREC_INLINE F32 load(const BFloat16* p) {
  float values[F32::kLanes];
  for (int i = 0; i < F32::kLanes; ++i) values[i] = widen(p[i]);
  return load(values);
}
MMREC_INLINE void store(BFloat16* p, F32 a) {
  float values[F32::kLanes];
  store(values, a);
  for (int i = 0; i < F32::kLanes; ++i) p[i] = narrow(values[i]);
}
#endif

#if defined(__AVX512F__)
MMREC_INLINE void stream(BFloat16* p, F32 a) {
  alignas(32) BFloat16 rounded[F32::kLanes];
  store(rounded, a);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm256_load_si256(reinterpret_cast<const __m256i*>(rounded)));
}
#else
MMREC_INLINE void stream(BFloat16* p, F32 a) { store(p, a); }
#endif
MMREC_INLINE void fence() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

// Lanes are folded in halves, lane i with lane i + half: an order that is the same for every length.
#if defined(__AVX512F__)
MMREC_INLINE __m256 halves(F32 a, __m256& upper) {
  upper = _mm512_extractf32x8_ps(a.v, 1);
  return _mm512_castps512_ps256(a.v);
}
MMREC_INLINE __m256d halves(F64 a, __m256d& upper) {
  upper = _mm512_extractf64x4_pd(a.v, 1);
  return _mm512_castpd512_pd256(a.v);
}
#endif
#if defined(__AVX2__)
#define MMREC_FOLD(name, operation)                                                                \
  MMREC_INLINE float name(__m256 a) {                                                              \
    const __m128 four = _mm_##operation##_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)); \
    const __m128 two = _mm_##operation##_ps(four, _mm_movehl_ps(four, four));                      \
    return _mm_cvtss_f32(_mm_##operation##_ps(two, _mm_movehdup_ps(two)));                         \
  }                                                                                                \
  MMREC_INLINE double name(__m256d a) {                                                            \
    const __m128d two = _mm_##operation##_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd(a, 1)); \
    return _mm_cvtsd_f64(_mm_##operation##_pd(two, _mm_unpackhi_pd(two, two)));                    \
  }
MMREC_FOLD(fold_add, add)
MMREC_FOLD(fold_max, max)
#undef MMREC_FOLD
#if defined(__AVX512F__)
MMREC_INLINE float reduce_add(F32 a) {
  __m256 upper;
  const __m256 lower = halves(a, upper);
  return fold_add(_mm256_add_ps(lower, upper));
}
MMREC_INLINE double reduce_add(F64 a) {
  __m256d upper;
  const __m256d lower = halves(a, upper);
  return fold_add(_mm256_add_pd(lower, upper));
}
MMREC_INLINE float reduce_max(F32 a) {
  __m256 upper;
  const __m256 lower = halves(a, upper);
  return fold_max(_mm256_max_ps(lower, upper));
}
MMREC_INLINE double reduce_max(F64 a) {
  __m256d upper;
  const __m256d lower = halves(a, upper);
  return fold_max(_mm256_max_pd(lower, upper));
}
#else
MMREC_INLINE float reduce_add(F32 a) { return fold_add(a.v); }
MMREC_INLINE double reduce_add(F64 a) { return fold_add(a.v); }
MMREC_INLINE float reduce_max(F32 a) { return fold_max(a.v); }
MMREC_INLINE double reduce_max(F64 a) { return fold_max(a.v); }
#endif
#else
MMREC_INLINE float reduce_add(F32 a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
MMREC_INLINE double reduce_add(F64 a) { return a.v[0] + a.v[1]; }
template <typename T>
MMREC_INLINE T larger(T a, T b) {
  return a > b ? a : b;
}
MMREC_INLINE float reduce_max(F32 a) { return larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3])); }
MMREC_INLINE double reduce_max(F64 a) { return larger(a.v[0], a.v[1]); }
#endif

// The sums of the lanes of R times four vectors, transposed: out[i · stride + r] is that of sums[r][i].
template <int R, typename V, typename T>
MMREC_INLINE void transposed_sums(const V (&sums)[R][4], T* out, int64_t stride) {
  for (int r = 0; r < R; ++r) {
    for (int i = 0; i < 4; ++i) out[i * stride + r] = reduce_add(sums[r][i]);
  }
}
#if defined(__AVX2__)
MMREC_INLINE __m128 four_sums(F32 a, F32 b, F32 c, F32 d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 both = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(both), _mm512_extractf32x8_ps(both, 1));
#else
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c.v, d.v), _mm256_unpackhi_ps(c.v, d.v));
  const __m256 half = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
#endif
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
template <int R>
MMREC_INLINE void transposed_sums(const F32 (&sums)[R][4], float* out, int64_t stride) {
  static_assert(R <= 4);
  __m128 x[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    x[r] = r < R ? four_sums(sums[r % R][0], sums[r % R][1], sums[r % R][2], sums[r % R][3]) : _mm_setzero_ps();
  }
  _MM_TRANSPOSE4_PS(x[0], x[1], x[2], x[3]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    float* const to = out + i * stride;
    if constexpr (R == 4) {
      _mm_storeu_ps(to, x[i]);
    } else {
      if constexpr (R == 1) _mm_store_ss(to, x[i]);
      if constexpr (R >= 2) _mm_storel_pi(reinterpret_cast<__m64*>(to), x[i]);
      if constexpr (R == 3) _mm_store_ss(to + 2, _mm_movehl_ps(x[i], x[i]));
    }
  }
}
#endif

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
