// The NF4 linear for up to 64 tokens of 16-bit elements on NVIDIA GPUs: y = x Wᵀ + s (x aᵀ) bᵀ + bias.
//
// A block owns 16 or 32 rows of W and all tokens; its eight warps share the columns, 128 at a time in turn, and what they
// have summed up is added in the order of the warps. W is the left operand of m16n8k16 and is decoded where the product takes it:
// a lane reads 16 stored bytes of a row, 32 columns, and they are its part of eight products, in which x is read the same way: the
// 16 along which a product adds up may be taken in any order. A byte's two codes are one read of a table in shared memory, of
// which there are 16 copies, so that no two lanes want one bank; they are multiplied by their block's absmax and rounded to the
// dtype of x. A nested absmax is made where it is used. So W is decoded once, exactly, and never written.
//
// x aᵀ is a launch of its own before it (SmallLowRank), in float32; the product with b starts from it when x Wᵀ is done, which is
// all that waits for it (programmatic dependent launch).
//
// Per weight: half a byte and its share of an absmax; half a read of 8 bytes of shared memory, one multiplication, half a
// conversion and the product. x is read once by each block. What a row of y holds does not depend on how many rows of W a block
// has, and that of a token not on the adapters of others.
//
// The kernels are a few phases with barriers between; within a phase only the lanes of a warp speak to each other. So the phases
// also run on the host (tests/emulated_warp.h).
#pragma once

#include "../common/elements.cuh"

namespace mmrec {

constexpr int kSmallLinearTokens = 64;

struct SmallLinearParams {
  const char* x;                                        // [M, K], 16-bit
  const uint8_t* packed;                                // [N · K / 2]
  const char* absmax;                                   // of each block: float32, or uint8 where nested
  const float *nested_absmax, *nested_code, *offset;    // or null
  const char *bias, *a, *b;                             // [N], [A, r, K], [A, N, r], or null
  const float* scalings;                                // [A], or null: scaling
  const int64_t* ids;                                   // [M], or null: all take adapter 0
  float* low;                                           // [M, r]: x aᵀ
  char* y;                                              // [M, N]
  int tokens, width, rows, rank, adapters, block_shift;  // M, K, N, r, A, log2 of the block size
  int bias_wide, adapters_wide;                          // float32, not of the dtype of x
  int rank_aligned;                                      // 8 of r at a time, at addresses that 16 divides
  float scaling;

  // The adapter of a token, −1 for none.
  MMREC_DEVICE int adapter(int token) const {
    if (token >= tokens) return -1;
    if (ids == nullptr) return 0;
    const int64_t id = ids[token];
    return id >= 0 && id < adapters ? static_cast<int>(id) : -1;
  }
};

constexpr int kSmallLinearWarps = 8, kSmallLinearThreads = 32 * kSmallLinearWarps;

// low[8 tokens, 1 of r], by one block. T: element type of x.
template <typename T>
struct SmallLowRank {
  static constexpr int kTokens = 8, kNone = 1 << 30;

  struct Shared {
    float part[kSmallLinearWarps][kTokens];
  };

  const SmallLinearParams& p;
  Shared& s;
  const int rank, first, thread;  // of r, of the tokens

  // Phase 1, by warps: each its share of the columns. An adapter's row is read once for the tokens that take it.
  MMREC_DEVICE void multiply() {
    int adapter[kTokens];
    for (int j = 0; j < kTokens; ++j) adapter[j] = p.adapter(first + j);
    float sums[kTokens] = {};
    for (int e = after(adapter, -1); e != kNone; e = after(adapter, e)) {
      const int64_t row = (static_cast<int64_t>(e) * p.rank + rank) * p.width;
      for (int k = thread * 8; k < p.width; k += kSmallLinearThreads * 8) {
        float a[8];
        p.adapters_wide != 0 ? elements::Float32::eight(p.a + (row + k) * 4, a)
                             : elements::Narrow<T>::eight(p.a + (row + k) * 2, a);
#pragma unroll
        for (int j = 0; j < kTokens; ++j) {
          if (adapter[j] != e) continue;
          float x[8];
          elements::Narrow<T>::eight(p.x + (static_cast<int64_t>(first + j) * p.width + k) * 2, x);
          for (int i = 0; i < 8; ++i) sums[j] = fmaf(a[i], x[i], sums[j]);
        }
      }
    }
    for (int j = 0; j < kTokens; ++j) {
      for (int mask = 1; mask < 32; mask *= 2) sums[j] += warp::shuffle_xor(sums[j], mask);
      if (thread % 32 == 0) s.part[thread / 32][j] = sums[j];
    }
  }

