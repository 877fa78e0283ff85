// Multiply-adds that touch no memory: how fast this CPU can multiply, for the roofline of the benchmarks.

#include "peak.h"
#include "simd.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Enough independent sums to hide the latency of two units, and they fit the registers of every ISA.
constexpr int kSums = 12;

template <typename Step>
int64_t run(int64_t loops, int64_t flops_per_step, float* sink, const Step& step) {
  F32 sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = broadcast(static_cast<float>(i));
  for (int64_t n = 0; n < loops; ++n) {
    for (int i = 0; i < kSums; ++i) sums[i] = step(sums[i]);
  }
  for (int i = 1; i < kSums; ++i) sums[0] = add(sums[0], sums[i]);
  store(sink, sums[0]);
  return loops * kSums * flops_per_step;
}

}  // namespace

int64_t peak_flops(int64_t loops, bool pairs, float* sink) {
  const F32 x = load(sink), y = load(sink + kPeakSink / 2);
  if (pairs) {
#if defined(__AVX512BF16__)
    return run(loops, 4 * F32::kLanes, sink, [&](F32 sum) __attribute__((always_inline)) {
      return F32{_mm512_dpbf16_ps(sum.v, (__m512bh)x.v, (__m512bh)y.v)};
    });
#else
    return 0;
#endif
  }
  return run(loops, 2 * F32::kLanes, sink, [&](F32 sum) __attribute__((always_inline)) { return fma(sum, x, y); });
}

}  // namespace MMREC_ISA
}  // namespace mmrec
