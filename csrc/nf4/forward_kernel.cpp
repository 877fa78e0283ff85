// NF4 linear, the forward: y = x Wᵀ + (s x aᵀ) bᵀ + bias over some rows of W, which are decoded once for all tokens.
//
// few(): tokens are few, the width lies in lanes, and W goes from its bytes through registers into the products; the adapter's
//     terms are what the lanes' sums start from. Work is reading W: 0.52 bytes per weight.
// many(): tokens lie in lanes, packed beforehand. Rows of W are decoded 256 words at a time into the first two levels of cache
//     and broadcast from there; the adapter's products are what the tiles' sums start from.

#include "few_rows.h"
#include "skinny.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

constexpr int64_t kTaskRows = 4 * kGroup;
// Words of W that are decoded at a time, a row of them.
constexpr int64_t kDecodedWords = 256;
// The most tokens that have the width in lanes: in parts, for which W is decoded each time, where it goes through registers only.
template <typename Kind>
constexpr int64_t most_few_of() {
  return kIsFused<Kind> ? 2 * kPart<Kind> : kFewRows;
}
// From the results of one row of W to the next.
constexpr int64_t kFewStride = 28;

template <typename Kind>
constexpr int64_t parts_of(int64_t count) {
  return kIsFused<Kind> ? (count + kPart<Kind> - 1) / kPart<Kind> : count;
}
// As equal as they get.
template <typename Kind>
constexpr int64_t part_begin(int64_t count, int64_t part) {
  return count * part / parts_of<Kind>(count);
}

template <typename T>
int64_t padded_rank(int64_t rank) {
  return round_up(rank, Vec<T>::kLanes);
}

template <typename Kind, typename T>
class Task {
  using Raw = typename Kind::Raw;
  using Dot = typename Kind::Dot;
  using Word = typename Dot::Word;
  using V = Vec<T>;
  static constexpr int64_t kLanes = V::kLanes, kPanel = kPanelTokens<T>;

 public:
  Task(const NF4Pass<T>& pass, Arena& arena) : p_(pass) {
    absmax_ = arena.take<float>(absmax_count(p_.weight, kTaskRows));
    const int64_t panels = (p_.count + kPanel - 1) / kPanel;
    if (p_.few) {
      start_ = arena.take<T>(2 * kFewStride * kLanes);
      decoded_ = arena.take<Operand<Kind>>(kIsFused<Kind> ? 0 : 4 * padded_columns(p_.weight.columns));
      y_ = arena.take<T>((kTaskRows + 4) * kFewStride);
      line_ = arena.take<T>(kTaskRows + kLanes);
    } else {
      decoded_ = arena.take<Operand<Kind>>(kTaskRows * kDecodedWords * Dot::kColumns);
      keys_ = arena.take<const Word*>(kTaskRows + 1);
      factor_ = arena.take<T>(kTaskRows * p_.rank);
      factor_keys_ = arena.take<const T*>(kTaskRows + 1);
      sums_ = arena.take<T>((kTaskRows + 1) * panels * kPanel);
      line_ = arena.take<T>((kPanel + kLanes) * kTaskRows);
    }
  }

  // Rows [begin, end) of W.
  void run(int64_t begin, int64_t end) { p_.few ? few(begin, end) : many(begin, end); }