  static MMREC_DEVICE int after(const int (&adapter)[kTokens], int e) {
    int next = kNone;
    for (int j = 0; j < kTokens; ++j) next = adapter[j] > e && adapter[j] < next ? adapter[j] : next;
    return next;
  }

  // Phase 2, by threads.
  MMREC_DEVICE void finish() {
    if (thread >= kTokens || first + thread >= p.tokens) return;
    float sum = 0;
    for (int w = 0; w < kSmallLinearWarps; ++w) sum += s.part[w][thread];
    p.low[static_cast<int64_t>(first + thread) * p.rank + rank] = sum;
  }
};

// T: element type of x. kR: 16 rows of W, kT: eight tokens, so many of each to a block.
template <typename T, int kR, int kT>
struct SmallLinear {
  static constexpr int kRows = 16 * kR, kTokens = 8 * kT, kCopies = 16, kColumns = 128;
  static constexpr int kStride = kRows + 4;  // lanes of a warp write to banks of their own

  struct alignas(8) Codes {
    float high, low;  // of element 2i and 2i + 1
  };
  union Shared {
    Codes table[256][kCopies];
    float part[kSmallLinearWarps][kTokens][kStride];
  };

  const SmallLinearParams& p;
  Shared& s;
  const int first, thread;  // the first row of W

  // Phase 1, by threads: the codes of each byte.
  MMREC_DEVICE void fill() {
    constexpr float kCodes[16] = {
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
        -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
        0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
    const int high = thread >> 4, low = thread & 15;
    Codes both{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      both.high = high == i ? kCodes[i] : both.high;
      both.low = low == i ? kCodes[i] : both.low;
    }
    for (int i = 0; i < kCopies; ++i) s.table[thread][(thread + i) % kCopies] = both;
  }

  // What a lane reads of W for 128 columns: of rows g and g + 8 of each 16.
  struct Bytes {
    uint32_t word[kR][2][4];
    float scale[kR][2];
  };

  MMREC_DEVICE void load(int k, Bytes& bytes) const {
    const int g = (thread & 31) >> 2;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = first + 16 * r + 8 * half + g;
        for (int i = 0; i < 4; ++i) bytes.word[r][half][i] = 0;
        bytes.scale[r][half] = 0.0f;
        if (row >= p.rows || k >= p.width) continue;
        const int64_t at = static_cast<int64_t>(row) * p.width + k;
        warp::read_once(p.packed + at / 2, bytes.word[r][half]);
        bytes.scale[r][half] = absmax(at >> p.block_shift);
      }
    }
  }

  MMREC_DEVICE float absmax(int64_t block) const {
    if (p.nested_absmax == nullptr) return reinterpret_cast<const float*>(p.absmax)[block];
    const int code = reinterpret_cast<const uint8_t*>(p.absmax)[block];
    return warp::plus(warp::times(p.nested_code[code], p.nested_absmax[block >> 8]), *p.offset);
  }

  MMREC_DEVICE uint32_t decoded(uint32_t word, int byte, float scale) const {
    const Codes codes = s.table[word >> 8 * byte & 0xff][thread % kCopies];
    return T::pack(warp::times(codes.high, scale), warp::times(codes.low, scale));
  }

