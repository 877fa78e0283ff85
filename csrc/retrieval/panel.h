// Panels: kPanelRows item rows at a time, their columns in the lanes of the vectors.
//
// On x86 rows are read in blocks of kLanes rows x kLanes 32-bit words, transposed in registers; a word holds one float32,
// two bfloat16 or four int8.
#pragma once

#include "../common/simd.h"
#include "../common/step.h"
#include "../common/transpose.h"
#include "topk_kernel.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Accumulators: kQueryGroup x kVectors, plus kVectors for the panel row and one for the query, must fit the registers.
#if defined(__AVX512F__)
constexpr int kVectors = 4;
#else
constexpr int kVectors = 2;
#endif

template <typename T>
constexpr int kPanelRows = kVectors * Vec<T>::kLanes;

template <typename T>
struct Panel {
  int64_t first;                    // position of the first row
  int count;                        // rows in use; those past the end repeat the last one and are never used
  const char* rows[kPanelRows<T>];
  T scale[kPanelRows<T>];           // per row, where the scan has scales
  T bias[kPanelRows<T>];
  T* values;                        // [steps][kPanelRows]
};

constexpr int64_t item_bytes(ItemType type) {
  switch (type) {
    case ItemType::kFloat64:
      return 8;
    case ItemType::kFloat32:
      return 4;
    case ItemType::kInt8:
      return 1;
    default:
      return 2;
  }
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
void find_rows(const TopkScan<T>& scan, int64_t first, Panel<T>& panel) {
  constexpr int kRows = kPanelRows<T>;
  const int64_t left = scan.end - first;
  panel.first = first;
  panel.count = left < kRows ? static_cast<int>(left) : kRows;
  const int64_t step = scan.row_stride * item_bytes(scan.item_type);
  const char* items = static_cast<const char*>(scan.items);
  if (scan.ids == nullptr && panel.count == kRows) {
    for (int i = 0; i < kRows; ++i) panel.rows[i] = items + (first + i) * step;
    if (scan.scales != nullptr) {
      for (int i = 0; i < kRows; ++i) panel.scale[i] = static_cast<T>(scan.scales[first + i]);
    }
    if (scan.bias != nullptr) std::memcpy(panel.bias, scan.bias + first, sizeof(panel.bias));
    return;
  }
  for (int i = 0; i < kRows; ++i) {
    const int64_t position = first + (i < panel.count ? i : panel.count - 1);
    const int64_t row = scan.ids != nullptr ? scan.ids[position] : position;
    panel.rows[i] = items + row * step;
    if (scan.scales != nullptr) panel.scale[i] = static_cast<T>(scan.scales[row]);
    if (scan.bias != nullptr) panel.bias[i] = scan.bias[row];
  }
}

// The panel after one, of which every step of every group of queries asks for some lines: memory is read while sums are taken, and
// a panel lies in L1 when it is packed. Rows of a list of ids are not asked for.
struct NextPanel {
  static constexpr int64_t kLine = 64;
  const char* row;
  int64_t offset, length;  // of what is asked for next, and of a row; rows that lie end to end are one
  int64_t distance;        // from row to row
  int64_t lines;           // per step

  template <typename T>
  static NextPanel after(const TopkScan<T>& scan, const Panel<T>& panel, int64_t steps) {
    const int64_t asks = divide_up(scan.num_queries, kQueryGroup) * steps;
    if (scan.ids != nullptr || asks == 0) return {nullptr, 0, 0, 0, 0};
    const int64_t bytes = scan.width * item_bytes(scan.item_type), distance = scan.row_stride * item_bytes(scan.item_type);
    const char* const row = panel.rows[0] + kPanelRows<T> * distance;
    if (distance == bytes) return {row, 0, kPanelRows<T> * bytes, 0, divide_up(kPanelRows<T> * bytes, kLine * asks)};
    return {row, 0, bytes, distance, divide_up(kPanelRows<T> * divide_up(bytes, kLine), asks)};
  }
  MMREC_INLINE void ask() {
    for (int64_t i = 0; i < lines; ++i) {
      __builtin_prefetch(row + offset);
      offset += kLine;
      if (offset < length) continue;
      offset = 0;
      row += distance;
    }
  }
};

#if defined(__AVX2__)
template <typename Bits>
MMREC_INLINE Bits largest(Word words) {
  Bits all[sizeof(words) / sizeof(Bits)], most = 0;
  std::memcpy(all, &words, sizeof(all));
  for (const Bits one : all) most = one > most ? one : most;
  return most;
}

// What a word of a row is to the scan: kPerWord columns, each multiplied as `Step` says. `larger` and `size` find the largest
// |x|: their bits are in the same order as integers, with NaN above all.
template <ItemType type>
struct Columns;
template <>
struct Columns<ItemType::kFloat32> {
  using Step = Multiply;
  static constexpr int kPerWord = 1;
  MMREC_INLINE static void widen(Word word, F32* out) { out[0] = as_float(word); }
  MMREC_INLINE static Word larger(Word word, Word most) {
    return larger_words(both(word, every_word(0x7fffffff)), most);
  }
  MMREC_INLINE static float size(Word most) {
    const uint32_t bits = largest<uint32_t>(most);
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};
struct BFloat16Sizes {
  MMREC_INLINE static Word larger(Word word, Word most) {
    return larger_halves(both(word, every_word(0x7fff7fff)), most);
  }
  MMREC_INLINE static float size(Word most) { return mmrec::MMREC_ISA::widen(BFloat16{largest<uint16_t>(most)}); }
};
template <>
struct Columns<ItemType::kBFloat16> : BFloat16Sizes {
  using Step = Multiply;
  static constexpr int kPerWord = 2;
  MMREC_INLINE static void widen(Word word, F32* out) {
    out[0] = bf16_low(word);
    out[1] = bf16_high(word);
  }
};
template <>
struct Columns<ItemType::kInt8> {
  using Step = Multiply;
  static constexpr int kPerWord = 4;
  MMREC_INLINE static void widen(Word word, F32* out) { int8_columns(word, out); }
  MMREC_INLINE static Word larger(Word, Word most) { return most; }
  MMREC_INLINE static float size(Word) { return 128; }
};
#if defined(__AVX512BF16__)
template <>
struct Columns<ItemType::kBFloat16Pairs> : BFloat16Sizes {
  using Step = MultiplyPairs;
  static constexpr int kPerWord = 1;
  MMREC_INLINE static void widen(Word word, F32* out) { out[0] = as_float(word); }
};
#endif

// Brings kLanes rows of a panel into L1 in the order of their addresses, before blocks are read of them that hop from row to row.
// One load that steps from line to line is what hardware prefetching follows; the same loads unrolled are not (on a Zen 4,
// where it was measured), and software prefetches do not set it off.
MMREC_INLINE void touch(const Panel<float>& panel, int first, int64_t bytes) {
  constexpr int kLanes = F32::kLanes;
  const bool end_to_end = panel.rows[first + kLanes - 1] - panel.rows[first] == (kLanes - 1) * bytes;
  const int64_t length = ((end_to_end ? kLanes * bytes : bytes) + 63) / 64 * 64;
  for (int i = 0; i < (end_to_end ? 1 : kLanes); ++i) {
    const volatile char* const end = panel.rows[first + i] + length;
#pragma GCC unroll 1
    for (int64_t offset = -length; offset < 0; offset += 64) static_cast<void>(end[offset]);
  }
}

// The last block of rows whose length is no multiple of a vector: what is missing is zero. Not inlined: beside it the compiler
// makes a slower loop of the whole blocks.
__attribute__((noinline)) void load_last_block(const char* const* rows, int64_t offset, int64_t bytes, Word* block) {
  for (int i = 0; i < F32::kLanes; ++i) block[i] = load_words(rows[i] + offset, bytes - offset);
}

// kLanes words from byte `offset` on of kLanes rows, transposed. Rows end after `bytes`; what is missing is zero.
MMREC_INLINE void load_block(const char* const* rows, int64_t offset, int64_t bytes, Word* block) {
  constexpr int kLanes = F32::kLanes;
  if (offset + kLanes * 4 <= bytes) {
    for (int i = 0; i < kLanes; ++i) block[i] = load_words(rows[i] + offset);
  } else {
    load_last_block(rows, offset, bytes, block);
  }
  transpose_words(block);
}

template <ItemType type>
void pack_panel(const TopkScan<float>& scan, const Panel<float>& panel) {
  constexpr int kLanes = F32::kLanes;
  constexpr int kPerWord = Columns<type>::kPerWord;
  const int64_t bytes = scan.width * item_bytes(type);
  for (int64_t word = 0; word * 4 < bytes; word += kLanes) {
    for (int first = 0; first < kPanelRows<float>; first += kLanes) {
      Word block[kLanes];
      load_block(panel.rows + first, word * 4, bytes, block);
      for (int w = 0; w < kLanes; ++w) {
        F32 columns[kPerWord];
        Columns<type>::widen(block[w], columns);
        for (int c = 0; c < kPerWord; ++c) {
          const int64_t step = (word + w) * kPerWord + c;
          if (step < scan.steps) store(panel.values + step * kPanelRows<float> + first, columns[c]);
        }
      }
    }
  }
}
#endif

template <typename Item, typename T>
void pack_by_element(const TopkScan<T>& scan, const Panel<T>& panel) {
  for (int64_t d = 0; d < scan.width; ++d) {
    for (int i = 0; i < kPanelRows<T>; ++i) {
      Item value;
      std::memcpy(&value, panel.rows[i] + d * static_cast<int64_t>(sizeof(Item)), sizeof(Item));
      panel.values[d * kPanelRows<T> + i] = static_cast<T>(widen(value));
    }
  }
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
