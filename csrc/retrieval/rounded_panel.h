// The first pass of several queries, where the ISA multiplies pairs of bfloat16 and quads of int8: panels of few bits.
//
// A panel's rows are rounded to bfloat16 (those of int8 stay), transposed as 32-bit words of two or four columns, and meet the
// rounded queries at two or four times the rate of float32. With e = q - round(q), D columns and the chain that defines a score,
//     float:  |chain - round(q) · round(x)|  <=  (|e| + 2^-8 |q| + 2 (D + 8) 2^-24 |q|) · |x|  +  (D + 8) 2^-125
//     int8:   rounded_query.h, of 8 bits
// by Cauchy and Schwarz; 2^-8 |q| |x| is what rounding x costs. |x| comes from the rounded row, by the same products. Pairs of a query
// and an item whose bound passes are gathered, 16 at a time whatever their queries, and scored by the chain of all other paths,
// so results are the same bits. A panel of which many pairs pass is followed by some that are scored in full.
//
// A query has a margin, the bracket above, and a row a size: at least |x|, or 1 for int8, times |scale|. The bound of a score is
// product · scale + margin · size, rounded, + bias, rounded: as the score itself is, so that what overflows or is rounded up there
// is here too. What is lost where numbers become subnormal: margins are at least 2^-50 and sizes 2^-70, which is 2^-120 to spare.
// Where sums overflow: margins are at most 2^50, so |q| is at most 2^58, and |x| is below 2^64 unless its square is infinite.
#pragma once

#include "rounded_query.h"
#include "selection.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

namespace mmrec {
namespace MMREC_ISA {
namespace {

// Words of a rounded row, 16 per vector, and their products.
template <ItemType type>
struct Rounded;
template <>
struct Rounded<ItemType::kFloat32> {
  static constexpr int kColumns = 2;  // of a word
  static constexpr int64_t kMaxWidth = kMaxRoundedWidth;

  using Sum = F32;
  MMREC_INLINE static Sum start(int32_t) { return broadcast(0.0f); }
  MMREC_INLINE static Sum multiply(Word x, Word q, Sum acc) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)x, (__m512bh)q)}; }
  MMREC_INLINE static Word load(const char* row) {
    return (Word)append_bf16(as_float(load_words(row)), as_float(load_words(row + 64))).v;
  }
  // Of fewer columns than a vector has; then zeros.
  MMREC_INLINE static Word load(const char* row, int64_t columns) {
    const Word low = columns < 16 ? load_words(row, 4 * columns) : load_words(row);
    const Word high = columns <= 16 ? every_word(0) : load_words(row + 64, 4 * (columns - 16));
    return (Word)append_bf16(as_float(low), as_float(high)).v;
  }
  MMREC_INLINE static F32 product(Sum acc, float) { return acc; }
};
template <>
struct Rounded<ItemType::kInt8> {
  static constexpr int kColumns = 4;
  static constexpr int64_t kMaxWidth = RoundedQuery::kMaxWidth;

  // Not Word, whose lanes are of 64 bits: the compiler keeps sums that it has to cast in memory.
  typedef int32_t Sum __attribute__((vector_size(64)));
  MMREC_INLINE static Sum start(int32_t sum) { return (Sum)_mm512_set1_epi32(sum); }
  MMREC_INLINE static Sum multiply(Word x, Word q, Sum acc) { return (Sum)_mm512_dpbusd_epi32((Word)acc, x, q); }
  MMREC_INLINE static Word to_unsigned(Word x) { return _mm512_xor_si512(x, every_word(0x80808080)); }
  MMREC_INLINE static Word load(const char* row) { return to_unsigned(load_words(row)); }
  MMREC_INLINE static Word load(const char* row, int64_t columns) { return to_unsigned(load_words(row, columns)); }
  MMREC_INLINE static F32 product(Sum acc, float step) { return mul({_mm512_cvtepi32_ps((Word)acc)}, broadcast(step)); }
};

// A query as the first pass knows it: its product with a row is step times the sum.
struct RoundedOne {
  int32_t start;  // of the sum
  float step, margin;
};

// All queries of a scan, in its scratch: rounded, in groups, and row by row as they are.
template <ItemType type>
struct RoundedQueries {
  static constexpr int kColumns = Rounded<type>::kColumns;
  int64_t steps = 0;         // words of a row
  float* rows = nullptr;     // [num_queries][width]
  uint32_t* words = nullptr; // [groups][steps][kQueryGroup]
  RoundedOne* ones = nullptr;

  // False where a query cannot be rounded so that its bounds are of use.
  bool round(const TopkScan<float>& scan) {
    const int64_t width = scan.width, groups = divide_up(scan.num_queries, kQueryGroup);
    if (width > Rounded<type>::kMaxWidth || scan.rounded == nullptr) return false;
    steps = divide_up(width, kColumns);
    rows = scan.rounded;
    words = reinterpret_cast<uint32_t*>(rows + groups * kQueryGroup * width);
    ones = reinterpret_cast<RoundedOne*>(words + groups * kQueryGroup * steps);
    for (int64_t b = 0; b < scan.num_queries; ++b) {
      const float* const query = scan.queries + b / kQueryGroup * kQueryGroup * scan.steps + b % kQueryGroup;
      for (int64_t d = 0; d < width; ++d) rows[b * width + d] = query[d * kQueryGroup];
      if (!round_one(query, width, words + b / kQueryGroup * kQueryGroup * steps + b % kQueryGroup, ones[b])) return false;
    }
    return true;
  }

