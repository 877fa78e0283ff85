// InfoNCE, the backward: what the weights of pairs make of the other side's rows.
//
//     u_i = Σ_j W_ij kappa_j k_j                           dk_j = Σ_i W_ij row_factor_i q_i
//
// W never exists whole: a task makes it tile by tile as the left operand of its product, 2 · 96 · 192 · D flops a tile for each
// of u and dk, and reads 4 bytes (2) of e_ij per pair for that. Rows and keys have one owner each, and every sum runs over
// tiles in order.

#include "../common/pack.h"
#include "dominant.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename Raw, typename T>
void finish_row(const Backward<T>& task, const Finish<T>& finish, int64_t r, T* sum) {
  const int64_t width = task.query.width, t = finish.target[r];
  const Raw* const q = row_of<Raw>(task.query, r);
  const T slope = finish.positive_slope[r];
  if (t >= 0 && slope != T(0)) {
    const double norm = finish.key_norm != nullptr ? finish.key_norm[t] : 1.0;
    add_row(static_cast<T>(static_cast<double>(slope) / (norm > kNormEps ? norm : kNormEps)),
            row_of<Raw>(task.key, t), width, sum);
  }
  // A row that is not read, or keeps nothing, may hold NaN.
  const bool nothing = all_zero(sum, width);
  const double norm = finish.query_norm != nullptr && !nothing ? finish.query_norm[r] : 1.0;
  if (finish.grad_scale != nullptr) {
    finish.grad_scale[r] = nothing ? 0.0 : dot_in_double(q, sum, width) / (norm > kNormEps ? norm : kNormEps);
  }
  if (finish.grad_query == nullptr) return;
  Raw* const out = static_cast<Raw*>(finish.grad_query) + r * width;
  if (nothing) return write_row(sum, T(1), width, out);
  const T scale = finish.scale[r];
  for (int64_t d = 0; d < width; ++d) sum[d] *= scale;
  write_through_norm(sum, q, finish.query_norm != nullptr ? &norm : nullptr, width, out);
}

template <typename T>
void row_gradients(const Backward<T>& task, const Finish<T>& finish, const Part& part, Scratch<T>& scratch, T* sums) {
  with_kind<T>(task.logits.element, [&](auto kind) {
    using Kind = decltype(kind);
    using Dot = typename Kind::Dot;
    using Raw = typename Kind::Raw;
    constexpr int64_t kRow = kTileStride / Dot::kColumns;
    const int64_t tiles = (task.logits.columns + kTileColumns - 1) / kTileColumns;
    const int64_t groups = (part.end - part.begin + kGroup - 1) / kGroup;
    for (int64_t j = 0; j < tiles; ++j) {
      const Place at(task.logits, part.row_tile, j);
      const T* const kappa = task.logits.kappa != nullptr ? task.logits.kappa + at.column : nullptr;
      int64_t dominant = 0;
      with_weights<Kind>(task, at, j, scratch, [&](const auto& tile) {
        write_for_rows<Dot>(tile, kappa, part.begin, part.end, at.padded_columns, scratch.weights);
        if constexpr (kRounded<Kind>) {
          dominant = find_dominant(tile, {part.begin, part.end, 0, at.padded_columns}, scratch);
          for_each_pair(scratch.dominant, dominant, [&](int64_t i, int64_t c) {
            clear_for_rows<Dot>(scratch.weights, i - part.begin, c);
          });
        }
      });
      multiply<Dot, kRow, 1>(scratch.weights, kGroup * kRow, groups,
                             task.key_rows + at.column / Dot::kColumns * kPanel<Dot>, task.key_panel,
                             task.padded_width / kPanel<Dot>, words_of(at.columns, Dot::kColumns), sums,
                             task.padded_width, j > 0);
      for_each_pair(scratch.dominant, dominant, [&](int64_t i, int64_t c) {
        const double weight = exact_weight(task, at.row + i, at.column + c) * (kappa != nullptr ? kappa[c] : 1.0);
        add_row(static_cast<T>(weight), row_of<Raw>(task.key, at.column + c), task.key.width,
                sums + (i - part.begin) * task.padded_width);
      });
    }
    for (int64_t i = part.begin; i < part.end; ++i) {
      T* const sum = sums + (i - part.begin) * task.padded_width;
      if (tiles == 0) std::memset(sum, 0, sizeof(T) * static_cast<size_t>(task.padded_width));
      finish_row<Raw>(task, finish, part.row_tile * kTileRows + i, sum);
    }
  });
}

