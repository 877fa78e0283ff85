// NF4 linear, the backward: dx = dy W + dS a over a group of columns of W, dS = s dy b, and the adapters' and the bias's gradients,
// which are sums over tokens.
//
// dx: W is decoded kRowsAtOnce rows at a time, columns in lanes; a token's dy is broadcast from where it lies. W never leaves the
// caches, and every weight is decoded once for all tokens of a pass. Work: 2 · tokens · rows · columns flops and reading W's bytes.

#include "operands.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

constexpr int64_t kRowsAtOnce = 128;
// Columns of the sums over tokens, and tokens whose sum is one chain.
constexpr int64_t kSumColumns = 256, kChainTokens = 256;

template <typename Kind>
constexpr bool reads_in_place_of(int64_t width) {
  return std::is_same_v<typename Kind::Raw, Operand<Kind>> && width % Kind::Dot::kColumns == 0;
}

template <typename Kind, typename T>
class Input {
  using Raw = typename Kind::Raw;
  using Dot = typename Kind::Dot;
  using Word = typename Dot::Word;
  using V = Vec<T>;
  static constexpr int64_t kLanes = V::kLanes, kPanel = kPanelTokens<T>, kWords = kRowsAtOnce / Dot::kColumns;

 public:
  Input(const NF4InputPass<T>& pass, Arena& arena) : p_(pass) {
    keys_ = arena.take<const Word*>(p_.count + 1);
    decoded_ = arena.take<Word>(kWords * kGroupColumns);
    rows_ = arena.take<T>(kHasPairs<Kind> ? 0 : kGroupColumns);
    sums_ = arena.take<T>((p_.count + 1) * kGroupColumns);
    lines_ = arena.take<T>((kPanel + 1) * kGroupColumns);
    factor_ = arena.take<T>(p_.rank * kGroupColumns);
    factor_rows_ = arena.take<const T*>(p_.rank);
  }

  void run(int64_t column) {
    const bool few = p_.count <= kFewRows;
    const int64_t rows = p_.weight.rows;
    const Weight w{p_.weight, p_.weight.absmax};
    std::memset(sums_, 0, sizeof(T) * static_cast<size_t>(p_.count * kGroupColumns));
    for (int64_t n = 0; n < rows; n += kRowsAtOnce) {
      const int64_t count = at_most(kRowsAtOnce, rows - n), depth = words_of(count, Dot::kColumns);
      decode(w, n, count, column, few);
      for (int64_t i = 0; i <= p_.count; ++i) {
        keys_[i] = static_cast<const Word*>(p_.rows[at_most(i, p_.count - 1)]) + n / Dot::kColumns;
      }
      few ? multiply_few(depth) : multiply_many(depth);
    }
    const int64_t width = at_most(kGroupColumns, p_.weight.columns - column);
    for (int64_t first = 0; first < p_.count; first += kPanel) {
      const int64_t here = at_most(kPanel, p_.count - first);
      for (int64_t i = 0; i < here; ++i) in_natural_order(sums_ + (first + i) * kGroupColumns, lines_ + i * kGroupColumns);
      if (p_.rank > 0) add_adapters(first / kPanel, column, width);
      for (int64_t i = 0; i < here; ++i) {
        write_row(lines_ + i * kGroupColumns, T(1), width, static_cast<Raw*>(p_.outputs[first + i]) + column);
      }
    }
  }