 private:
  // ---- the width in lanes ----
  void few(int64_t begin, int64_t end) {
    const Weight w = weight_rows(p_.weight, begin, end, absmax_);
    if constexpr (kIsFused<Kind>) {
#if defined(__AVX512F__)
      Start<Kind> starts[2];
      for (int64_t part = 0; part < parts_of<Kind>(p_.count); ++part) {
        const int64_t first = part_begin<Kind>(p_.count, part);
        starts[part] = start_of(first, part_begin<Kind>(p_.count, part + 1) - first);
      }
      for (int64_t n = begin; n < end; n += 2) {
        for (int64_t part = 0; part < parts_of<Kind>(p_.count); ++part) {
          const int64_t first = part_begin<Kind>(p_.count, part), count = part_begin<Kind>(p_.count, part + 1) - first;
          n + 1 < end ? few_rows<2>(w, n, first, count, starts[part]) : few_rows<1>(w, n, first, count, starts[part]);
          for (int64_t r = 0; r < 2; ++r) {
            for (int64_t m = 0; m < count; m += 4) {
              F32 four[4];
              for (int64_t i = 0; i < 4; ++i) four[i] = load(start_ + (r * count + at_most(m + i, count - 1)) * kLanes);
              _mm_storeu_ps(y_ + (n - begin + r) * kFewStride + first + m, four_sums(four[0], four[1], four[2], four[3]));
            }
          }
        }
      }
#endif
    } else {
      const int64_t padded = padded_columns(p_.weight.columns);
      for (int64_t n = begin; n < end; n += 4) {
        const Word* rows[4];
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t row = at_most(n + i, end - 1);
          rows[i] = decoded_ + (row - n) * padded;
          if (row < n + i) continue;
          for (int64_t k = 0; k < padded; k += kGroupColumns) decode_operands<Kind>(w, row, k, decoded_ + i * padded + k);
        }
        T* const to = y_ + (n - begin) * kFewStride;
        few_scores(rows, 4, static_cast<const T*>(p_.tokens), p_.count, padded, to, kFewStride);
        for (int64_t i = 0; p_.rank > 0 && i < 4 && n + i < end; ++i) {
          find_adapter_terms(n + i, 0, p_.count, start_);
          for (int64_t m = 0; m < p_.count; ++m) to[i * kFewStride + m] += reduce_add(load(start_ + m * kLanes));
        }
      }
    }
    const int64_t rows = end - begin;
    for (int64_t m = 0; m < p_.count; ++m) {
      for (int64_t i = 0; i < rows; ++i) line_[i] = y_[i * kFewStride + m];
      write(line_, begin, rows, m);
    }
  }

  // ---- tokens in lanes ----
  void many(int64_t begin, int64_t end) {
    const Weight w = weight_rows(p_.weight, begin, end, absmax_);
    const int64_t rows = end - begin, panels = (p_.count + kPanel - 1) / kPanel, stride = panels * kPanel;
    const int64_t padded = padded_columns(p_.weight.columns), words = padded / Dot::kColumns;
    const bool adapted = p_.rank > 0 || words == 0;
    if (adapted) start_sums(begin, rows, stride);
    constexpr int64_t kStep = kDecodedWords * Dot::kColumns;
    for (int64_t i = 0; i <= rows; ++i) keys_[i] = reinterpret_cast<const Word*>(decoded_ + at_most(i, rows - 1) * kStep);
    for (int64_t column = 0; column < padded; column += kStep) {
      const int64_t columns = at_most(kStep, padded - column), depth = columns / Dot::kColumns;
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t k = 0; k < columns; k += kGroupColumns) {
          decode_operands<Kind>(w, begin + i, column + k, decoded_ + i * kStep + k);
        }
      }
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t lanes = round_up(at_most(kPanel, p_.count - p * kPanel), kLanes);
        const Word* const x = static_cast<const Word*>(p_.tokens) + p * kPanel * words + column / Dot::kColumns * lanes;
        if (adapted || column > 0) {
          score_block<Dot, true>(keys_, rows, x, lanes, depth, sums_ + p * kPanel, stride);
        } else {
          score_block<Dot>(keys_, rows, x, lanes, depth, sums_ + p * kPanel, stride);
        }
      }
    }
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t count = at_most(kPanel, p_.count - p * kPanel);
      pack_lanes<Plain<T>>(sums_ + p * kPanel, stride, rows, count, kTaskRows, line_);
      for (int64_t i = 0; i < count; ++i) write(line_ + i * kTaskRows, begin, rows, p * kPanel + i);
    }
  }

