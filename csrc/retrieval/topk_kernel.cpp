// Streaming top-k, the scan.    score[b, n] = (q_b · x_n) · scale_n + bias_n
//
// Items are read once per call, kPanelRows at a time. A panel is transposed (and widened to float) into L1, and every group of
// queries meets it with items in the lanes of the vectors:
//     acc[query][lane] = fma(panel[d][lane], q[query][d], acc)        d = 0 .. D-1, in this order
// A score is one such chain over d, whatever the batch: its bits depend on its query and its item only. Up to six
// queries take the same sums from the transposed registers: a panel would be written and read only once.
// Where the ISA multiplies pairs of bfloat16 and both sides are bfloat16, a step of the chain is a pair.
// Where a bound of a score can be had for less, only items whose bound passes are scored: of one query (first_pass.h, rounded_query.h),
// and of more over items of float32 or int8 (rounded_panel.h).
// The epilogue compares a vector of scores with the query's running threshold; almost always nothing passes.
//
// Reads: items once (N·D elements), queries from L2 once per panel. Flops 2·B·N·D. Writes: candidates only.

#include <type_traits>

#include "rounded_panel.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <int kQueries, typename T>
using Accumulators = Vec<T>[kQueries][kVectors];

// Lets vector v of a panel's scores into a selection, which almost always takes nothing.
template <typename T>
MMREC_INLINE void keep(const TopkScan<T>& scan, const Panel<T>& panel, Selection<T>& selection, Vec<T> scores, int v) {
  constexpr int kLanes = Vec<T>::kLanes;
  const int left = panel.count - v * kLanes;
  if (left <= 0) return;
  uint32_t passed = greater(scores, broadcast(selection.threshold));
  if (left < kLanes) passed &= (1u << left) - 1;
  if (__builtin_expect(passed != 0, 0)) append<T>(scan, selection, scores, passed, panel.first + v * kLanes);
}

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
    for (int v = 0; v < kVectors; ++v) keep(scan, panel, selections[i], acc[i][v], v);
  }
}

template <int kQueries, typename Step, typename T>
void score_panel(const TopkScan<T>& scan, const Panel<T>& panel, const T* queries, NextPanel& next,
                 Selection<T>* selections) {
  using V = Vec<T>;
  Accumulators<kQueries, T> acc;
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = broadcast(T(0));
  }
  for (int64_t d = 0; d < scan.steps; ++d) {
    next.ask();
    V x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = load(panel.values + d * kPanelRows<T> + v * V::kLanes);
    for (int i = 0; i < kQueries; ++i) {
      const V q = broadcast(queries[d * kQueryGroup + i]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Step::add(x[v], q, acc[i][v]);
    }
  }
  select<kQueries>(scan, panel, acc, selections);
}

// f of how many queries a group has, of which `left` are left with those behind it, as a constant.
template <typename F>
MMREC_INLINE void with_count(int64_t left, const F& f) {
  switch (left) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    default:
      return f(std::integral_constant<int, kQueryGroup>());
  }
}

template <typename Step, typename T>
void score_groups(const TopkScan<T>& scan, const Panel<T>& panel) {
  NextPanel next = NextPanel::after(scan, panel, scan.steps);
  for (int64_t b = 0; b < scan.num_queries; b += kQueryGroup) {
    with_count(scan.num_queries - b, [&](auto count) {
      score_panel<count, Step>(scan, panel, scan.queries + b * scan.steps, next, scan.selections + b);
    });
  }
}

template <typename Item, typename T>
void scan_by_element(const TopkScan<T>& scan, Panel<T>& panel) {
  for (int64_t first = scan.begin; first < scan.end; first += kPanelRows<T>) {
    find_rows(scan, first, panel);
    pack_by_element<Item>(scan, panel);
    score_groups<Multiply>(scan, panel);
  }
}

