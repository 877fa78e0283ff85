#pragma once

#include <cstdint>

#include "isa.h"

namespace mmrec {

constexpr int kPeakSink = 32;

// Multiplies and adds in registers, and returns the floating-point operations done: in float32, or, with `pairs`, on pairs of
// bfloat16 (0 where the ISA has no such instruction). `sink` has kPeakSink floats; they are read and written.
#define MMREC_DECLARE(isa)                                       \
  namespace isa {                                                \
  int64_t peak_flops(int64_t loops, bool pairs, float* sink);    \
  }
MMREC_FOR_EACH_ISA(MMREC_DECLARE)
#undef MMREC_DECLARE

}  // namespace mmrec
