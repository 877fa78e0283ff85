// InfoNCE on CPU: the arguments that forward and backward share, checked and brought into the form of the kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <vector>

#include "../common/parallel.h"
#include "infonce_kernel.h"

namespace mmrec {

using torch::stable::Tensor;

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942, kNormEps = 1e-12;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t unit) { return divide_up(a, unit) * unit; }

// The arguments of both ops, in the order of their schemas.
struct Arguments {
  const Tensor &query, &key, &scale;
  const std::optional<Tensor>&target, &query_mask, &key_mask, &query_ids, &key_ids, &exclude_offsets, &exclude_positions,
      &log_q;
  bool symmetric, normalize, positives_elsewhere;
};

template <typename T>
struct Kernels {
  InfoNceForward<T> forward;
  InfoNceBackward<T> backward;

  static const Kernels& get() {
    static const Kernels kernels = [] {
      using Forward = void (*)(InfoNceForward<T>&);
      using Back = void (*)(InfoNceBackward<T>&);
      static constexpr Forward kForward[] = MMREC_ISA_TABLE(infonce_kernels);
      static constexpr Back kBack[] = MMREC_ISA_TABLE(infonce_kernels);
      Kernels made;
      kForward[static_cast<int>(cpu_isa())](made.forward);
      kBack[static_cast<int>(cpu_isa())](made.backward);
      return made;
    }();
    return kernels;
  }
};

template <typename T>
std::unique_ptr<Scratch<T>> make_scratch() {
  return std::unique_ptr<Scratch<T>>(new Scratch<T>);
}

inline double* doubles(const Tensor& tensor) { return static_cast<double*>(tensor.mutable_data_ptr()); }
inline int64_t* integers(const Tensor& tensor) { return static_cast<int64_t*>(tensor.mutable_data_ptr()); }

template <typename T>
class Problem {
 public:
  explicit Problem(const Arguments& arguments);
  Problem(const Problem&) = delete;

  // Packs the operands of the logits, which only the making of logits needs.
  void pack_logits();
  // Which rows of the queries and of the keys enter any sum: those that are not read, or keep no pair, may hold NaN.
  std::vector<uint8_t> alive_rows() const;
  std::vector<uint8_t> alive_keys() const;
  // S of each row's positive, 0 where there is none.
  std::vector<double> positives() const;

  int64_t row_tiles() const { return divide_up(query.rows, kTileRows); }
  int64_t column_tiles() const { return divide_up(key.rows, kTileColumns); }
  int64_t padded_columns() const { return round_up(key.rows, kColumnUnit); }
  bool has_positive(int64_t row) const { return target[row] >= 0; }
  bool has_term(int64_t row) const { return positives_elsewhere_ ? is_read(row) : has_positive(row); }

  const Kernels<T>& kernels = Kernels<T>::get();
  Matrix query, key;
  Logits<T> logits{};
  std::vector<int64_t> target;               // −1: none here
  std::vector<double> query_norm, key_norm;  // empty: not normalised
  std::vector<T> scale;                      // [rows]
  std::vector<T> row_factor;                 // scale over the norm
  const T* log_q = nullptr;

 private:
  void find_terms(const Arguments& arguments);
  void find_ids(const Arguments& arguments);
  void find_excluded(const Arguments& arguments);
  void find_factors(const Arguments& arguments);
  bool keeps(int64_t row, int64_t column) const;
  template <typename IsRead, typename Keeps>
  std::vector<uint8_t> alive(const Matrix& side, int64_t others, const IsRead& read, const Keeps& keeps) const;
  bool is_read(int64_t row) const { return row_read_.empty() || row_read_[row] != 0; }
  bool key_is_read(int64_t column) const { return (key_bits_[column / 64] >> (column % 64) & 1) != 0; }
  bool sparse() const { return logits.query_ids != nullptr || logits.excluded_offsets != nullptr; }
  bool is_finite(const Matrix& matrix, int64_t row) const;

  bool positives_elsewhere_;
  std::vector<Tensor> held_;  // contiguous copies
  std::vector<uint8_t> row_read_;
  std::vector<uint64_t> key_bits_;
  std::vector<int32_t> query_ids_, key_ids_;
  std::vector<int64_t> excluded_offsets_, excluded_;
  std::vector<T> sigma_, sigma_rest_, kappa_, bias_;
  Buffer<T> query_groups_, key_panels_;
};

// Where the exponentials of `rows` rows from `first_row` on lie in one piece of memory.
template <typename T>
Exponentials<T> exponentials_in(void* memory, const Problem<T>& problem, int64_t first_row, int64_t rows);

// How many bytes that takes; schemas.py says the same of all rows.
template <typename T>
int64_t exponential_bytes(const Problem<T>& problem, int64_t rows);

}  // namespace mmrec
