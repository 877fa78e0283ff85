// Scratch memory of a task, handed out piece by piece.
#pragma once

#include "kind.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

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
#if defined(__SANITIZE_ADDRESS__)
    keep_apart(taken, count * static_cast<int64_t>(sizeof(X)));
#endif
    return taken;
  }

#if defined(__SANITIZE_ADDRESS__)
  // What lies between two pieces may not be touched, so that the sanitizer sees who leaves a piece.
  void keep_apart(void* piece, int64_t bytes) {
    constexpr int64_t kGap = 64;
    if (piece != nullptr) {
      ASAN_UNPOISON_MEMORY_REGION(piece, bytes);
      ASAN_POISON_MEMORY_REGION(static_cast<char*>(piece) + bytes, memory + used + kGap - (static_cast<char*>(piece) + bytes));
    }
    used += kGap;
  }
#endif
};

// What a Worker<Kind, T> for the elements of `given` takes of an arena.
template <template <typename, typename> class Worker, typename T, typename Given>
int64_t scratch_bytes_of(const Given& given) {
  int64_t bytes = 0;
  with_kind<T>(given.element, [&](auto kind) {
    Arena arena{nullptr};
    Worker<decltype(kind), T>(given, arena);
    bytes = arena.used;
  });
  return bytes;
}

// Runs one in that much scratch memory.
template <template <typename, typename> class Worker, typename T, typename Given, typename... Arguments>
void run_worker(const Given& given, char* scratch, Arguments... arguments) {
  with_kind<T>(given.element, [&](auto kind) {
    Arena arena{scratch};
    Worker<decltype(kind), T>(given, arena).run(arguments...);
  });
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