 private:
  // Rows [n, n + count) of W: few tokens [word][column], else [panel of columns][word][column].
  void decode(const Weight& w, int64_t n, int64_t count, int64_t column, bool few) {
    const int64_t word_step = few ? kGroupColumns : kPanel, panel_step = few ? kPanel : kWords * kPanel;
    for (int64_t i = 0; i < count; i += Dot::kColumns) {
      Word* const to = decoded_ + i / Dot::kColumns * word_step;
#if defined(__AVX512BF16__)
      if constexpr (kHasPairs<Kind>) {
        const bool whole = w.bytes.is_aligned() && column + kGroupColumns <= w.bytes.columns;
        const auto group = [&](int64_t row) __attribute__((always_inline)) {
          __builtin_prefetch(w.bytes.packed + ((row + kAhead) * w.bytes.columns + column) / 2, 0, 3);
          return whole ? pair_group(w, row, column) : odd_pair_group(w, row, column);
        };
        const PairGroup first = group(n + i);
        const PairGroup second = i + 1 < count ? group(n + i + 1) : PairGroup{};
        for (int c = 0; c < 4; ++c) {
          _mm512_storeu_si512(to + c * panel_step, _mm512_unpacklo_epi16(first.columns[c], second.columns[c]));
          _mm512_storeu_si512(to + c * panel_step + 16, _mm512_unpackhi_epi16(first.columns[c], second.columns[c]));
        }
        continue;
      }
#endif
      if constexpr (!kHasPairs<Kind>) {
        if (few) {
          decode_operands<Kind>(w, n + i, column, to);
          continue;
        }
        decode_operands<Kind>(w, n + i, column, rows_);
        for (int64_t p = 0; p * kPanel < kGroupColumns; ++p) {
          for (int64_t v = 0; v < kPanel; v += kLanes) store(to + p * panel_step + v, load(rows_ + p * kPanel + v));
        }
      }
    }
  }

  void multiply_many(int64_t depth) {
    // Tokens whose dy stays in the first level of cache while all columns meet it.
    constexpr int64_t kTokens = 4 * kGroup;
    for (int64_t first = 0; first < p_.count; first += kTokens) {
      const int64_t here = at_most(kTokens, p_.count - first);
      for (int64_t p = 0; p * kPanel < kGroupColumns; ++p) {
        score_block<Dot, true>(keys_ + first, here, decoded_ + p * kWords * kPanel, kPanel, depth,
                               sums_ + first * kGroupColumns + p * kPanel, kGroupColumns);
      }
    }
  }

  // So many sums at a time that the chains of each do not wait for themselves.
  void multiply_few(int64_t depth) {
    switch (p_.count) {
      case 1: return few_tile<1, 8>(depth);
#if defined(__AVX512F__)
      case 2: return few_tile<2, 8>(depth);
      case 3: return few_tile<3, 4>(depth);
      case 4: return few_tile<4, 4>(depth);
      case 5: return few_tile<5, 4>(depth);
      case 6: return few_tile<6, 4>(depth);
#else
      case 2: return few_tile<2, 4>(depth);
      case 3: return few_tile<3, 2>(depth);
      case 4: return few_tile<4, 2>(depth);
      case 5: return few_tile<5, 2>(depth);
      case 6: return few_tile<6, 2>(depth);
#endif
      default: break;
    }
  }
  template <int R, int NV>
  void few_tile(int64_t depth) {
    for (int64_t column = 0; column < kGroupColumns; column += NV * kLanes) {
      score_tile<Dot, R, NV, true>(keys_, decoded_ + column, kGroupColumns, depth, sums_ + column, kGroupColumns);
    }
  }

  static void in_natural_order(const T* sums, T* out) {
#if defined(__AVX512BF16__)
    if constexpr (kHasPairs<Kind>) return from_pair_order(sums, out);
#endif
    std::memcpy(out, sums, sizeof(T) * kGroupColumns);
  }

  // lines += dS a, of the tokens of one panel.
  void add_adapters(int64_t panel, int64_t column, int64_t width) {
    const T* const weights = p_.lora_dy + panel * p_.rank * kPanel;
    for (int64_t n = p_.first_range[panel]; n < p_.first_range[panel + 1]; ++n) {
      const AdapterRange& range = p_.ranges[n];
      const int64_t at = range.adapter * p_.a.stride + column, columns = p_.weight.columns;
      const void* const from = p_.a.is_float32 ? static_cast<const void*>(static_cast<const float*>(p_.a.data) + at)
                                               : static_cast<const Raw*>(p_.a.data) + at;
      stage_factor<Raw>(from, p_.a.is_float32, columns, p_.rank, width, kGroupColumns, factor_);
      for (int64_t r = 0; r < p_.rank; ++r) factor_rows_[r] = factor_ + r * kGroupColumns;
      // Of an odd number of rows the last is taken by itself: the row behind it is of another adapter.
      const int64_t count = range.end - range.begin, even = count > kFewRows ? count / 2 * 2 : count;
      for (int64_t first = 0; first < count; first += even) {
        weigh_values<1, kPanel>(weights + range.begin + first, at_most(even, count - first), factor_rows_, p_.rank,
                                kGroupColumns, lines_ + (range.begin + first) * kGroupColumns);
      }
    }
  }

