// Streaming top-k, the scan.    score[b, n] = (q_b · x_n) · scale_n + bias_n
//
// Items are read once per call, kPanelRows at a time: a panel of rows is transposed (and widened to float) into L1, then
// every group of queries meets it with items in the lanes of the vectors:
//     acc[query][lane] = fma(panel[d][lane], q[query][d], acc)        d = 0 .. D-1, in this order
// A score is one chain of fmas over d, whatever the batch: its bits depend on its query and its item only.
// Up to four queries are scored from a panel of the rows' own words instead, widened in registers.
// The epilogue compares a vector of scores with the query's running threshold; almost always nothing passes.
//
// Reads: items once (N·D elements), queries from L2 once per panel. Flops 2·B·N·D. Writes: candidates only.

#include "topk_kernel.h"

#include "../common/simd.h"
#include "../common/transpose.h"

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

constexpr int64_t item_bytes(ItemType type) {
  return type == ItemType::kFloat64 ? 8 : type == ItemType::kFloat32 ? 4 : type == ItemType::kBFloat16 ? 2 : 1;
}

#if defined(__AVX2__)
// How the 32-bit words of a row hold its columns.
template <typename Item>
struct Columns;
template <>
struct Columns<float> {
  static constexpr int kPerWord = 1;
  MMREC_INLINE static void widen(Word word, F32* out) { out[0] = as_float(word); }
};
template <>
struct Columns<BFloat16> {
  static constexpr int kPerWord = 2;
  MMREC_INLINE static void widen(Word word, F32* out) {
    out[0] = bf16_low(word);
    out[1] = bf16_high(word);
  }
};
template <>
struct Columns<int8_t> {
  static constexpr int kPerWord = 4;
  MMREC_INLINE static void widen(Word word, F32* out) {
    out[0] = int8_at<0>(word);
    out[1] = int8_at<1>(word);
    out[2] = int8_at<2>(word);
    out[3] = int8_at<3>(word);
  }
};

// kLanes words from `offset` on of each of kLanes rows, transposed. Rows end after `bytes`. `ahead` bytes further lies what
// the next panel will read: asked for now, it arrives while this panel is scored.
MMREC_INLINE void load_block(const char* const* rows, int64_t offset, int64_t bytes, int64_t ahead, Word* block) {
  constexpr int kLanes = F32::kLanes;
  constexpr int64_t kBytes = kLanes * 4;
  if (offset + kBytes <= bytes) {
    for (int i = 0; i < kLanes; ++i) {
      _mm_prefetch(rows[i] + offset + ahead, _MM_HINT_T0);
      block[i] = load_words(rows[i] + offset);
    }
  } else {
    alignas(64) char copy[kBytes] = {};
    for (int i = 0; i < kLanes; ++i) {
      std::memcpy(copy, rows[i] + offset, static_cast<size_t>(bytes - offset));
      block[i] = load_words(copy);
    }
  }
  transpose_words(block);
}

// Panel of words as they are stored: [words][kPanelRows], the last word of a row padded with zeros.
void pack_words(const char* const* rows, int64_t bytes, int64_t ahead, float* panel) {
  constexpr int kLanes = F32::kLanes;
  for (int group = 0; group < kVectors; ++group) {
    for (int64_t word = 0; word * 4 < bytes; word += kLanes) {
      Word block[kLanes];
      load_block(rows + group * kLanes, word * 4, bytes, ahead, block);
      float* out = panel + word * kPanelRows<float> + group * kLanes;
      const int64_t left = (bytes - word * 4 + 3) / 4;
      const int count = left < kLanes ? static_cast<int>(left) : kLanes;
      for (int w = 0; w < count; ++w) store(out + w * kPanelRows<float>, as_float(block[w]));
    }
  }
}

// Panel of floats: [width][kPanelRows].
template <typename Item>
void pack_panel(const char* const* rows, int64_t width, int64_t ahead, float* panel) {
  constexpr int kLanes = F32::kLanes;
  constexpr int kPerWord = Columns<Item>::kPerWord;
  const int64_t bytes = width * static_cast<int64_t>(sizeof(Item));
  for (int group = 0; group < kVectors; ++group) {
    for (int64_t word = 0; word * 4 < bytes; word += kLanes) {
      Word block[kLanes];
      load_block(rows + group * kLanes, word * 4, bytes, ahead, block);
      for (int w = 0; w < kLanes; ++w) {
        F32 columns[kPerWord];
        Columns<Item>::widen(block[w], columns);
        for (int c = 0; c < kPerWord; ++c) {
          const int64_t d = (word + w) * kPerWord + c;
          if (d < width) store(panel + d * kPanelRows<float> + group * kLanes, columns[c]);
        }
      }
    }
  }
}
#endif

template <typename Item, typename T>
void pack_panel_by_element(const char* const* rows, int64_t width, T* panel) {
  constexpr int kRows = kPanelRows<T>;
  for (int64_t d = 0; d < width; ++d) {
    for (int i = 0; i < kRows; ++i) {
      Item value;
      std::memcpy(&value, rows[i] + d * static_cast<int64_t>(sizeof(Item)), sizeof(Item));
      panel[d * kRows + i] = static_cast<T>(widen(value));
    }
  }
}

