// What the InfoNCE kernels read and write. Plain data: it crosses from the wrappers (compiled once) to the kernels (compiled
// per ISA).
//
// The matrix of logits is worked on in tiles of kTileRows queries x kTileColumns keys, always the same ones, so that no sum
// depends on how tiles are dealt to threads. A logit is held in units of log2:
//     x_ij = sigma_i · kappa_j · (q_i · k_j) − bias_j          sigma_i = log2(e) · scale_i / ‖q_i‖, kappa_j = 1 / ‖k_j‖
// (the norms only where rows are normalised), so that exponentials are powers of two, and those that tell how far apart two
// tiles' sums are scaled are exact.
#pragma once

#include <cstdint>

#include "../common/element.h"
#include "../common/isa.h"

namespace mmrec {

// Multiples of every ISA's kGroup and kPanel.
constexpr int64_t kTileRows = 96;
constexpr int64_t kTileColumns = 192;
// Columns of a tile are worked on in whole panels; of every ISA's kPanel this is a multiple.
constexpr int64_t kColumnUnit = 32;
// Rows of a tile in scratch start this far apart, in elements: not a power of two, so they fall into different sets of L1.
constexpr int64_t kTileStride = kTileColumns + 16;
constexpr int64_t kBitWords = kTileColumns / 64;

// A row-major matrix [rows, width], of the element type that goes with it.
struct Matrix {
  const void* values;
  int64_t rows, width, stride;
};

// T is what logits are computed in: float, or double for float64 inputs.
template <typename T>
struct Logits {
  Element element;
  int64_t rows, columns, depth;  // depth: the width in words of the products
  const T* query_groups;         // [row groups][depth][kGroup]
  const T* key_panels;           // [key panels][depth][kPanel]
  const T* sigma;                // [rows]
  const T* sigma_rest;           // [rows], what sigma's rounding left
  const T* kappa;                // [columns, padded to a tile] or null; bias comes with it
  const T* bias;                 // [columns, padded to a tile] or null
  // What is left out: a pair is kept if its row is read, its key's bit is set, it is not the positive, ids differ and it is
  // not listed.
  const uint64_t* key_bits;      // [columns, padded to a tile]
  const uint8_t* row_read;       // [rows] or null: all
  const int64_t* target;         // [rows]; −1: none here
  const int32_t* query_ids;      // [rows] or null; −1: none
  const int32_t* key_ids;        // [columns, padded to a tile]; −2: none
  const int64_t* excluded_offsets;  // [rows + 1] or null
  const int64_t* excluded;          // ascending within a row
};

// e_ij = 2^(x_ij − ref_i) of the rows [first_row, first_row + rows) (0 where left out, else at least the least normal number),
// and for each tile whether they serve both directions: they do unless a column's sum would be lost beside the others'.
template <typename T>
struct Exponentials {
  int64_t first_row, rows, padded_columns;  // padded to kColumnUnit
  void* values;  // float32 (double), or bfloat16 for bfloat16 inputs; per tile row-major, tiles of a row of tiles in order
  T* refs;       // [column tiles][rows]; whole numbers
  T* exact;      // [row tiles][column tiles]; 0: the logits have to be made again
};

// Sums of exponentials over a part of the other side: Σ 2^(x − ref), whole ref; sum 0 where nothing is kept.
template <typename T>
struct Partial {
  T* ref;
  T* sum;
};

template <typename T>
struct ForwardTile {
  int64_t row_tile, column_tile;
  bool symmetric;
  Partial<T> rows;                  // [rows, padded to a tile], merged into; or null
  Partial<T> columns;               // [columns, padded to a tile], merged into; or null
  const Exponentials<T>* keep;      // or null
  double* total;                    // [rows]: Σ_j x_ij over what is kept, added to; or null
  int64_t* kept;                    // [rows]: how many those are, added to; or null
  const T* positive;                // [rows]: with them
  int64_t* rank;                    // [rows]: how many logits are above `positive`, added to; or null
};

// dLoss/dS_ij = row_slope_i 2^(x_ij − row_ref_i) + column_slope_j 2^(x_ij − column_ref_j) + total_slope_i over the kept pairs,
// whole refs.
template <typename T>
struct Slopes {
  const T* row_slope;     // [rows]
  const T* row_ref;       // [rows]
  const T* column_slope;  // [columns, padded to a tile], both or neither
  const T* column_ref;
  const T* total_slope;    // [rows] or null
};

template <typename T>
struct Backward {
  Matrix query, key;
  Logits<T> logits;
  Exponentials<T> exponentials;
  Slopes<T> slopes;
  int64_t padded_width;        // to kColumnUnit
  const T* key_rows;           // [width panels][padded columns][kPanel], or of pairs
  const T* query_rows;         // [width panels][padded rows][kPanel], or of pairs
  int64_t key_panel, query_panel;  // words from panel to panel
  const T* row_factor;         // [rows]: scale_i / ‖q_i‖
  T* key_sums;                 // [columns, padded to a tile][padded_width]: Σ_i W_ij row_factor_i q_i
  double* log_q_sums;          // [columns, padded to a tile]: Σ_i W_ij, or null
};

// The rows and keys of a tile that one task works on.
struct Part {
  int64_t row_tile, column_tile, begin, end;  // begin, end: within the tile
};

// What turns Σ_j W_ij k̂_j into the gradient of a query, and Σ_i W_ij scale_i q̂_i into that of a key. `slope` is that of a row's
// positive. Rows of a side are normalised if it has norms.
template <typename T>
struct Finish {
  const int64_t* target;       // [rows]; −1: none
  const T* positive_slope;     // [rows]
  const T* scale;              // [rows]
  const double* query_norm;    // [rows] or null
  const double* key_norm;      // [columns] or null
  const int64_t* wanted_offsets;  // [columns + 1]: the rows that want each key
  const int64_t* wanted;
  void* grad_query;            // [rows, width] or null
  void* grad_key;              // [columns, width] or null
  double* grad_scale;          // [rows] or null
};

// Scratch of one thread, 64-byte aligned.
template <typename T>
struct Scratch {
  T tile[kTileRows * kTileStride];     // dots
  T weights[kTileRows * kTileStride];  // or pairs of bfloat16
  uint64_t bits[kTileRows * kBitWords];
  uint8_t masked[kTileRows];  // whether a row leaves anything out
  uint16_t dominant[kTileRows * kTileColumns];  // pairs
  T column[4][kTileColumns];
  T row[2][kTileRows];
};

// The kernels of one ISA.
template <typename T>
struct InfoNceForward {
  // A tile's rows of a matrix into operands of the products.
  void (*pack_queries)(Element, const Matrix&, int64_t tile, T* groups);
  void (*pack_keys)(Element, const Matrix&, int64_t tile, T* panels);
  // ‖x_i‖, and q_i · k_target (0 without a target), in double, for the rows [begin, end).
  void (*norms)(Element, const Matrix&, int64_t begin, int64_t end, double* out);
  void (*dots)(Element, const Matrix& query, const Matrix& key, const int64_t* target, int64_t begin, int64_t end,
               double* out);
  // The logits of the positives of a row of tiles, bit for bit as `forward` would make them.
  void (*positives)(const Logits<T>&, int64_t row_tile, Scratch<T>&, T* out);
  void (*forward)(const Logits<T>&, const ForwardTile<T>&, Scratch<T>&);
};

template <typename T>
struct InfoNceBackward {
  int64_t panel_columns;  // kPanel
  // The rows [begin, end) of a matrix into panels that are `panel` words apart; rows that are not alive become zero.
  void (*pack_rows)(Element, const Matrix&, int64_t begin, int64_t end, const uint8_t* alive, int64_t panel, T* rows);
  // The gradients of the rows of a part of a row of tiles; `sums` has kTileRows x padded_width.
  void (*row_gradients)(const Backward<T>&, const Finish<T>&, const Part&, Scratch<T>&, T* sums);
  // Adds the rows of `exponentials` to the sums of the keys of a part of a column of tiles.
  void (*key_sums)(const Backward<T>&, const Part&, Scratch<T>&);
  // From those sums to the gradients of the keys [begin, end).
  void (*key_gradients)(const Backward<T>&, const Finish<T>&, int64_t begin, int64_t end);
};

#define MMREC_DECLARE(isa)                                    \
  namespace isa {                                             \
  void infonce_kernels(InfoNceForward<float>&);               \
  void infonce_kernels(InfoNceForward<double>&);              \
  void infonce_kernels(InfoNceBackward<float>&);              \
  void infonce_kernels(InfoNceBackward<double>&);             \
  }
MMREC_FOR_EACH_ISA(MMREC_DECLARE)
#undef MMREC_DECLARE

}  // namespace mmrec