  // Phase 2, by warps: x Wᵀ over the warp's columns; what comes of it takes the place of the table in phase 3.
  MMREC_DEVICE void multiply(float (&acc)[kR][kT][4]) const {
    const int g = (thread & 31) >> 2, t = thread & 3;
    int k = thread / 32 * kColumns + 32 * t;
    Bytes now, next;
    load(k, now);
    for (int begin = thread / 32 * kColumns; begin < p.width; begin += kSmallLinearWarps * kColumns) {
      const int following = k + kSmallLinearWarps * kColumns;
      load(following, next);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        warp::Words<4> x[kT];
#pragma unroll
        for (int j = 0; j < kT; ++j) {
          x[j] = {};
          const int token = 8 * j + g;
          if (token >= p.tokens || k >= p.width) continue;
          x[j] = *reinterpret_cast<const warp::Words<4>*>(p.x + (static_cast<int64_t>(token) * p.width + k + 8 * c) * 2);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int r = 0; r < kR; ++r) {
            uint32_t w[4];
            for (int i = 0; i < 4; ++i) w[i] = decoded(now.word[r][i % 2][c], 2 * half + i / 2, now.scale[r][i % 2]);
#pragma unroll
            for (int j = 0; j < kT; ++j) {
              const uint32_t pairs[2] = {x[j].word[2 * half], x[j].word[2 * half + 1]};
              T::mma(acc[r][j], w, pairs);
            }
          }
        }
      }
      now = next;
      k = following;
    }
  }

  // Phase 3, by threads.
  MMREC_DEVICE void keep(const float (&acc)[kR][kT][4]) {
    const int g = (thread & 31) >> 2, t = thread & 3;
#pragma unroll
    for (int r = 0; r < kR; ++r) {
#pragma unroll
      for (int j = 0; j < kT; ++j) {
        for (int i = 0; i < 4; ++i) s.part[thread / 32][8 * j + 2 * t + i % 2][16 * r + 8 * (i / 2) + g] = acc[r][j][i];
      }
    }
  }

  // Phase 4, by threads: a row of W and every kApart-th token to each.
  MMREC_DEVICE void finish() const {
    constexpr int kApart = kSmallLinearThreads / kRows, kEach = kTokens > kApart ? kTokens / kApart : 1;
    const int row = thread % kRows, n = first + row;
    if (n >= p.rows || thread / kRows >= kTokens) return;
    float sum[kEach], change[kEach] = {};
    int adapter[kEach];
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int token = thread / kRows + kApart * j;
      sum[j] = 0.0f;
      for (int w = 0; w < kSmallLinearWarps; ++w) sum[j] += s.part[w][token][row];
      adapter[j] = p.low == nullptr ? -1 : p.adapter(token);
    }
    for (int r = 0; p.low != nullptr && r < p.rank; r += 8) {
      int held = -1;
      float b[8], low[8];
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (adapter[j] < 0) continue;
        const auto eight = [&](auto type, const void* data, int64_t line, float (&out)[8]) {
          using E = decltype(type);
          elements::load_eight<E>(static_cast<const char*>(data) + line * p.rank * E::kBytes, r, p.rank, p.rank_aligned != 0, out);
        };
        if (adapter[j] != held) {
          held = adapter[j];
          const int64_t line = static_cast<int64_t>(held) * p.rows + n;
          p.adapters_wide != 0 ? eight(elements::Float32{}, p.b, line, b) : eight(elements::Narrow<T>{}, p.b, line, b);
        }
        eight(elements::Float32{}, p.low, thread / kRows + kApart * j, low);
        for (int i = 0; i < 8; ++i) change[j] = fmaf(b[i], low[i], change[j]);
      }
    }
    float bias = 0.0f;
    if (p.bias != nullptr) {
      bias = p.bias_wide != 0 ? elements::Float32::one(p.bias + 4 * n) : elements::Narrow<T>::one(p.bias + 2 * n);
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int token = thread / kRows + kApart * j;
      if (token >= p.tokens) continue;
      if (adapter[j] >= 0) sum[j] = fmaf(p.scalings != nullptr ? p.scalings[adapter[j]] : p.scaling, change[j], sum[j]);
      const uint32_t rounded = T::pack(sum[j] + bias, 0.0f);
      reinterpret_cast<uint16_t*>(p.y)[static_cast<int64_t>(token) * p.rows + n] = static_cast<uint16_t>(rounded);
    }
  }
};

}  // namespace mmrec
