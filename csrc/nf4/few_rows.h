// Rows of W from their bytes through registers into the products with a few tokens, the width in lanes.
#pragma once

#include "operands.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Where there are registers enough.
template <typename Kind>
#if defined(__AVX512F__)
constexpr bool kIsFused = sizeof(typename Kind::Dot::Sum) == 4;
#else
constexpr bool kIsFused = false;
#endif

// Tokens at a time.
template <typename Kind>
constexpr int64_t kPart = kHasPairs<Kind> ? 12 : 10;

#if defined(__AVX512F__)
// Asks for what the stream of W's bytes brings next. In the order of addresses: two rows at a time, as the products take them,
// is an order that the processor does not foresee.
constexpr int64_t kAhead = 4096;

// The fewest tokens of one adapter that share its rows of b: each is read once and meets their s · S in registers.
constexpr int64_t kSharing = 4;

// What the lanes' sums of some rows and tokens start from.
template <typename Kind>
struct Start {
  bool is_kept;         // what `sums` has, else
  int64_t rank;         // 0: 0; else the products of
  LoRAFactor b;         // the adapter's [row of W][rank]
  const float* lora_x;  // and [token][padded rank]
  int64_t padded;

  MMREC_INLINE F32 factor(int64_t n, int64_t j) const {
    const int64_t at = n * rank + j;
    return b.is_float32 ? load_part<float>(static_cast<const float*>(b.data) + at, rank - j)
                        : load_part<float>(static_cast<const typename Kind::Raw*>(b.data) + at, rank - j);
  }
};

// sums [R][M] vectors = what they start from + the products of R rows and M tokens, [group][token][column of the group].
template <typename Kind, int R, int M>
__attribute__((noinline)) void add_rows(const Weight& w, int64_t n, const Operand<Kind>* tokens, const Start<Kind>& start,
                                        float* sums) {
  using Step = typename Kind::Dot::Step;
  // A chain of multiply-adds alone would wait for itself.
  constexpr int kChains = M <= 3 ? 2 : 1;
  constexpr int64_t kVector = kGroupColumns / (kHasPairs<Kind> ? 4 : 8);
  const NF4Bytes& bytes = w.bytes;
  F32 acc[R][M][kChains];
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      for (int c = 0; c < kChains; ++c) acc[r][m][c] = broadcast(0.0f);
    }
  }
  if (start.is_kept) {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) acc[r][m][0] = load(sums + (r * M + m) * F32::kLanes);
    }
  }
  for (int64_t j = 0; M >= kSharing && j < start.rank; j += F32::kLanes) {
    F32 factor[R];
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) factor[r] = start.factor(n + r, j);
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const F32 x = load(start.lora_x + m * start.padded + j);
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) acc[r][m][0] = fma(factor[r], x, acc[r][m][0]);
    }
  }
  // A vector of columns of each row.
  const auto multiply = [&](const F32 (&columns)[R], const Operand<Kind>* x, int vector) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const F32 q = load(reinterpret_cast<const float*>(x + m * kGroupColumns + vector * kVector));
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) acc[r][m][vector % kChains] = Step::add(columns[r], q, acc[r][m][vector % kChains]);
    }
  };
  const int64_t whole = bytes.is_aligned() ? bytes.columns / kGroupColumns * kGroupColumns : 0;
  const uint8_t* const ahead = bytes.packed + n * bytes.columns / 2 + kAhead;
  int64_t k = 0;
  for (; k < whole; k += kGroupColumns) {
    const Operand<Kind>* const x = tokens + k * M;
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) __builtin_prefetch(ahead + (k / 2) * R + r * 64, 0, 3);
    if constexpr (kHasPairs<Kind>) {
#if defined(__AVX512BF16__)
      PairGroup group[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) group[r] = pair_group(w, n + r, k);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        F32 columns[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) columns[r] = {_mm512_castsi512_ps(group[r].columns[c])};
        multiply(columns, x, c);
      }
#endif
    } else {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512 values[R];
        const uint8_t* from[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) {
          const int64_t flat = (n + r) * bytes.columns + k + 64 * half;
          values[r] = BlockTable<kRounds<Kind>>(w.absmax_of(flat)).values;
          from[r] = bytes.packed + flat / 2;
        }
#pragma GCC unroll 2
        for (int quarter = 0; quarter < 2; ++quarter) {
          F32 found[R][2];
#pragma GCC unroll 2
          for (int r = 0; r < R; ++r) BlockTable<kRounds<Kind>>(values[r]).decode32(from[r] + 16 * quarter, found[r]);
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            F32 columns[R];
#pragma GCC unroll 2
            for (int r = 0; r < R; ++r) columns[r] = found[r][v];
            multiply(columns, x, 4 * half + 2 * quarter + v);
          }
        }
      }
    }
  }
  for (; k < bytes.columns; k += kGroupColumns) {
    alignas(64) Operand<Kind> decoded[R][kGroupColumns];
    for (int r = 0; r < R; ++r) decode_operands<Kind>(w, n + r, k, decoded[r]);
#pragma GCC unroll 8
    for (int v = 0; v < kGroupColumns / kVector; ++v) {
      F32 columns[R];
      for (int r = 0; r < R; ++r) columns[r] = load(reinterpret_cast<const float*>(decoded[r] + v * kVector));
      multiply(columns, tokens + k * M, v);
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      store(sums + (r * M + m) * F32::kLanes, kChains == 2 ? add(acc[r][m][0], acc[r][m][kChains - 1]) : acc[r][m][0]);
    }
  }
}
#endif

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
