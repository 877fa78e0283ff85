// `_multiply(any, loops, pairs) -> flops`: multiply-adds in the registers of every thread.

#include "peak.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>

namespace mmrec {
namespace {

int64_t multiply(const torch::stable::Tensor&, int64_t loops, bool pairs) {
  using Peak = int64_t (*)(int64_t, bool, float*);
  static constexpr Peak kPeak[] = MMREC_ISA_TABLE(peak_flops);
  const Peak peak = kPeak[static_cast<int>(cpu_isa())];
  std::atomic<int64_t> flops{0};
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t begin, int64_t end) {
    alignas(64) float sink[kPeakSink] = {};
    for (int64_t i = begin; i < end; ++i) flops += peak(loops, pairs, sink);
  });
  return flops;
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_multiply", TORCH_BOX(&mmrec::multiply)); }
