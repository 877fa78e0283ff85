// What the routing kernels read and write. Plain data: it crosses from the wrapper (compiled once) to the kernels (compiled per
// ISA).
#pragma once

#include <cstdint>

#include "../common/element.h"
#include "../common/isa.h"

namespace mmrec {

// Tokens are taken in blocks of this many, whatever the number of threads.
constexpr int64_t kBlockTokens = 256;

// In the order of SCORES in router.py.
enum class Score : int { kSoftmax, kTopkSoftmax, kSigmoid };

// T is what logits are computed in: float, or double for float64 inputs.
template <typename T>
struct Router {
  Element element;  // of x, whose rows are `x_stride` elements apart
  const void* x;
  int64_t x_stride, tokens, width;
  const void* gate;  // packed: [words of width][lanes], zero behind `experts`
  int64_t experts, lanes, modalities, k;
  const int64_t* modality;        // [tokens] or null: all are 0
  const uint8_t* valid;           // [tokens] or null
  const int64_t* choice_offsets;  // [modalities + 1]
  const int64_t* choices;         // the experts that a modality may use, ascending
  const T* bias;                  // [modalities, experts] or null
  Score score;
  bool renormalize;

  // −1 for a token that is not routed.
  int64_t modality_of(int64_t token) const {
    const int64_t m = valid != nullptr && valid[token] == 0 ? -1 : modality != nullptr ? modality[token] : 0;
    return m >= 0 && choice_offsets[m + 1] > choice_offsets[m] ? m : -1;
  }
  int64_t choices_of(int64_t m) const { return choice_offsets[m + 1] - choice_offsets[m]; }
};

// Sums over the tokens of a run of blocks: [modalities][sums_per_modality], of each modality [experts][3] counts, Σ p̄ and
// Σ weight, then the number of routed tokens, Σ lse² and Σ H(p̄).
constexpr int64_t sums_per_modality(int64_t experts) { return 3 * experts + 3; }

template <typename T>
struct RouteForward {
  // The words of the packed gate, and how many lanes it has.
  int64_t (*gate_lanes)(int64_t experts);
  // `gate`: contiguous rows of T, or of bfloat16 where `element` is pairs of them.
  void (*pack_gate)(const Router<T>&, const void* gate, void* packed);
  int64_t (*scratch_bytes)(const Router<T>&);
  // Tokens [first, last), at most a block: weights and experts [tokens, k]; adds to `sums`.
  void (*route)(const Router<T>&, int64_t first, int64_t last, T* weights, int32_t* experts, double* sums, char* scratch);
};

// What comes from above, what the forward left, and where gradients go.
template <typename T>
struct RouterGradients {
  const T* grad_weights;    // [tokens, k] or null
  const T* weights;         // [tokens, k]
  const int32_t* experts;   // [tokens, k]
  const T* gate;            // [experts][padded width]
  // Per modality, or null: of p̄ of each expert [modalities, experts]; 2 dz / tokens; dlocal / tokens.
  const T *shares, *z, *local;
  void* x;        // [tokens, width] or null
  bool streamed;  // its rows are whole lines of 64 bytes, and more of them than a cache keeps until they are read
};

template <typename T>
struct RouteBackward {
  int64_t (*padded_width)(int64_t width);
  int64_t (*scratch_bytes)(const Router<T>&);
  // Tokens [first, last), at most a block; adds to `grad_gate` [experts][padded width], or null.
  void (*differentiate)(const Router<T>&, const RouterGradients<T>&, int64_t first, int64_t last, T* grad_gate, char* scratch);
};

#define MMREC_DECLARE(isa)                      \
  namespace isa {                               \
  void routing_kernels(RouteForward<float>&);   \
  void routing_kernels(RouteForward<double>&);  \
  void routing_kernels(RouteBackward<float>&);  \
  void routing_kernels(RouteBackward<double>&); \
  }
MMREC_FOR_EACH_ISA(MMREC_DECLARE)
#undef MMREC_DECLARE

}  // namespace mmrec