MMREC_INLINE void pack(ItemType type, const char* const* rows, int64_t width, [[maybe_unused]] int64_t ahead,
                       [[maybe_unused]] bool words, float* panel) {
#if defined(__AVX2__)
  if (words) return pack_words(rows, width * item_bytes(type), ahead, panel);
  switch (type) {
    case ItemType::kFloat32:
      return pack_panel<float>(rows, width, ahead, panel);
    case ItemType::kBFloat16:
      return pack_panel<BFloat16>(rows, width, ahead, panel);
    default:
      return pack_panel<int8_t>(rows, width, ahead, panel);
  }
#else
  switch (type) {
    case ItemType::kFloat32:
      return pack_panel_by_element<float>(rows, width, panel);
    case ItemType::kBFloat16:
      return pack_panel_by_element<BFloat16>(rows, width, panel);
    default:
      return pack_panel_by_element<int8_t>(rows, width, panel);
  }
#endif
}
MMREC_INLINE void pack(ItemType, const char* const* rows, int64_t width, int64_t, bool, double* panel) {
  pack_panel_by_element<double>(rows, width, panel);
}

template <typename T>
struct Panel {
  const T* values;              // [width][kPanelRows]
  int count;                    // rows in use
  int64_t first;                // position of the first row
  T scale[kPanelRows<T>];       // per row, where the scan has scales
  T bias[kPanelRows<T>];
};

template <typename T>
void keep(const TopkScan<T>& scan, Selection<T>& selection, const T* scores, uint32_t passed, int64_t first) {
  while (passed != 0) {
    const int lane = __builtin_ctz(passed);
    passed &= passed - 1;
    // The threshold may have risen since the comparison.
    if (!(scores[lane] > selection.threshold)) continue;
    const int64_t position = first + lane;
    const int64_t id = scan.ids != nullptr ? scan.ids[position] : position;
    while (selection.excluded != selection.excluded_end && *selection.excluded < id) ++selection.excluded;
    if (selection.excluded != selection.excluded_end && *selection.excluded == id) continue;
    selection.scores[selection.count] = scores[lane];
    selection.ids[selection.count] = id;
    if (++selection.count == selection.capacity) scan.shrink(&selection);
  }
}

template <int kQueries, typename T>
using Accumulators = Vec<T>[kQueries][kVectors];

// Scale, bias, and the comparison that almost nothing passes.
template <int kQueries, typename T>
MMREC_INLINE void select(const TopkScan<T>& scan, const Panel<T>& panel, Accumulators<kQueries, T>& acc,
                         Selection<T>* selections) {
  using V = Vec<T>;
  constexpr int kLanes = V::kLanes;
  if (scan.scales != nullptr) {
    for (int v = 0; v < kVectors; ++v) {
      const V scale = load(panel.scale + v * kLanes);
      for (int i = 0; i < kQueries; ++i) acc[i][v] = mul(acc[i][v], scale);
    }
  }
  if (scan.bias != nullptr) {
    for (int v = 0; v < kVectors; ++v) {
      const V bias = load(panel.bias + v * kLanes);
      for (int i = 0; i < kQueries; ++i) acc[i][v] = add(acc[i][v], bias);
    }
  }
  for (int i = 0; i < kQueries; ++i) {
    const V threshold = broadcast(selections[i].threshold);
    for (int v = 0; v < kVectors; ++v) {
      const int left = panel.count - v * kLanes;
      if (left <= 0) break;
      uint32_t passed = greater(acc[i][v], threshold);
      if (left < kLanes) passed &= (1u << left) - 1;
      if (__builtin_expect(passed != 0, 0)) {
        T scores[kLanes];
        store(scores, acc[i][v]);
        keep(scan, selections[i], scores, passed, panel.first + v * kLanes);
      }
    }
  }
}

template <int kQueries, typename T>
void score_panel(const TopkScan<T>& scan, const Panel<T>& panel, const T* queries, Selection<T>* selections) {
  using V = Vec<T>;
  Accumulators<kQueries, T> acc;
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = broadcast(T(0));
  }
  for (int64_t d = 0; d < scan.width; ++d) {
    V x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(panel.values + d * kPanelRows<T> + v * V::kLanes);
    for (int i = 0; i < kQueries; ++i) {
      const V q = broadcast(queries[d * kQueryGroup + i]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(x[v], q, acc[i][v]);
    }
  }
  select<kQueries>(scan, panel, acc, selections);
}

