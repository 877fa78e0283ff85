// What the kernels of the NF4 linear read and write. Plain data: it crosses from the wrappers (compiled once) to the kernels
// (compiled per ISA).
#pragma once

#include <cstdint>

#include "../common/element.h"
#include "../common/isa.h"

namespace mmrec {

// Columns of W that are decoded together.
constexpr int64_t kGroupColumns = 128;
constexpr int64_t kNestedBlock = 256;

// A frozen weight [rows][columns] as bitsandbytes stores it. Blocks are over the flat index.
struct NF4Bytes {
  const uint8_t* packed;
  const float* absmax;    // of each block, or null where it is nested:
  const uint8_t* nested;  // of each block, an index into nested_code
  const float *nested_absmax, *nested_code;
  float offset;
  int64_t rows, columns;
  int block_shift;  // blocks have 1 << block_shift elements

  int64_t blocks() const { return (rows * columns + (int64_t{1} << block_shift) - 1) >> block_shift; }
  // Whether every 64 columns of a row are whole bytes of one block.
  bool is_aligned() const { return columns % 64 == 0 && block_shift >= 6; }
};

// A factor of the adapters, [adapters][…]: of x's type or float32.
struct LoRAFactor {
  const void* data;
  bool is_float32;
  int64_t stride;  // from one adapter to the next, in elements

  const void* of(int64_t adapter, int64_t element_bytes) const {
    return static_cast<const char*>(data) + adapter * stride * (is_float32 ? 4 : element_bytes);
  }
};

// Tokens [begin, end) of a panel that take one adapter.
struct AdapterRange {
  int64_t adapter, begin, end;
};

// out [rank][panel] = scale · factor · rowsᵀ, of up to a panel of rows. T is what products are summed in: float, or double for
// float64.
template <typename T>
struct SkinnyProduct {
  Element element;
  const void* const* rows;  // [width] of x's type
  int64_t count, width;
  bool few;            // of all panels' rows: whether the width lies in lanes. So a row's bits do not depend on its panel.
  const void* factor;  // [rank][width]
  bool is_float32;     // the factor; else it is of x's type
  int64_t rank;
  T scale;
};

// y = x Wᵀ + (scaled x aᵀ) bᵀ + bias for the tokens of a pass.
template <typename T>
struct NF4Pass {
  Element element;
  NF4Bytes weight;
  bool few;            // tokens have the width in lanes; else they lie in lanes
  const void* tokens;  // as `stage` (few) or `pack` leaves them
  int64_t count;
  int64_t rank;  // 0: no adapter
  LoRAFactor b;  // [rows of W][rank]
  // few: [token][padded rank]; many: [panel][rank][panel width].
  const T* lora_x;
  const int64_t* adapters;  // few: of each token, or -1
  // many: those of panel p are [first_range[p], first_range[p + 1]).
  const AdapterRange* ranges;
  const int64_t* first_range;
  const T* bias;         // [rows of W] or null
  void* const* outputs;  // of each token, [rows of W] of x's type
};

template <typename T>
struct NF4Forward {
  int64_t panel;          // tokens of a panel
  int64_t rows_per_task;  // the most rows of W that multiply() takes
  int64_t (*most_few)(Element);
  int64_t most_few_skinny;
  int64_t (*padded_rank)(int64_t rank);
  int64_t (*token_bytes)(Element, int64_t width);
  // All tokens (few), or those of one panel (many). `tokens` has token_bytes() for each, and of whole panels.
  void (*stage)(Element, int64_t width, const void* const* rows, int64_t count, void* tokens);
  void (*pack)(Element, int64_t width, const void* const* rows, int64_t count, void* tokens, char* scratch);
  int64_t (*pack_bytes)(Element);
  int64_t (*scratch_bytes)(const NF4Pass<T>&);
  // Rows [begin, end) of W.
  void (*multiply)(const NF4Pass<T>&, char* scratch, int64_t begin, int64_t end);
  int64_t (*skinny_bytes)(const SkinnyProduct<T>&);
  void (*skinny)(const SkinnyProduct<T>&, char* scratch, T* out);
};

// dx = dy W + dS a for the tokens of a pass.
template <typename T>
struct NF4InputPass {
  Element element;
  NF4Bytes weight;          // absmax is not nested
  const void* const* rows;  // dy as `stage_row` leaves it, or where it lies
  int64_t count;
  int64_t rank;  // 0: no adapter
  LoRAFactor a;  // [rank][columns of W]
  const T* lora_dy;  // dS, [panel][rank][panel width]
  const AdapterRange* ranges;
  const int64_t* first_range;
  void* const* outputs;  // of each token, [columns of W] of x's type
};

// Σ weights · rows over the positions [first, last): an adapter's gradient.
template <typename T>
struct AdapterSums {
  Element element;
  const void* const* rows;  // of x's type
  const T* weights;         // [panel][rank][panel width], and one panel more that may be read
  int64_t rank, first, last;
  // Where they go, [rank][width] or, transposed, [width][rank]: float32 or x's type.
  void* out;
  int64_t width;
  bool is_float32, transposed;
};

template <typename T>
struct NF4Backward {
  int64_t panel;             // positions of a panel of dS
  int64_t columns_per_task;  // the most that sum_adapter() and sum_columns() take
  // Whether the products read rows of dy where they lie. If not, stage_row makes copies of row_bytes() each.
  bool (*reads_in_place)(Element, int64_t width);
  int64_t (*row_bytes)(Element, int64_t width);
  void (*stage_row)(Element, int64_t width, const void* row, void* out);
  int64_t (*input_bytes)(const NF4InputPass<T>&);
  // Columns [column, column + kGroupColumns) of dx.
  void (*input)(const NF4InputPass<T>&, char* scratch, int64_t column);
  // dS: as SkinnyProduct, with the factor [width][rank].
  int64_t (*skinny_bytes)(const SkinnyProduct<T>&);
  void (*skinny)(const SkinnyProduct<T>&, char* scratch, T* out);
  int64_t (*sums_bytes)(const AdapterSums<T>&);
  void (*sum_adapter)(const AdapterSums<T>&, char* scratch, int64_t begin, int64_t end);
  void (*sum_columns)(Element, const void* const* rows, int64_t count, int64_t begin, int64_t end, T* out);
};

// The types that W can be decoded to.
enum class Decoded : int { kFloat32, kBFloat16, kFloat16, kFloat64 };
struct NF4Decode {
  int64_t rows_per_task;
  int64_t (*scratch_bytes)(const NF4Bytes&);
  void (*decode)(const NF4Bytes&, int64_t begin, int64_t end, Decoded, void* out, char* scratch);
  // The absmax of blocks [begin, end), where it is nested.
  void (*expand)(const NF4Bytes&, int64_t begin, int64_t end, float* out);
};

#define MMREC_DECLARE(isa)                \
  namespace isa {                         \
  void nf4_kernels(NF4Forward<float>&);   \
  void nf4_kernels(NF4Forward<double>&);  \
  void nf4_kernels(NF4Backward<float>&);  \
  void nf4_kernels(NF4Backward<double>&); \
  void nf4_kernels(NF4Decode&);           \
  }
MMREC_FOR_EACH_ISA(MMREC_DECLARE)
#undef MMREC_DECLARE

}  // namespace mmrec
