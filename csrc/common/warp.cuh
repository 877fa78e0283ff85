// What a kernel that gives a warp its own problem is written in: shuffles, m16n8k16 products of 16-bit elements with float32
// sums, vector loads. Outside nvcc the same names come from tests/emulated_warp.h, which runs 32 lanes on the host, so that
// such a kernel is tested where there is no GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define MMREC_DEVICE __device__ __forceinline__

namespace mmrec {
namespace warp {

constexpr unsigned kAll = 0xffffffffu;

MMREC_DEVICE float reciprocal_root(float x) { return rsqrtf(x); }

// Rounded each, where a compiler would make one multiply-add of both.
MMREC_DEVICE float times(float a, float b) { return __fmul_rn(a, b); }
MMREC_DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }

MMREC_DEVICE int ones(uint32_t word) { return __popc(word); }
// What other blocks of this launch have written: past the first level of cache.
template <typename T>
MMREC_DEVICE T from_others(const T* at) { return __ldcg(at); }

// 16 bytes that nobody writes meanwhile and this multiprocessor needs once: they take no room in the first level of cache.
MMREC_DEVICE void read_once(const void* at, uint32_t (&word)[4]) {
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
      : "l"(at));
}

MMREC_DEVICE int lane() { return static_cast<int>(threadIdx.x & 31); }
template <typename T>
MMREC_DEVICE T shuffle(T x, int from) { return __shfl_sync(kAll, x, from); }
template <typename T>
MMREC_DEVICE T shuffle_xor(T x, int mask) { return __shfl_xor_sync(kAll, x, mask); }
template <typename T>
MMREC_DEVICE T shuffle_up(T x, int by) { return __shfl_up_sync(kAll, x, static_cast<unsigned>(by)); }

// c[16, 8] += a[16, 16] b[16, 8]. With g = lane / 4 and t = 2 (lane % 4) a lane has of a (g, t), (g + 8, t), (g, t + 8) and
// (g + 8, t + 8), of b (t, g) and (t + 8, g), each with its neighbour along the 16 in one word, and of c (g, t), (g, t + 1),
// (g + 8, t), (g + 8, t + 1).
struct BFloat16 {
  static MMREC_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static MMREC_DEVICE uint32_t pack(float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  static MMREC_DEVICE float low(uint32_t word) { return __uint_as_float(word << 16); }
  static MMREC_DEVICE float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
};

struct Float16 {
  static MMREC_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  static MMREC_DEVICE uint32_t pack(float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&both);
  }
  static MMREC_DEVICE float low(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  }
  static MMREC_DEVICE float high(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
};

}  // namespace warp
}  // namespace mmrec

#else
#include "emulated_warp.h"
#endif

namespace mmrec {
namespace warp {

// N words of memory that is aligned to all of them.
template <int N>
struct alignas(4 * N) Words {
  uint32_t word[N];
};

// The low (high) halves of two words in one.
MMREC_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
MMREC_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

// Over the four lanes that hold a row of c.
MMREC_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}
MMREC_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

}  // namespace warp
}  // namespace mmrec
