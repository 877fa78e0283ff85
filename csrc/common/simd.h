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
MMREC_INLINE F32 broadcast(float a) { return {_mm512_set1_ps(a)}; }
MMREC_INLINE F64 broadcast(double a) { return {_mm512_set1_pd(a)}; }
MMREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
MMREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
MMREC_INLINE F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
MMREC_INLINE F64 mul(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
MMREC_INLINE F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
MMREC_INLINE F64 add(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
// Bit i: a[i] > b[i]; false where either is NaN.
MMREC_INLINE uint32_t greater(F32 a, F32 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
MMREC_INLINE uint32_t greater(F64 a, F64 b) { return _mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ); }

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
MMREC_INLINE F32 broadcast(float a) { return {_mm256_set1_ps(a)}; }
MMREC_INLINE F64 broadcast(double a) { return {_mm256_set1_pd(a)}; }
MMREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
MMREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
MMREC_INLINE F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
MMREC_INLINE F64 mul(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
MMREC_INLINE F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
MMREC_INLINE F64 add(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
MMREC_INLINE uint32_t greater(F32 a, F32 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
MMREC_INLINE uint32_t greater(F64 a, F64 b) {
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)));
}

#else

// The compiler lowers these to SSE2, NEON or scalar code.
typedef float Float4 __attribute__((vector_size(16)));
typedef double Double2 __attribute__((vector_size(16)));
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
MMREC_INLINE F32 broadcast(float a) { return {Float4{a, a, a, a}}; }
MMREC_INLINE F64 broadcast(double a) { return {Double2{a, a}}; }
MMREC_INLINE F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
MMREC_INLINE F64 fma(F64 a, F64 b, F64 c) { return {a.v * b.v + c.v}; }
MMREC_INLINE F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
MMREC_INLINE F64 mul(F64 a, F64 b) { return {a.v * b.v}; }
MMREC_INLINE F32 add(F32 a, F32 b) { return {a.v + b.v}; }
MMREC_INLINE F64 add(F64 a, F64 b) { return {a.v + b.v}; }
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

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
