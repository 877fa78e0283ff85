// What one call of the top-k scan reads and keeps. Plain data: it crosses from the wrapper (compiled once) to the scan
// (compiled per ISA).
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace mmrec {

// Queries are packed in groups of this many, so that one vector of items meets all of them in registers.
constexpr int kQueryGroup = 6;

// kBFloat16Pairs: bfloat16 under a bfloat16 query where the ISA multiplies pairs (avx512_bf16 only).
enum class ItemType : int { kFloat32, kBFloat16, kBFloat16Pairs, kInt8, kFloat64 };

// Entries that an append may write behind the last one.
constexpr int64_t kSelectionSlack = 16;

// The running selection of one query over one part of the catalogue. T is float, or double for float64 queries.
// Ids arrive in ascending order, so a score equal to the threshold loses against what is kept.
template <typename T>
struct Selection {
  T threshold;        // a score must exceed it; starts at -inf
  int64_t count;      // entries in use
  int64_t capacity;   // > k; a selection that reaches it is cut back to k
  int64_t k;
  T* scores;          // [capacity + kSelectionSlack]
  int64_t* ids;       // [capacity + kSelectionSlack]
  const int64_t* excluded;  // ascending; the ids from here on are still ahead of the scan
  const int64_t* excluded_end;
};

template <typename T>
struct TopkScan {
  const T* queries;       // [ceil(num_queries / kQueryGroup)][steps][kQueryGroup]
  int64_t steps;          // multiplications per score: width, or pairs of it
  int64_t num_queries;    // of this call
  const void* items;      // row-major
  ItemType item_type;
  int64_t row_stride;     // in elements
  int64_t width;
  const float* scales;    // [N] or null
  const T* bias;          // [N] or null
  const int64_t* ids;     // rows to score, ascending; null: all of [begin, end)
  int64_t begin, end;     // positions in ids, or row numbers
  T* panel;               // scratch, steps * kMaxPanelRows, 64-byte aligned
  T* rounded;             // scratch of rounded_room bytes, or null where queries are not to be rounded together
  T* keys;                // scratch, capacity + kSelectionSlack
  Selection<T>* selections;  // [num_queries]
};

// Bytes for queries as they are and rounded, each with some numbers of its own; none for those that never are.
constexpr int64_t kMaxRoundedWidth = 4096;
constexpr int64_t rounded_room(int64_t num_queries, int64_t width) {
  if (num_queries <= 1 || width > kMaxRoundedWidth) return 0;
  return (num_queries + kQueryGroup) * (width + (width + 1) / 2 + 3) * static_cast<int64_t>(sizeof(float));
}

// topk_cut: a selection of more than k entries back to the k best, in the order in which they came. Its scratch holds as
// many T as there are entries.
#define MMREC_DECLARE(isa)                          \
  namespace isa {                                   \
  void topk_scan(const TopkScan<float>&);           \
  void topk_scan(const TopkScan<double>&);          \
  void topk_cut(Selection<float>&, void* scratch);  \
  void topk_cut(Selection<double>&, void* scratch); \
  }
MMREC_FOR_EACH_ISA(MMREC_DECLARE)
#undef MMREC_DECLARE

// No ISA has panels of more rows than this.
constexpr int64_t kMaxPanelRows = 64;

}  // namespace mmrec
