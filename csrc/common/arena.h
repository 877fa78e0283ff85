// Scratch memory of a task, handed out piece by piece.
#pragma once

#include "kind.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Hands out a piece of memory bit by bit; without memory it only counts.
struct Arena {
  char* memory;
  int64_t used = 0;

  template <typename X>
  X* take(int64_t count) {
    X* const taken = memory == nullptr ? nullptr : reinterpret_cast<X*>(memory + used);
    used += round_up(count * static_cast<int64_t>(sizeof(X)), 64);
    return taken;
  }
};

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
