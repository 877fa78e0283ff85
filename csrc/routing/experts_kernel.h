// What the kernels of the experts read and write. Plain data: it crosses from the wrapper (compiled once) to the kernels (compiled
// per ISA).
#pragma once

#include <cstdint>

#include "../common/element.h"
#include "../common/isa.h"

namespace mmrec {

// A tile: up to this many tokens of one expert.
constexpr int64_t kTileTokens = 64;

// In the order of ACTIVATIONS in reference_experts.py.
enum class Activation : int { kSwiglu, kGeglu, kGelu, kRelu, kRelu2, kSilu, kIdentity };
constexpr bool is_gated(Activation activation) { return activation <= Activation::kGeglu; }

// An expert's network; rows are contiguous.
struct Expert {
  const void* w_in;   // [hidden or, gated, 2 · hidden][width]
  const void* w_out;  // [width][hidden]
  const void *b_in, *b_out;  // or null
  int64_t hidden;

  int64_t rows(Activation activation) const { return is_gated(activation) ? 2 * hidden : hidden; }
};

// Tokens that pass it: pairs [first, first + count).
struct ExpertTile {
  Expert expert;
  int64_t first, count;
  void* hidden;   // where the pre-activations go, or null: of the first pair, or
  bool by_token;  // of the first token, a row for each
};

// All tiles of a pass over tokens. T is what products are summed in: float, or double for float64 inputs.
template <typename T>
struct ExpertPass {
  Element element;
  const void* x;  // [tokens][width], rows `x_stride` elements apart
  int64_t x_stride, width, most_hidden;
  Activation activation;
  bool few;               // so few tokens that the width lies in lanes; widths are whole vectors then
  const int64_t* tokens;  // of the pairs
  T* y;                   // [pairs][padded width]
};

// What the gates make of the pairs' outputs, for tokens [first, last) of `tokens`.
template <typename T>
struct Combination {
  int64_t gates, tokens, k, first, last;
  const T* weights;       // [gates, tokens, k]
  const int64_t* slots;   // [gates, last − first, k]: pairs, or −1
  const int64_t* shared;  // [last − first]: the pair of the shared expert, or null; alive where a slot of a gate is used
  const T* shared_gate;   // [width] or null
  void* out;              // [gates, tokens, width]
};

template <typename T>
struct ExpertsForward {
  int64_t (*padded_width)(int64_t width);
  // Whether rows of these widths may have them in lanes.
  bool (*is_whole)(int64_t width, int64_t hidden);
  int64_t (*scratch_bytes)(const ExpertPass<T>&);
  void (*compute)(const ExpertPass<T>&, const ExpertTile&, char* scratch);
  // Tokens [begin, end), counted from the combination's first.
  void (*combine)(const ExpertPass<T>&, const Combination<T>&, int64_t begin, int64_t end);
};

// What comes from above to the pairs of a pass, and where their gradients go. "Staged": the element type that the products read,
// that of x or T.
template <typename T>
struct ExpertGradients {
  int64_t gates, tokens, pairs;
  const void* grad_out;      // [gates, tokens, width]
  const T* coefficients;     // [gates, pairs]
  const uint8_t* used;       // [gates, pairs]: whether the gate sends the pair's token there
  T* grad_coefficients;      // [gates, pairs] or null
  T* grad_rows;              // [pairs][padded width] or null: of x
  void* grad_hidden;         // staged [pairs][hidden_stride] or null: of the pre-activations
  void *activated, *grad_y;  // staged [pairs][…_stride] or null
  int64_t hidden_stride, activated_stride, y_stride;
};

// Rows [first_row, first_row + rows) of a weight's gradient: Σ over the pairs [begin, end) of weights · values, the latter
// activated rows or, where these are null, the pairs' tokens.
struct OuterProduct {
  const void* weights;
  int64_t weights_stride, first_row, rows;
  const void* activated;
  int64_t activated_stride, width, begin, end;
};

template <typename T>
struct ExpertsBackward {
  int64_t outer_rows;  // the most rows of an OuterProduct
  int64_t (*whole_width)(const ExpertPass<T>&, int64_t width);
  int64_t (*staged_bytes)(const ExpertPass<T>&);
  int64_t (*scratch_bytes)(const ExpertPass<T>&);
  void (*differentiate)(const ExpertPass<T>&, const ExpertGradients<T>&, const ExpertTile&, char* scratch);
  // Adds to `out` [rows, width] and to `bias` [rows] or null.
  void (*add_outer)(const ExpertPass<T>&, const OuterProduct&, T* out, T* bias, char* scratch);
  // σ(x · gate) of the pairs [begin, end), and 1 − that, to its own digits.
  void (*find_shared_coefficients)(const ExpertPass<T>&, const T* gate, int64_t begin, int64_t end, T* coefficients, T* rest);
  // sums [width] += factor · x of a token.
  void (*add_token)(const ExpertPass<T>&, T factor, int64_t token, T* sums);
  // A row of gradients in x's type.
  void (*write)(const ExpertPass<T>&, const T* row, int64_t token, void* out);
};

#define MMREC_DECLARE(isa)                        \
  namespace isa {                                 \
  void experts_kernels(ExpertsForward<float>&);   \
  void experts_kernels(ExpertsForward<double>&);  \
  void experts_kernels(ExpertsBackward<float>&);  \
  void experts_kernels(ExpertsBackward<double>&); \
  }
MMREC_FOR_EACH_ISA(MMREC_DECLARE)
#undef MMREC_DECLARE

}  // namespace mmrec
