// What one call of the top-k scan reads and keeps. Plain data: it crosses from the wrapper (compiled once) to the scan
// (compiled per ISA).
#pragma once

#include <cstdint>

#include "../common/isa.h"

namespace mmrec {

// Queries are packed in groups of this many, so that one vector of items meets all of them in registers.
constexpr int kQueryGroup = 6;

enum class ItemType : int { kFloat32, kBFloat16, kInt8, kFloat64 };

// The running selection of one query over one part of the catalogue. T is float, or double for float64 queries.
// Ids arrive in ascending order, so a score equal to the threshold loses against what is kept.
template <typename T>
struct Selection {
  T threshold;        // a score must exceed it; starts at -inf
  int64_t count;      // entries in use
  int64_t capacity;   // > k
  int64_t k;
  T* scores;          // [capacity]
  int64_t* ids;       // [capacity]
  const int64_t* excluded;  // ascending; the ids from here on are still ahead of the scan
  const int64_t* excluded_end;
};

template <typename T>
struct TopkScan {
  const T* queries;       // [ceil(num_queries / kQueryGroup)][width][kQueryGroup]
  int64_t num_queries;    // of this call
  const void* items;      // row-major
  ItemType item_type;
  int64_t row_stride;     // in elements
  int64_t width;
  const float* scales;    // [N] or null
  const T* bias;          // [N] or null
  const int64_t* ids;     // rows to score, ascending; null: all of [begin, end)
  int64_t begin, end;     // positions in ids, or row numbers
  T* panel;               // scratch, width * panel_rows(isa), 64-byte aligned
  Selection<T>* selections;  // [num_queries]
  void (*shrink)(Selection<T>*);  // cuts a full selection back to the k best
};

#define MMREC_DECLARE(isa)                   \
  namespace isa {                            \
  void topk_scan(const TopkScan<float>&);    \
  void topk_scan(const TopkScan<double>&);   \
  }
MMREC_FOR_EACH_ISA(MMREC_DECLARE)
#undef MMREC_DECLARE

// No ISA has panels of more rows than this.
constexpr int64_t kMaxPanelRows = 64;

}  // namespace mmrec