  static constexpr int64_t kAhead = 8;  // rows of W

  const NF4InputPass<T>& p_;
  const Word** keys_;
  Word* decoded_;
  T *rows_, *sums_, *lines_, *factor_;
  const T** factor_rows_;
};

// out [rank][panel] = scale · (rows · factor), the factor [width][rank].
template <typename Kind, typename T>
class SkinnyTransposed {
  using Raw = typename Kind::Raw;
  static constexpr int64_t kPanel = kPanelTokens<T>, kColumns = 256;

 public:
  SkinnyTransposed(const SkinnyProduct<T>& product, Arena& arena)
      : p_(product), padded_(round_up(product.rank, Vec<T>::kLanes)) {
    tokens_ = arena.take<T>((kPanel + 1) * kColumns);
    factor_ = arena.take<T>(kColumns * padded_);
    rows_ = arena.take<const T*>(kColumns);
    sums_ = arena.take<T>((kPanel + 1) * padded_);
  }

  void run(T* out) {
    std::memset(sums_, 0, sizeof(T) * static_cast<size_t>((kPanel + 1) * padded_));
    std::memset(tokens_, 0, sizeof(T) * static_cast<size_t>((kPanel + 1) * kColumns));
    for (int64_t column = 0; column < p_.width; column += kColumns) {
      const int64_t width = at_most(kColumns, p_.width - column), at = column * p_.rank;
      for (int64_t i = 0; i < p_.count; ++i) stage(static_cast<const Raw*>(p_.rows[i]) + column, width, kColumns, tokens_ + i * kColumns);
      const void* const from = p_.is_float32 ? static_cast<const void*>(static_cast<const float*>(p_.factor) + at)
                                             : static_cast<const Raw*>(p_.factor) + at;
      stage_factor<Raw>(from, p_.is_float32, p_.rank, width, p_.rank, padded_, factor_);
      for (int64_t k = 0; k < width; ++k) rows_[k] = factor_ + k * padded_;
      weigh_values<kColumns, 1>(tokens_, p_.count, rows_, width, padded_, sums_);
    }
    for (int64_t r = 0; r < p_.rank; ++r) {
      for (int64_t i = 0; i < p_.count; ++i) out[r * kPanel + i] = sums_[i * padded_ + r] * p_.scale;
    }
  }

 private:
  const SkinnyProduct<T>& p_;
  const int64_t padded_;
  T *tokens_, *factor_, *sums_;
  const T** rows_;
};

// Σ over tokens of weights · rows.
template <typename Kind, typename T>
class Sums {
  using Raw = typename Kind::Raw;
  static constexpr int64_t kPanel = kPanelTokens<T>;

 public:
  Sums(const AdapterSums<T>& sums, Arena& arena) : p_(sums) {
    staged_ = arena.take<T>(kPanel * kSumColumns);
    rows_ = arena.take<const T*>(kPanel);
    chain_ = arena.take<T>((p_.rank + 1) * kSumColumns);
    sums_ = arena.take<T>(p_.rank * kSumColumns);
    turned_ = arena.take<T>(p_.transposed ? p_.rank * kSumColumns : 0);
  }

