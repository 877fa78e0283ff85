// What the attention kernels read and write. Plain data: it crosses from the wrapper (compiled once) to the kernels (compiled
// per ISA).
//
// The queries of a sequence and of the query heads that share a KV head are rows of one product. A block of up to kBlockRows of
// them meets the keys kBlockKeys at a time, with a running softmax: m, the highest score so far, and sums relative to it.
// Scores are held in units of log2,
//     x_rj = factor_r · (q_r · k_j) · rstd_j + bias_{r,m(j)}       factor_r = log2(e) · scale (· the query's own rstd)
// (rstd only with norms), so that exponentials are powers of two. Which rows and keys share a block is decided by the
// sequence alone, so no bit depends on what other sequences hold or on the number of threads.
#pragma once

#include <cstdint>

#include "../common/element.h"
#include "../common/isa.h"

namespace mmrec {

constexpr int64_t kBlockRows = 32, kBlockKeys = 48;

// Finite biases and sinks beyond this, in units of log2, are taken for it: a log-sum-exp of that size still has digits enough in
// double precision for the backward to find the weights again.
constexpr double kMostBias = 1099511627776.0;  // 2^40

// Rows [row][head][width] of an element type that goes with it.
struct HeadRows {
  const void* values;
  int64_t row_stride, head_stride;  // in elements
};

struct AttentionSegment {
  HeadRows key, value;
  const int64_t* offsets;  // [sequences + 1], into rows or into `index`
  const int64_t* index;    // or null; −1: skipped
  bool causal;
};

// A number per sequence, query head and segment, or null.
template <typename T>
struct PerSegment {
  const T* values;
  int64_t sequence_stride, head_stride, segment_stride;

  T at(int64_t sequence, int64_t head, int64_t segment) const {
    return values[sequence * sequence_stride + head * head_stride + segment * segment_stride];
  }
};

// T is what scores are computed in: float, or double for float64 inputs.
template <typename T>
struct Attention {
  Element element;
  int64_t kv_heads, group;  // query head h belongs to KV head h / group
  int64_t width, value_width, segments;
  HeadRows query;
  const int64_t* query_offsets;  // or null: all sequences share the rows [0, latent_rows)
  int64_t latent_rows;
  const AttentionSegment* segment;
  PerSegment<T> log_bias;    // in units of log2
  PerSegment<T> value_gate;
  const T* sink;             // [query heads], in units of log2, or null
  const T* query_norm;       // [width] or null
  const T* key_norm;         // [width] or null
  double scale, norm_eps;
};

// Contiguous results; `row` of query i of a sequence is that of the offsets, or sequence · latent_rows + i.
template <typename T>
struct AttentionResults {
  void* out;    // [rows, heads, value_width]
  double* lse;  // [rows, heads], natural logarithm
  T* mass;      // [rows, heads, segments] or null
};

// Where the gradients of a segment's keys and values go: row `entry − first_entry` of [entries, kv_heads, width], where an entry
// is a row, or a place in `index`.
struct SegmentGradients {
  void *key, *value;  // or null
  bool widened;       // T instead of the element type
  bool streamed;      // rows are whole lines of 64 bytes, and more of them than a cache keeps until they are read
  int64_t first_entry;
};

// What comes from above, and where gradients go. Per sequence: [sequences, …], zero beforehand.
template <typename T>
struct AttentionGradients {
  const void* grad_out;     // [rows, heads, value_width] or null
  const double* grad_lse;   // [rows, heads] or null
  const T* grad_mass;       // [rows, heads, segments] or null
  const void* out;
  const double* lse;
  const T* mass;            // where grad_mass is
  void* query;              // [query rows, heads, width] or null
  T* latent;                // [sequences from first_sequence on, latent_rows, heads, width] or null: of normalised queries
  int64_t first_sequence;
  const SegmentGradients* segment;
  double* log_bias;         // per sequence [heads, segments], or null
  double* value_gate;       // per sequence [heads, segments], or null
  double* sink;             // per sequence [heads], or null
  double* query_norm;       // per sequence [kv_heads, width], or null
  double* key_norm;         // per sequence [kv_heads, width], or null
};

// What one task computes: queries [first_row, last_row) of a sequence, for the KV heads [first_head, last_head).
struct AttentionUnit {
  int64_t sequence, first_head, last_head, first_row, last_row;
};

// The kernels of one ISA.
template <typename T>
struct AttentionForward {
  // How much scratch a task needs.
  int64_t (*scratch_bytes)(const Attention<T>&);
  // `next`: the sequence whose keys will be met next, or −1.
  void (*attend)(const Attention<T>&, const AttentionResults<T>&, const AttentionUnit&, int64_t next, char* scratch);
};

template <typename T>
struct AttentionBackward {
  // For sequences of up to `most_queries`.
  int64_t (*scratch_bytes)(const Attention<T>&, int64_t most_queries);
  // All rows of a unit's sequence, whatever rows it names.
  void (*differentiate)(const Attention<T>&, const AttentionGradients<T>&, const AttentionUnit&, int64_t next,
                        int64_t most_queries, char* scratch);
};

#define MMREC_DECLARE(isa)                            \
  namespace isa {                                     \
  void attention_kernels(AttentionForward<float>&);   \
  void attention_kernels(AttentionForward<double>&);  \
  void attention_kernels(AttentionBackward<float>&);  \
  void attention_kernels(AttentionBackward<double>&); \
  }
MMREC_FOR_EACH_ISA(MMREC_DECLARE)
#undef MMREC_DECLARE

}  // namespace mmrec