#if defined(__AVX512F__)
  // Of `count` tokens.
  Start<Kind> start_of(int64_t first, int64_t count) const {
    if (p_.rank == 0) return {};
    const int64_t adapter = p_.adapters[first], padded = padded_rank<T>(p_.rank);
    bool is_shared = adapter >= 0 && count >= kSharing;
    for (int64_t m = 1; m < count; ++m) is_shared = is_shared && p_.adapters[first + m] == adapter;
    if (!is_shared) return {true, 0, {}, nullptr, 0};
    return {false, p_.rank, {p_.b.of(adapter, sizeof(Raw)), p_.b.is_float32, 0}, p_.lora_x + first * padded, padded};
  }

  // The lanes' sums of R rows and some tokens, in start_.
  template <int R>
  void few_rows(const Weight& w, int64_t n, int64_t first, int64_t count, const Start<Kind>& start) {
    for (int64_t r = 0; start.is_kept && r < R; ++r) find_adapter_terms(n + r, first, count, start_ + r * count * kLanes);
    const Operand<Kind>* const tokens = static_cast<const Operand<Kind>*>(p_.tokens) + first * padded_columns(p_.weight.columns);
    switch (count) {
#define MMREC_CASE(M) \
  case M: return add_rows<Kind, R, M>(w, n, tokens, start, start_);
      MMREC_CASE(1) MMREC_CASE(2) MMREC_CASE(3) MMREC_CASE(4) MMREC_CASE(5) MMREC_CASE(6) MMREC_CASE(7) MMREC_CASE(8)
      MMREC_CASE(9) MMREC_CASE(10)
#undef MMREC_CASE
      case 11: if constexpr (kPart<Kind> >= 12) return add_rows<Kind, R, 11>(w, n, tokens, start, start_); break;
      case 12: if constexpr (kPart<Kind> >= 12) return add_rows<Kind, R, 12>(w, n, tokens, start, start_); break;
      default: break;
    }
  }
#endif

  // The adapters' terms of row n and `count` tokens, a vector for each that is still to be added up; 0 where there is none.
  void find_adapter_terms(int64_t n, int64_t first, int64_t count, T* out) const {
    if (p_.b.is_float32) {
      add_adapter_terms(static_cast<const float*>(p_.b.data), n, first, count, out);
    } else {
      add_adapter_terms(static_cast<const Raw*>(p_.b.data), n, first, count, out);
    }
  }
  template <typename X>
  void add_adapter_terms(const X* b, int64_t n, int64_t first, int64_t count, T* out) const {
    const int64_t padded = padded_rank<T>(p_.rank);
    for (int64_t m = 0; m < count; ++m) {
      const int64_t adapter = p_.adapters[first + m];
      const X* const row = b + (adapter < 0 ? 0 : adapter) * p_.b.stride + n * p_.rank;
      const T* const s = p_.lora_x + (first + m) * padded;
      V sum = broadcast(T(0));
      for (int64_t j = 0; adapter >= 0 && j < p_.rank; j += kLanes) {
        sum = fma(load_part<T>(row + j, p_.rank - j), load(s + j), sum);
      }
      store(out + m * kLanes, sum);
    }
  }

  // The sums before W's products: those of each token's adapter, or 0.
  void start_sums(int64_t begin, int64_t rows, int64_t stride) {
    std::memset(sums_, 0, sizeof(T) * static_cast<size_t>(rows * stride));
    const int64_t panels = stride / kPanel;
    int64_t staged = -1;
    for (int64_t p = 0; p_.rank > 0 && p < panels; ++p) {
      for (int64_t a = p_.first_range[p]; a < p_.first_range[p + 1]; ++a) {
        const AdapterRange& range = p_.ranges[a];
        if (staged != range.adapter) stage_adapter(range.adapter, begin, rows);
        staged = range.adapter;
        score_block<Plain<T>>(factor_keys_, rows, p_.lora_x + p * kPanel * p_.rank, kPanel, p_.rank, line_, kPanel);
        for (int64_t i = 0; i < rows; ++i) {
          std::memcpy(sums_ + i * stride + p * kPanel + range.begin, line_ + i * kPanel + range.begin,
                      sizeof(T) * static_cast<size_t>(range.end - range.begin));
        }
      }
    }
  }

  void stage_adapter(int64_t adapter, int64_t begin, int64_t rows) {
    const int64_t at = adapter * p_.b.stride + begin * p_.rank;
    const void* const from = p_.b.is_float32 ? static_cast<const void*>(static_cast<const float*>(p_.b.data) + at)
                                             : static_cast<const Raw*>(p_.b.data) + at;
    stage_factor<Raw>(from, p_.b.is_float32, p_.rank, rows, p_.rank, p_.rank, factor_);
    for (int64_t i = 0; i <= rows; ++i) factor_keys_[i] = factor_ + at_most(i, rows - 1) * p_.rank;
  }

  void write(T* line, int64_t begin, int64_t rows, int64_t token) const {
    if (p_.bias != nullptr) {
      for (int64_t i = 0; i < rows; ++i) line[i] += p_.bias[begin + i];
    }
    write_row(line, T(1), rows, static_cast<Raw*>(p_.outputs[token]) + begin);
  }

  const NF4Pass<T>& p_;
  float* absmax_ = nullptr;
  Operand<Kind>* decoded_ = nullptr;
  T *start_ = nullptr, *y_ = nullptr, *line_ = nullptr, *factor_ = nullptr, *sums_ = nullptr;
  const Word** keys_ = nullptr;
  const T** factor_keys_ = nullptr;
};