#if defined(__AVX2__)
// The same sums from a panel of words, widened in registers: with one group of queries a panel of floats would be written
// and read only once.
template <int kQueries, typename Item>
void score_words(const TopkScan<float>& scan, const Panel<float>& panel) {
  constexpr int kPerWord = Columns<Item>::kPerWord;
  Accumulators<kQueries, float> acc;
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = broadcast(0.0f);
  }
  const auto add_word = [&](int64_t word, int columns) __attribute__((always_inline)) {
    F32 x[kVectors][kPerWord];
    for (int v = 0; v < kVectors; ++v) {
      Columns<Item>::widen(load_words(panel.values + word * kPanelRows<float> + v * F32::kLanes), x[v]);
    }
    for (int c = 0; c < columns; ++c) {
      for (int i = 0; i < kQueries; ++i) {
        const F32 q = broadcast(scan.queries[(word * kPerWord + c) * kQueryGroup + i]);
        for (int v = 0; v < kVectors; ++v) acc[i][v] = fma(x[v][c], q, acc[i][v]);
      }
    }
  };
  const int64_t full = scan.width / kPerWord;
  for (int64_t word = 0; word < full; ++word) add_word(word, kPerWord);
  if (scan.width % kPerWord != 0) add_word(full, static_cast<int>(scan.width % kPerWord));
  select<kQueries>(scan, panel, acc, scan.selections);
}

template <typename Item>
void score_words(const TopkScan<float>& scan, const Panel<float>& panel) {
  switch (scan.num_queries) {
    case 1:
      return score_words<1, Item>(scan, panel);
    case 2:
      return score_words<2, Item>(scan, panel);
    case 3:
      return score_words<3, Item>(scan, panel);
    default:
      return score_words<4, Item>(scan, panel);
  }
}
#endif

// Up to so many queries are scored from words.
constexpr int64_t kWordQueries = 4;

template <typename T>
bool from_words([[maybe_unused]] const TopkScan<T>& scan) {
#if defined(__AVX2__)
  return sizeof(T) == 4 && scan.num_queries <= kWordQueries;
#else
  return false;
#endif
}

MMREC_INLINE void score_from_words([[maybe_unused]] const TopkScan<float>& scan,
                                   [[maybe_unused]] const Panel<float>& panel) {
#if defined(__AVX2__)
  switch (scan.item_type) {
    case ItemType::kFloat32:
      return score_words<float>(scan, panel);
    case ItemType::kBFloat16:
      return score_words<BFloat16>(scan, panel);
    default:
      return score_words<int8_t>(scan, panel);
  }
#endif
}
MMREC_INLINE void score_from_words(const TopkScan<double>&, const Panel<double>&) {}

template <typename T>
void load_panel(const TopkScan<T>& scan, int64_t first, Panel<T>& panel) {
  constexpr int kRows = kPanelRows<T>;
  const int64_t left = scan.end - first;
  panel.first = first;
  panel.count = left < kRows ? static_cast<int>(left) : kRows;
  const int64_t step = scan.row_stride * item_bytes(scan.item_type);
  const char* items = static_cast<const char*>(scan.items);
  const char* rows[kRows];
  if (scan.ids == nullptr && panel.count == kRows) {
    for (int i = 0; i < kRows; ++i) rows[i] = items + (first + i) * step;
    if (scan.scales != nullptr) {
      for (int i = 0; i < kRows; ++i) panel.scale[i] = static_cast<T>(scan.scales[first + i]);
    }
    if (scan.bias != nullptr) std::memcpy(panel.bias, scan.bias + first, sizeof(panel.bias));
  } else {
    for (int i = 0; i < kRows; ++i) {
      // Rows past the end repeat the last one: read, never used.
      const int64_t position = first + (i < panel.count ? i : panel.count - 1);
      const int64_t row = scan.ids != nullptr ? scan.ids[position] : position;
      rows[i] = items + row * step;
      if (scan.scales != nullptr) panel.scale[i] = static_cast<T>(scan.scales[row]);
      if (scan.bias != nullptr) panel.bias[i] = scan.bias[row];
    }
  }
  const int64_t ahead = scan.ids != nullptr ? 0 : kRows * step;
  pack(scan.item_type, rows, scan.width, ahead, from_words(scan), scan.panel);
  panel.values = scan.panel;
}

template <typename T>
void scan_items(const TopkScan<T>& scan) {
  Panel<T> panel;
  for (int64_t first = scan.begin; first < scan.end; first += kPanelRows<T>) {
    load_panel(scan, first, panel);
    if (from_words(scan)) {
      score_from_words(scan, panel);
      continue;
    }
    for (int64_t b = 0; b < scan.num_queries; b += kQueryGroup) {
      const T* queries = scan.queries + b * scan.width;
      Selection<T>* selections = scan.selections + b;
      switch (scan.num_queries - b) {
        case 1:
          score_panel<1>(scan, panel, queries, selections);
          break;
        case 2:
          score_panel<2>(scan, panel, queries, selections);
          break;
        case 3:
          score_panel<3>(scan, panel, queries, selections);
          break;
        case 4:
          score_panel<4>(scan, panel, queries, selections);
          break;
        case 5:
          score_panel<5>(scan, panel, queries, selections);
          break;
        default:
          score_panel<6>(scan, panel, queries, selections);
      }
    }
  }
}

}  // namespace

void topk_scan(const TopkScan<float>& scan) { scan_items(scan); }
void topk_scan(const TopkScan<double>& scan) { scan_items(scan); }

}  // namespace MMREC_ISA
}  // namespace mmrec