#if defined(__AVX2__)
// The same scores for up to six queries and vector v of a panel, from kLanes words of its rows at a time, widened in registers.
template <int kQueries, ItemType type>
MMREC_INLINE void score_rows(const TopkScan<float>& scan, const Panel<float>& panel, int v, F32 (&acc)[kQueries]) {
  using Step = typename Columns<type>::Step;
  constexpr int kLanes = F32::kLanes;
  constexpr int kPerWord = Columns<type>::kPerWord;
  const int64_t bytes = scan.width * item_bytes(type);
  for (int i = 0; i < kQueries; ++i) acc[i] = broadcast(0.0f);
  for (int64_t word = 0; word * 4 < bytes; word += kLanes) {
    Word words[kLanes];
    load_block(panel.rows + v * kLanes, word * 4, bytes, words);
    const auto add_word = [&](int w, int columns) __attribute__((always_inline)) {
      F32 x[kPerWord];
      Columns<type>::widen(words[w], x);
      for (int c = 0; c < columns; ++c) {
        for (int i = 0; i < kQueries; ++i) {
          acc[i] = Step::add(x[c], broadcast(scan.queries[((word + w) * kPerWord + c) * kQueryGroup + i]), acc[i]);
        }
      }
    };
    const int64_t left = scan.steps - word * kPerWord;
    if (left >= kLanes * kPerWord) {
#pragma GCC unroll 16
      for (int w = 0; w < kLanes; ++w) add_word(w, kPerWord);
      continue;
    }
    for (int w = 0; w < static_cast<int>(left / kPerWord); ++w) add_word(w, kPerWord);
    if (left % kPerWord != 0) add_word(static_cast<int>(left / kPerWord), static_cast<int>(left % kPerWord));
  }
  for (int i = 0; i < kQueries; ++i) {
    if (scan.scales != nullptr) acc[i] = mul(acc[i], load(panel.scale + v * kLanes));
    if (scan.bias != nullptr) acc[i] = add(acc[i], load(panel.bias + v * kLanes));
  }
}

template <int kQueries, ItemType type>
MMREC_INLINE void keep_rows(const TopkScan<float>& scan, const Panel<float>& panel, int v) {
  F32 acc[kQueries];
  score_rows<kQueries, type>(scan, panel, v, acc);
  for (int i = 0; i < kQueries; ++i) keep(scan, panel, scan.selections[i], acc[i], v);
}

template <int kQueries, ItemType type>
MMREC_INLINE void scan_panel(const TopkScan<float>& scan, int64_t first, Panel<float>& panel) {
  constexpr int kLanes = F32::kLanes;
  find_rows(scan, first, panel);
  for (int v = 0; v < kVectors && v * kLanes < panel.count; ++v) {
    touch(panel, v * kLanes, scan.width * item_bytes(type));
    keep_rows<kQueries, type>(scan, panel, v);
  }
}

template <int kQueries, ItemType type>
void scan_rows(const TopkScan<float>& scan, Panel<float>& panel) {
  for (int64_t first = scan.begin; first < scan.end; first += kPanelRows<float>) {
    scan_panel<kQueries, type>(scan, first, panel);
  }
}

// One query: `products_of` gives a panel's products, give or take a margin, and only vectors of rows of which one may be among the
// best are scored in full. So are all while nothing could be left out: before the first cut, and for some panels after one of
// which everything passed (items in the order of their scores, or a row beside which others are small).
template <ItemType type, typename Products>
void scan_passing(const TopkScan<float>& scan, Panel<float>& panel, const Products& products_of) {
  constexpr int kLanes = F32::kLanes, kRows = kPanelRows<float>, kPanelsInFull = 8;
  const Selection<float>& selection = scan.selections[0];
  const int64_t step = scan.row_stride * item_bytes(type);
  int64_t in_full = scan.begin;  // panels before this one
  for (int64_t first = scan.begin; first < scan.end; first += kRows) {
    if (first < in_full || selection.threshold == -__builtin_inff()) {
      scan_panel<1, type>(scan, first, panel);
      continue;
    }
    const bool in_order = scan.ids == nullptr && scan.end - first >= kRows;
    F32 products[kVectors], margin;
    if (in_order) {
      margin = products_of(Stepped{static_cast<const char*>(scan.items) + first * step, step}, products);
    } else {
      find_rows(scan, first, panel);
      margin = products_of(panel.rows, products);
    }
    const auto of_row = [&](const float* all, const float* here, int row) -> const float* {
      return all == nullptr ? nullptr : (in_order ? all + first : here) + row;
    };
    bool found = !in_order;
    int passed = 0, row = 0;
    for (int v = 0; v < kVectors && (in_order || row < panel.count); ++v, row += kLanes) {
      const float* const scales = of_row(scan.scales, panel.scale, row);
      const float* const biases = of_row(scan.bias, panel.bias, row);
      if (__builtin_expect(may_pass(products[v], margin, scales, biases, selection.threshold) == 0, 1)) continue;
      if (!found) find_rows(scan, first, panel);
      found = true;
      ++passed;
      keep_rows<1, type>(scan, panel, v);
    }
    if (passed == kVectors) in_full = first + (1 + kPanelsInFull) * kRows;
  }
}

