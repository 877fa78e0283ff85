// csrc/common/warp.cuh on the host: the 32 lanes of a warp are coroutines that meet in every shuffle and product. A lane that
// comes to another of them than the rest, or ends before the rest, aborts.
#pragma once

#include <immintrin.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

#define MMREC_DEVICE inline

namespace mmrec {
namespace warp {

struct Emulator {
  static constexpr int kLanes = 32, kStack = 1 << 18;
  struct Slot {
    int kind;
    unsigned char bytes[48];
  };

  ucontext_t main, context[kLanes];
  std::unique_ptr<char[]> stack{new char[kLanes * kStack]};
  bool done[kLanes];
  // Two sets in turn: a lane may be at the next meeting while others still read from this one.
  Slot slot[2][kLanes];
  int turn[kLanes];
  int current = 0;
  std::function<void()> body;

  static Emulator& here() {
    static Emulator emulator;
    return emulator;
  }
  static void enter() {
    Emulator& e = here();
    e.body();
    e.done[e.current] = true;
    swapcontext(&e.context[e.current], &e.main);
  }
  void run(std::function<void()> lanes) {
    body = std::move(lanes);
    for (int i = 0; i < kLanes; ++i) {
      done[i] = false;
      turn[i] = 0;
      getcontext(&context[i]);
      context[i].uc_stack.ss_sp = stack.get() + i * kStack;
      context[i].uc_stack.ss_size = kStack;
      context[i].uc_link = nullptr;
      makecontext(&context[i], &Emulator::enter, 0);
    }
    for (;;) {
      for (current = 0; current < kLanes; ++current) swapcontext(&main, &context[current]);
      for (int i = 1; i < kLanes; ++i) require(done[i] == done[0], "lanes end apart");
      if (done[0]) return;
      const Slot* met = slot[(turn[0] - 1) & 1];
      for (int i = 1; i < kLanes; ++i) require(met[i].kind == met[0].kind && turn[i] == turn[0], "lanes meet apart");
    }
  }
  static void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "emulated warp: %s\n", what);
    std::abort();
  }
  // Leaves `bytes` for the others and returns what all have left.
  const Slot* meet(int kind, const void* bytes, size_t size) {
    Slot* mine = slot[turn[current] & 1];
    mine[current].kind = kind;
    std::memcpy(mine[current].bytes, bytes, size);
    ++turn[current];
    swapcontext(&context[current], &main);
    return mine;
  }
};

inline float times(float a, float b) { return a * b; }
inline float plus(float a, float b) { return a + b; }
inline void read_once(const void* at, uint32_t (&word)[4]) { std::memcpy(word, at, 16); }

inline int ones(uint32_t word) { return __builtin_popcount(word); }
template <typename T>
T from_others(const T* at) { return *at; }

inline int lane() { return Emulator::here().current; }

template <typename T>
T from_lane(int kind, T x, int from) {
  const auto* met = Emulator::here().meet(kind, &x, sizeof(T));
  T found;
  std::memcpy(&found, met[from & 31].bytes, sizeof(T));
  return found;
}
template <typename T>
T shuffle(T x, int from) { return from_lane(1, x, from); }
template <typename T>
T shuffle_xor(T x, int mask) { return from_lane(2, x, lane() ^ mask); }
template <typename T>
T shuffle_up(T x, int by) { return from_lane(3, x, lane() >= by ? lane() - by : lane()); }

// The fragments of m16n8k16 as the PTX manual lays them out.
template <typename T>
void product(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto* met = Emulator::here().meet(4, words, sizeof(words));
  const auto element = [&](int owner, int word, int half) {
    uint32_t found;
    std::memcpy(&found, met[owner].bytes + 4 * word, 4);
    return half ? T::high(found) : T::low(found);
  };
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int quarter = k % 8 / 2, far = k / 8;
      sum += static_cast<double>(element(row % 8 * 4 + quarter, 2 * far + row / 8, k % 2)) *
             static_cast<double>(element(column * 4 + quarter, 4 + far, k % 2));
    }
    c[i] = static_cast<float>(sum);
  }
}

struct BFloat16 {
  static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { product<BFloat16>(c, a, b); }
  static uint32_t round(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (std::isnan(x)) return bits >> 16 | 0x40u;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  static float widen(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  static float low(uint32_t word) { return widen(word << 16); }
  static float high(uint32_t word) { return widen(word & 0xffff0000u); }
};

struct Float16 {
  static void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { product<Float16>(c, a, b); }
  static uint32_t pack(float low, float high) {
    return static_cast<uint32_t>(_cvtss_sh(low, 0)) | static_cast<uint32_t>(_cvtss_sh(high, 0)) << 16;
  }
  static float low(uint32_t word) { return _cvtsh_ss(static_cast<unsigned short>(word)); }
  static float high(uint32_t word) { return _cvtsh_ss(static_cast<unsigned short>(word >> 16)); }
};

inline float reciprocal_root(float x) { return 1.0f / std::sqrt(x); }

}  // namespace warp
}  // namespace mmrec