 private:
  static bool bound(double margin, RoundedOne& one) {
    one.margin = static_cast<float>(margin + 0x1p-50);
    return one.margin <= 0x1p50f;  // and is not NaN
  }

  bool round_one(const float* query, int64_t width, uint32_t* to, RoundedOne& one) const {
    if constexpr (type == ItemType::kInt8) {
      RoundedQuery rounded;
      if (!rounded.round(query, width) || rounded.bytes != 1) return false;
      for (int64_t s = 0; s < steps; ++s) std::memcpy(to + s * kQueryGroup, rounded.high + 4 * s, 4);
      one.start = -rounded.offset;
      one.step = rounded.step;
      return bound(rounded.margin, one);
    } else {
      double squares = 0, missed = 0;
      for (int64_t s = 0; s < steps; ++s) {
        uint32_t word = 0;
        for (int c = 0; c < 2 && 2 * s + c < width; ++c) {
          const float q = query[(2 * s + c) * kQueryGroup];
          const BFloat16 near = narrow(q);
          word |= uint32_t{near.bits} << (16 * c);
          const double lost = static_cast<double>(q) - widen(near);
          squares += static_cast<double>(q) * q;
          missed += lost * lost;
        }
        to[s * kQueryGroup] = word;
      }
      one.start = 0;
      one.step = 1;
      const double roundings = 2 * static_cast<double>(width + 8) * 0x1p-24;
      return bound(1.02 * (__builtin_sqrt(missed) + __builtin_sqrt(squares) * (0x1p-8 + roundings)), one);
    }
  }
};

// Not inlined: beside it the compiler makes a slower loop of the whole blocks.
template <ItemType type>
__attribute__((noinline)) void load_last_rounded(const char* const* rows, int64_t offset, int64_t columns, Word* block) {
  for (int i = 0; i < F32::kLanes; ++i) block[i] = Rounded<type>::load(rows[i] + offset, columns);
  transpose_words(block);
}

// The words of a panel's rows, [steps][kPanelRows] in Panel::values, and the rows' sizes.
template <ItemType type>
void pack_rounded(const TopkScan<float>& scan, const Panel<float>& panel, float* sizes) {
  constexpr int kLanes = F32::kLanes, kColumns = Rounded<type>::kColumns * kLanes;
  Word* const words = reinterpret_cast<Word*>(panel.values);
  for (int v = 0; v < kVectors; ++v) {
    const char* const* const rows = panel.rows + v * kLanes;
    F32 squares[4];  // whose chains overlap
    for (F32& some : squares) some = broadcast(0.0f);
    for (int64_t column = 0; column < scan.width; column += kColumns) {
      const int64_t offset = column * item_bytes(type), left = scan.width - column;
      Word block[kLanes];
      Word* const at = words + column / Rounded<type>::kColumns * kVectors + v;
      const auto put = [&](int w) __attribute__((always_inline)) {
        at[w * kVectors] = block[w];
        if constexpr (type != ItemType::kInt8) squares[w % 4] = Rounded<type>::multiply(block[w], block[w], squares[w % 4]);
      };
      if (left >= kColumns) {
        for (int i = 0; i < kLanes; ++i) block[i] = Rounded<type>::load(rows[i] + offset);
        transpose_words(block);
#pragma GCC unroll 16
        for (int w = 0; w < kLanes; ++w) put(w);
      } else {
        load_last_rounded<type>(rows, offset, left, block);
        for (int w = 0; w * Rounded<type>::kColumns < left; ++w) put(w);
      }
    }
    F32 size = broadcast(1.0f);
    if constexpr (type != ItemType::kInt8) {
      const F32 sum = add(add(squares[0], squares[1]), add(squares[2], squares[3]));
      size = {_mm512_sqrt_ps(add(sum, broadcast(0x1p-110f)).v)};  // more than what squares lose to subnormals
    }
    if (scan.scales != nullptr) size = fma(size, abs(load(panel.scale + v * kLanes)), broadcast(0x1p-70f));
    store(sizes + v * kLanes, size);
  }
}

// Pairs of a query and an item whose bound passed, to be scored by the chain.
template <ItemType type>
class Pairs {
 public:
  static constexpr int kLanes = F32::kLanes;

  Pairs(const TopkScan<float>& scan, const float* queries) : scan_(scan), queries_(queries) {}