#if defined(__AVX512VNNI__)
template <int kBytes>
void scan_rounded(const TopkScan<float>& scan, Panel<float>& panel, const RoundedQuery& query) {
  constexpr auto kInt8 = ItemType::kInt8;
  switch ((scan.width + 63) / 64) {
    case 1:
      return scan_passing<kInt8>(scan, panel, RoundedProducts<1, kBytes>(query, scan.width));
    case 2:
      return scan_passing<kInt8>(scan, panel, RoundedProducts<2, kBytes>(query, scan.width));
    case 3:
      return scan_passing<kInt8>(scan, panel, RoundedProducts<3, kBytes>(query, scan.width));
    default:
      return scan_passing<kInt8>(scan, panel, RoundedProducts<4, kBytes>(query, scan.width));
  }
}

// False if the query cannot be rounded.
bool try_rounded(const TopkScan<float>& scan, Panel<float>& panel) {
  RoundedQuery query;
  if (scan.num_queries != 1 || !query.round(scan.queries, scan.width)) return false;
  query.bytes == 1 ? scan_rounded<1>(scan, panel, query) : scan_rounded<2>(scan, panel, query);
  return true;
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
// False if the queries cannot be rounded.
template <ItemType type>
bool try_rounded_panels(const TopkScan<float>& scan, Panel<float>& panel) {
  // A pair that passes costs about as much as so many that are scored in full beside others.
  constexpr int kPairCosts = 64, kRows = kPanelRows<float>, kPanelsInFull = 8;
  RoundedQueries<type> queries;
  if (!queries.round(scan)) return false;
  for (int i = 0; i < kRows; ++i) {  // where there are none, nobody writes them
    panel.scale[i] = 1;
    panel.bias[i] = 0;
  }
  alignas(64) float sizes[kRows];
  Pairs<type> pairs(scan, queries.rows);
  int64_t in_full = scan.begin + kPanelsInFull * kRows;  // panels before this one
  for (int64_t first = scan.begin; first < scan.end; first += kRows) {
    find_rows(scan, first, panel);
    if (first < in_full) {
      pack_panel<type>(scan, panel);
      score_groups<Multiply>(scan, panel);
      continue;
    }
    pack_rounded<type>(scan, panel, sizes);
    NextPanel next = NextPanel::after(scan, panel, queries.steps);
    int64_t passed = 0;
    for (int64_t b = 0; b < scan.num_queries; b += kQueryGroup) {
      with_count(scan.num_queries - b, [&](auto count) {
        passed += pass_group<count>(scan, panel, sizes, queries, b, next, pairs);
      });
    }
    if (passed * kPairCosts > scan.num_queries * kRows) {
      pairs.score();
      in_full = first + (1 + kPanelsInFull) * kRows;
    }
  }
  pairs.score();
  return true;
}
#endif

template <ItemType type>
void scan_words(const TopkScan<float>& scan, Panel<float>& panel) {
  if (scan.num_queries == 1) return scan_passing<type>(scan, panel, RowProducts<type>(scan, scan.panel));
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  if constexpr (type == ItemType::kFloat32 || type == ItemType::kInt8) {
    if (try_rounded_panels<type>(scan, panel)) return;
  }
#endif
  if (scan.num_queries <= kQueryGroup) {
    return with_count(scan.num_queries, [&](auto count) { scan_rows<count, type>(scan, panel); });
  }
  for (int64_t first = scan.begin; first < scan.end; first += kPanelRows<float>) {
    find_rows(scan, first, panel);
    pack_panel<type>(scan, panel);
    score_groups<typename Columns<type>::Step>(scan, panel);
  }
}
#endif

}  // namespace

void topk_scan(const TopkScan<float>& scan) {
  Panel<float> panel;
  panel.values = scan.panel;
  switch (scan.item_type) {
#if defined(__AVX2__)
#if defined(__AVX512BF16__)
    case ItemType::kBFloat16Pairs:
      return scan_words<ItemType::kBFloat16Pairs>(scan, panel);
#endif
    case ItemType::kFloat32:
      return scan_words<ItemType::kFloat32>(scan, panel);
    case ItemType::kBFloat16:
      return scan_words<ItemType::kBFloat16>(scan, panel);
    default:
#if defined(__AVX512VNNI__)
      if (try_rounded(scan, panel)) return;
#endif
      return scan_words<ItemType::kInt8>(scan, panel);
#else
    case ItemType::kFloat32:
      return scan_by_element<float>(scan, panel);
    case ItemType::kBFloat16:
      return scan_by_element<BFloat16>(scan, panel);
    default:
      return scan_by_element<int8_t>(scan, panel);
#endif
  }
}

void topk_scan(const TopkScan<double>& scan) {
  Panel<double> panel;
  panel.values = scan.panel;
  scan_by_element<double>(scan, panel);
}

void topk_cut(Selection<float>& selection, void* scratch) { cut(selection, scratch); }
void topk_cut(Selection<double>& selection, void* scratch) { cut(selection, scratch); }

}  // namespace MMREC_ISA
}  // namespace mmrec