  void run(int64_t begin, int64_t end) {
    const int64_t width = end - begin;
    T* const out = sums_;
    std::memset(out, 0, sizeof(T) * static_cast<size_t>(p_.rank * kSumColumns));
    for (int64_t first = p_.first; first < p_.last; first += kChainTokens) {
      const int64_t last = at_most(first + kChainTokens, p_.last);
      std::memset(chain_, 0, sizeof(T) * static_cast<size_t>((p_.rank + 1) * kSumColumns));
      for (int64_t i = first; i < last;) {
        const int64_t stop = at_most((i / kPanel + 1) * kPanel, last);
        for (int64_t j = i; j < stop; ++j) {
          rows_[j - i] = staged_ + (j - i) * kSumColumns;
          stage(static_cast<const Raw*>(p_.rows[j]) + begin, width, kSumColumns, staged_ + (j - i) * kSumColumns);
        }
        const T* const weights = p_.weights + i / kPanel * p_.rank * kPanel + i % kPanel;
        weigh_values<kPanel, 1>(weights, p_.rank, rows_, stop - i, kSumColumns, chain_);
        i = stop;
      }
      for (int64_t n = 0; n < p_.rank * kSumColumns; ++n) out[n] += chain_[n];
    }
    if (!p_.transposed) {
      for (int64_t r = 0; r < p_.rank; ++r) write(out + r * kSumColumns, width, r * p_.width + begin);
      return;
    }
    for (int64_t r = 0; r < p_.rank; ++r) {
      for (int64_t k = 0; k < width; ++k) turned_[k * p_.rank + r] = out[r * kSumColumns + k];
    }
    write(turned_, width * p_.rank, begin * p_.rank);
  }

 private:
  void write(const T* from, int64_t count, int64_t at) const {
    if (!p_.is_float32) return write_row(from, T(1), count, static_cast<Raw*>(p_.out) + at);
    if constexpr (sizeof(T) == 4) write_row(from, T(1), count, static_cast<float*>(p_.out) + at);
    if constexpr (sizeof(T) == 8) {
      for (int64_t k = 0; k < count; ++k) static_cast<float*>(p_.out)[at + k] = static_cast<float>(from[k]);
    }
  }

  const AdapterSums<T>& p_;
  T *staged_, *chain_, *sums_, *turned_;
  const T** rows_;
};

template <typename T>
bool reads_in_place(Element element, int64_t width) {
  bool found = false;
  with_kind<T>(element, [&](auto kind) { found = reads_in_place_of<decltype(kind)>(width); });
  return found;
}

template <typename T>
int64_t row_bytes(Element element, int64_t width) {
  int64_t bytes = 0;
  with_kind<T>(element, [&](auto kind) {
    using K = decltype(kind);
    bytes = round_up(width, K::Dot::kColumns) * static_cast<int64_t>(sizeof(Operand<K>));
  });
  return bytes;
}

template <typename T>
void stage_row(Element element, int64_t width, const void* row, void* out) {
  with_kind<T>(element, [&](auto kind) {
    using K = decltype(kind);
    stage(static_cast<const typename K::Raw*>(row), width, round_up(width, K::Dot::kColumns), static_cast<Operand<K>*>(out));
  });
}

template <typename T>
void sum_columns(Element element, const void* const* rows, int64_t count, int64_t begin, int64_t end, T* out) {
  with_kind<T>(element, [&](auto kind) {
    using Raw = typename decltype(kind)::Raw;
    double total[kSumColumns] = {};
    for (int64_t first = 0; first < count; first += kChainTokens) {
      T chain[kSumColumns] = {};
      for (int64_t i = first; i < at_most(first + kChainTokens, count); ++i) {
        add_row(T(1), static_cast<const Raw*>(rows[i]) + begin, end - begin, chain);
      }
      for (int64_t k = 0; k < end - begin; ++k) total[k] += static_cast<double>(chain[k]);
    }
    for (int64_t k = 0; k < end - begin; ++k) out[k] = static_cast<T>(total[k]);
  });
}

template <typename T>
constexpr NF4Backward<T> kKernels = {kPanelTokens<T>,
                                     kSumColumns,
                                     reads_in_place<T>,
                                     row_bytes<T>,
                                     stage_row<T>,
                                     scratch_bytes_of<Input, T, NF4InputPass<T>>,
                                     run_worker<Input, T, NF4InputPass<T>, int64_t>,
                                     scratch_bytes_of<SkinnyTransposed, T, SkinnyProduct<T>>,
                                     run_worker<SkinnyTransposed, T, SkinnyProduct<T>, T*>,
                                     scratch_bytes_of<Sums, T, AdapterSums<T>>,
                                     run_worker<Sums, T, AdapterSums<T>, int64_t, int64_t>,
                                     sum_columns<T>};

}  // namespace

void nf4_kernels(NF4Backward<float>& kernels) { kernels = kKernels<float>; }
void nf4_kernels(NF4Backward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