template <typename T>
void key_sums(const Backward<T>& task, const Part& part, Scratch<T>& scratch) {
  with_kind<T>(task.logits.element, [&](auto kind) {
    using Kind = decltype(kind);
    using Dot = typename Kind::Dot;
    using Raw = typename Kind::Raw;
    const int64_t first = task.exponentials.first_row / kTileRows;
    const int64_t last = (task.exponentials.first_row + task.exponentials.rows + kTileRows - 1) / kTileRows;
    for (int64_t i = first; i < last; ++i) {
      const Place at(task.logits, i, part.column_tile);
      const int64_t end = at_most(round_up(part.end, kColumnUnit), at.padded_columns);
      T* const sums = scratch.column[1];
      std::memset(sums, 0, sizeof(T) * kTileColumns);
      int64_t dominant = 0;
      with_weights<Kind>(task, at, part.column_tile, scratch, [&](const auto& tile) {
        if (task.log_q_sums != nullptr) {
          write_for_keys<Dot, true>(tile, task.row_factor + at.row, at.rows, part.begin, end, sums, scratch.weights);
        } else {
          write_for_keys<Dot, false>(tile, task.row_factor + at.row, at.rows, part.begin, end, sums, scratch.weights);
        }
        if constexpr (kRounded<Kind>) {
          dominant = find_dominant(tile, {0, at.rows, part.begin, end}, scratch);
          for_each_pair(scratch.dominant, dominant, [&](int64_t i, int64_t c) {
            clear_for_keys<Dot>(scratch.weights, i, c - part.begin);
            if (task.log_q_sums != nullptr) sums[c] -= weight_at(tile(i), c);
          });
        }
      });
      if (task.log_q_sums != nullptr) {
        for (int64_t c = part.begin; c < part.end; ++c) {
          double& to = task.log_q_sums[at.column + c];
          to = (i > 0 ? to : 0.0) + static_cast<double>(sums[c]);
        }
      }
      multiply<Dot, 1, kTileStride>(scratch.weights, kGroup, (part.end - part.begin + kGroup - 1) / kGroup,
                                    task.query_rows + at.row / Dot::kColumns * kPanel<Dot>, task.query_panel,
                                    task.padded_width / kPanel<Dot>, words_of(at.rows, Dot::kColumns),
                                    task.key_sums + (at.column + part.begin) * task.padded_width, task.padded_width,
                                    i > 0);
      for_each_pair(scratch.dominant, dominant, [&](int64_t n, int64_t c) {
        const int64_t r = at.row + n, k = at.column + c;
        const double weight = exact_weight(task, r, k);
        if (task.log_q_sums != nullptr) task.log_q_sums[k] += weight;
        add_row(static_cast<T>(weight * static_cast<double>(task.row_factor[r])), row_of<Raw>(task.query, r),
                task.query.width, task.key_sums + k * task.padded_width);
      });
    }
  });
}

template <typename T>
void key_gradients(const Backward<T>& task, const Finish<T>& finish, int64_t begin, int64_t end) {
  with_kind<T>(task.logits.element, [&](auto kind) {
    using Raw = typename decltype(kind)::Raw;
    const int64_t width = task.key.width;
    for (int64_t j = begin; j < end; ++j) {
      T* const sum = task.key_sums + j * task.padded_width;
      for (int64_t n = finish.wanted_offsets[j]; n < finish.wanted_offsets[j + 1]; ++n) {
        const int64_t r = finish.wanted[n];
        const T factor = finish.positive_slope[r] * task.row_factor[r];
        if (factor == T(0)) continue;
        add_row(factor, row_of<Raw>(task.query, r), width, sum);
      }
      const Raw* const k = row_of<Raw>(task.key, j);
      const double* const norm = finish.key_norm != nullptr && !all_zero(sum, width) ? finish.key_norm + j : nullptr;
      write_through_norm(sum, k, norm, width, static_cast<Raw*>(finish.grad_key) + j * width);
    }
  });
}

template <typename T>
void pack(Element element, const Matrix& matrix, int64_t begin, int64_t end, const uint8_t* alive, int64_t panel, T* out) {
  with_kind<T>(element, [&](auto kind) {
    pack_rows<typename decltype(kind)::Dot>(static_cast<const typename decltype(kind)::Raw*>(matrix.values), matrix.stride,
                                            begin, end, matrix.width, alive, panel, out);
  });
}

template <typename T>
constexpr InfoNceBackward<T> kKernels = {kPanel<Plain<T>>, pack<T>, row_gradients<T>, key_sums<T>, key_gradients<T>};

}  // namespace

void infonce_kernels(InfoNceBackward<float>& kernels) { kernels = kKernels<float>; }
void infonce_kernels(InfoNceBackward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