template <typename T>
int64_t most_few(Element element) {
  int64_t most = 0;
  with_kind<T>(element, [&](auto kind) { most = most_few_of<decltype(kind)>(); });
  return most;
}

template <typename T>
int64_t token_bytes(Element element, int64_t width) {
  int64_t bytes = 0;
  with_kind<T>(element, [&](auto kind) { bytes = padded_columns(width) * static_cast<int64_t>(sizeof(Operand<decltype(kind)>)); });
  return bytes;
}

// Few tokens: [token][padded width], or for each part [group][token][column of the group].
template <typename T>
void stage_tokens(Element element, int64_t width, const void* const* rows, int64_t count, void* tokens) {
  with_kind<T>(element, [&](auto kind) {
    using K = decltype(kind);
    for (int64_t part = 0; part < parts_of<K>(count); ++part) {
      const int64_t first = part_begin<K>(count, part), last = part_begin<K>(count, part + 1);
      auto* to = static_cast<Operand<K>*>(tokens) + first * padded_columns(width);
      for (int64_t column = 0; column < width; column += kGroupColumns) {
        for (int64_t m = first; m < last; ++m, to += kGroupColumns) {
          stage_operands<K>(static_cast<const typename K::Raw*>(rows[m]), column, width, to);
        }
      }
    }
  });
}

template <typename T>
int64_t pack_bytes(Element) {
  return kPanelTokens<T> * kGroupColumns * static_cast<int64_t>(sizeof(T));
}

template <typename T>
void pack(Element element, int64_t width, const void* const* rows, int64_t count, void* tokens, char* scratch) {
  with_kind<T>(element, [&](auto kind) {
    using K = decltype(kind);
    pack_tokens<K>(rows, count, width, round_up(count, Vec<T>::kLanes), reinterpret_cast<Operand<K>*>(scratch),
                   static_cast<typename K::Dot::Word*>(tokens));
  });
}

template <typename T>
constexpr NF4Forward<T> kKernels = {kPanelTokens<T>,
                                    kTaskRows,
                                    most_few<T>,
                                    kFewRows,
                                    padded_rank<T>,
                                    token_bytes<T>,
                                    stage_tokens<T>,
                                    pack<T>,
                                    pack_bytes<T>,
                                    scratch_bytes_of<Task, T, NF4Pass<T>>,
                                    run_worker<Task, T, NF4Pass<T>, int64_t, int64_t>,
                                    scratch_bytes_of<Skinny, T, SkinnyProduct<T>>,
                                    run_worker<Skinny, T, SkinnyProduct<T>, T*>};

}  // namespace

void nf4_kernels(NF4Forward<float>& kernels) { kernels = kKernels<float>; }
void nf4_kernels(NF4Forward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
