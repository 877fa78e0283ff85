// Operands for the products of gemm.h, from rows of a row-major matrix.
//
// pack_lanes: rows become lanes, [depth][lanes], for A's groups (kGroup lanes) and for B = rowsᵀ (kPanel lanes).
// pack_rows: columns stay lanes, [panel][row][kPanel], for B = rows; with pairs, two rows share a word.
#pragma once

#include "gemm.h"
#include "transpose.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

constexpr int64_t words_of(int64_t columns, int64_t per_word) { return (columns + per_word - 1) / per_word; }

MMREC_INLINE float pair(uint32_t low, uint32_t high) {
  const uint32_t bits = low | high << 16;
  float word;
  std::memcpy(&word, &bits, sizeof(word));
  return word;
}

#if defined(__AVX2__)
// The words of up to kLanes rows, transposed in registers. A store writes a whole vector: where `lanes` is less than that, the
// words behind it are overwritten, and written again when their turn comes.
template <typename Dot, typename Raw>
void transpose_lanes(const Raw* rows, int64_t stride, int64_t count, int64_t width, int64_t lanes, float* out) {
  constexpr int kLanes = F32::kLanes;
  const int64_t bytes = width * static_cast<int64_t>(sizeof(Raw)), depth = words_of(width, Dot::kColumns);
  const auto put = [&](int64_t k, F32 word) __attribute__((always_inline)) {
    if (k + 1 < depth) {
      store(out + k * lanes, word);
    } else if (k < depth) {
      float copy[kLanes];
      store(copy, word);
      std::memcpy(out + k * lanes, copy, sizeof(float) * static_cast<size_t>(lanes < kLanes ? lanes : kLanes));
    }
  };
  for (int64_t offset = 0; offset < bytes; offset += kLanes * 4) {
    Word block[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const char* row = reinterpret_cast<const char*>(rows + i * stride) + offset;
      block[i] = bytes - offset >= kLanes * 4 ? load_words(row) : load_words(row, bytes - offset);
    }
    transpose_words(block);
    for (int w = 0; w < kLanes; ++w) {
      const int64_t word = offset / 4 + w;
      if constexpr (sizeof(Raw) == 2 && Dot::kColumns == 1) {
        put(2 * word, bf16_low(block[w]));
        put(2 * word + 1, bf16_high(block[w]));
      } else {
        put(word, as_float(block[w]));
      }
    }
  }
}
#endif

// `count` rows to out[depth][lanes]; missing rows are zero. `lanes` is less than a vector or a multiple of it.
template <typename Dot, typename Raw>
void pack_lanes(const Raw* rows, int64_t stride, int64_t count, int64_t width, int64_t lanes, typename Dot::Word* out) {
#if defined(__AVX2__)
  if constexpr (sizeof(typename Dot::Word) == 4) {
    constexpr int64_t kLanes = F32::kLanes;
    for (int64_t first = 0; first < lanes; first += kLanes) {
      const int64_t left = count - first < 0 ? 0 : count - first;
      transpose_lanes<Dot>(rows + first * stride, stride, left < kLanes ? left : kLanes, width, lanes, out + first);
    }
    return;
  }
#endif
  // Pairs come with an ISA that has the path above.
  for (int64_t k = 0; k < width; ++k) {
    for (int64_t i = 0; i < lanes; ++i) out[k * lanes + i] = i < count ? widen(rows[i * stride + k]) : typename Dot::Word(0);
  }
}

// The rows [begin, end) of a matrix to their places in out[panel][row or pair of rows][kPanel]; panels are `panel_words`
// apart. Rows that are not `alive` (where it is given), and columns behind the width, are zero. With pairs `begin` is even,
// and a missing partner of the last row is zero.
template <typename Dot, typename Raw>
void pack_rows(const Raw* matrix, int64_t stride, int64_t begin, int64_t end, int64_t width, const uint8_t* alive,
               int64_t panel_words, typename Dot::Word* out) {
  using Word = typename Dot::Word;
  constexpr int64_t kColumns = kPanel<Dot>;
  const auto used = [&](int64_t row) { return row < end && (alive == nullptr || alive[row] != 0); };
  for (int64_t row = begin; row < end; row += Dot::kColumns) {
    const Raw* const first = matrix + row * stride;
    for (int64_t column = 0; column < width; column += kColumns) {
      Word* const to = out + column / kColumns * panel_words + row / Dot::kColumns * kColumns;
      const int64_t here = width - column < kColumns ? width - column : kColumns;
      if (here < kColumns || !used(row)) std::memset(to, 0, sizeof(Word) * kColumns);
      if constexpr (Dot::kColumns == 2) {
        const bool has_first = used(row), has_second = used(row + 1);
        for (int64_t d = column; d < column + here; ++d) {
          to[d - column] = pair(has_first ? first[d].bits : 0, has_second ? first[stride + d].bits : 0);
        }
      } else if (used(row)) {
        for (int64_t d = column; d < column + here; ++d) to[d - column] = widen(first[d]);
      }
    }
  }
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