  // Rows of vector v of a panel whose bit is set; how many they are.
  __attribute__((noinline)) int64_t add(int64_t query, const Panel<float>& panel, int v, uint32_t bits) {
    const int left = panel.count - v * kLanes;
    bits &= left > 0 ? lanes_before<kLanes>(left) : 0;
    const int64_t added = __builtin_popcount(bits);
    for (; bits != 0; bits &= bits - 1) {
      query_[count_] = query;
      id_[count_++] = panel.first + v * kLanes + __builtin_ctz(bits);
      if (count_ == kLanes) score();
    }
    return added;
  }

  // Scores those that are gathered and lets them into their selections.
  __attribute__((noinline)) void score() {
    if (count_ == 0) return;
    const int64_t step = scan_.row_stride * item_bytes(type);
    const char *items[kLanes], *queries[kLanes];
    float scale[kLanes], bias[kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const int pair = i < count_ ? i : count_ - 1;
      const int64_t row = id_[pair];
      items[i] = static_cast<const char*>(scan_.items) + row * step;
      queries[i] = reinterpret_cast<const char*>(queries_ + query_[pair] * scan_.width);
      if (scan_.scales != nullptr) scale[i] = scan_.scales[row];
      if (scan_.bias != nullptr) bias[i] = scan_.bias[row];
    }
    F32 chain = chains(items, queries);
    if (scan_.scales != nullptr) chain = mul(chain, load(scale));
    if (scan_.bias != nullptr) chain = mmrec::MMREC_ISA::add(chain, load(bias));
    float scores[kLanes];
    store(scores, chain);
    for (int i = 0; i < count_; ++i) {
      Selection<float>& selection = scan_.selections[query_[i]];
      if (scores[i] > selection.threshold) append(scan_, selection, scores[i], id_[i]);
    }
    count_ = 0;
  }

 private:
  // Lane i: the chain of item i with query i.
  MMREC_INLINE F32 chains(const char* const* items, const char* const* queries) const {
    constexpr int kPerWord = Columns<type>::kPerWord;
    const int64_t width = scan_.width, bytes = width * item_bytes(type);
    F32 acc = broadcast(0.0f);
    for (int64_t word = 0; word * kPerWord < width; word += kLanes) {
      Word x[kLanes];
      load_block(items, word * 4, bytes, x);
      for (int part = 0; part < kPerWord; ++part) {
        const int64_t column = word * kPerWord + part * kLanes;
        if (column >= width) break;
        Word q[kLanes];
        load_block(queries, column * 4, width * 4, q);
        const auto step = [&](int i) __attribute__((always_inline)) {
          F32 columns[kPerWord];
          Columns<type>::widen(x[(part * kLanes + i) / kPerWord], columns);
          acc = fma(columns[i % kPerWord], as_float(q[i]), acc);
        };
        if (width - column >= kLanes) {
          for (int i = 0; i < kLanes; ++i) step(i);
        } else {
          for (int i = 0; i < width - column; ++i) step(i);
        }
      }
    }
    return acc;
  }

  const TopkScan<float>& scan_;
  const float* queries_;
  int count_ = 0;
  int64_t query_[kLanes], id_[kLanes];
};

// A group of queries and a panel: pairs whose bound passes their query's threshold. How many they are.
template <int kQueries, ItemType type>
int64_t pass_group(const TopkScan<float>& scan, const Panel<float>& panel, const float* sizes,
                   const RoundedQueries<type>& queries, int64_t first_query, NextPanel& next, Pairs<type>& pairs) {
  constexpr int kLanes = F32::kLanes;
  const uint32_t* const words = queries.words + first_query * queries.steps;
  const RoundedOne* const ones = queries.ones + first_query;
  const Word* const x_words = reinterpret_cast<const Word*>(panel.values);
  typename Rounded<type>::Sum acc[kQueries][kVectors];
  for (int i = 0; i < kQueries; ++i) {
    for (int v = 0; v < kVectors; ++v) acc[i][v] = Rounded<type>::start(ones[i].start);
  }
  for (int64_t s = 0; s < queries.steps; ++s) {
    next.ask();
    Word x[kVectors];
    for (int v = 0; v < kVectors; ++v) x[v] = x_words[s * kVectors + v];
    for (int i = 0; i < kQueries; ++i) {
      const Word q = every_word(words[s * kQueryGroup + i]);
      for (int v = 0; v < kVectors; ++v) acc[i][v] = Rounded<type>::multiply(x[v], q, acc[i][v]);
    }
  }
  int64_t count = 0;
  for (int v = 0; v < kVectors; ++v) {
    const F32 size = load(sizes + v * kLanes), scale = load(panel.scale + v * kLanes), bias = load(panel.bias + v * kLanes);
    for (int i = 0; i < kQueries; ++i) {
      const F32 margin = mul(size, broadcast(ones[i].margin));
      const F32 most = add(fma(Rounded<type>::product(acc[i][v], ones[i].step), scale, margin), bias);
      const uint32_t bits = not_at_most(most, broadcast(scan.selections[first_query + i].threshold));
      if (__builtin_expect(bits != 0, 0)) count += pairs.add(first_query + i, panel, v, bits);
    }
  }
  return count;
}

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec

#endif
