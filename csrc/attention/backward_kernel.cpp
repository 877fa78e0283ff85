// Attention, the backward: the weights again, and what they and their slopes make of rows and keys.
//
//     P_rj = exp(s_rj − lse_r)        dP_rj = dO_r · v_j        dS_rj = P_rj (gate_rm dP_rj + dmass_rm − D_r + dlse_r)
//     D_r = dO_r · out_r + Σ_m dmass_rm mass_rm
//     dq_r = scale Σ_j dS_rj k_j      dk_j = scale Σ_r dS_rj q_r      dv_j = Σ_r gate_rm P_rj dO_r
//
// A KV head of a sequence has one owner, which walks the keys; with some of them at hand it meets all rows. So sums of keys are
// complete when the next keys come, sums of rows at the end, and every sum has a fixed order. Five products of
// 2 · rows · keys · width flops where the forward has two. KV heads with few rows are parts of one block, as in the forward.

#include "keys.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename Kind, typename T>
struct Block : Rows {
  using Word = typename Kind::Dot::Word;
  T* queries;         // [rows][width]: times the norms' weights
  T* for_keys;        // [rows][width]: what keys receive, dS_rj times it: normalised, without the keys' weights
  T* grads;           // [rows][value width]: dO
  Word* packed;       // [depth][lanes]
  Word* packed_grads; // [value depth][lanes]
  float *pairs, *grad_pairs;  // [rows / 2][width]: rows of for_keys and grads by two, where products are of pairs
  T* sums;            // [kMoreRows][width]: Σ_j dS_rj rstd_j k_j
  T* factor;          // [kBlockRows], as all of these: x = factor (s − near − rest) + shift
  T *near, *rest, *shift, *gate, *constant, *slope;  // constant: dmass − D + dlse; slope: − D + dlse
  double* exact;  // the factor before it is rounded
  int64_t* result;  // the row of the results, [row][head]
  T *bias_sums, *gate_sums;  // [segments][kBlockRows]
  const T **query_rows, **grad_rows;
  bool finite;  // what is added up row by row, if rows may be hidden from keys
};

template <typename Kind, typename T>
void take(Block<Kind, T>& block, const Attention<T>& a, const Widths<Kind>& w, Arena& arena) {
  using Word = typename Kind::Dot::Word;
  block.queries = arena.take<T>(kBlockRows * w.width);
  block.for_keys = arena.take<T>(kBlockRows * w.width);
  block.grads = arena.take<T>(kBlockRows * w.value_width);
  block.packed = arena.take<Word>(w.depth * kBlockRows + 64);
  block.packed_grads = arena.take<Word>(w.value_depth * kBlockRows + 64);
  block.pairs = arena.take<float>(Kind::Dot::kColumns == 2 ? kBlockRows / 2 * w.width : 0);
  block.grad_pairs = arena.take<float>(Kind::Dot::kColumns == 2 ? kBlockRows / 2 * w.value_width : 0);
  block.sums = arena.take<T>(kMoreRows * w.width);
  T** const vectors[] = {&block.factor, &block.near, &block.rest, &block.shift, &block.gate, &block.constant, &block.slope};
  for (T** vector : vectors) *vector = arena.take<T>(kBlockRows);
  block.exact = arena.take<double>(kBlockRows);
  block.result = arena.take<int64_t>(kBlockRows);
  block.bias_sums = arena.take<T>(a.segments * kBlockRows);
  block.gate_sums = arena.take<T>(a.segments * kBlockRows);
  block.query_rows = arena.take<const T*>(kBlockRows);
  block.grad_rows = arena.take<const T*>(kBlockRows);
}

template <typename Kind, typename T>
int64_t block_bytes(const Attention<T>& a, const Widths<Kind>& w) {
  Block<Kind, T> block;
  Arena arena{nullptr};
  take(block, a, w, arena);
  return arena.used;
}

// How many blocks the rows of a KV head may make.
template <typename T>
int64_t most_blocks(const Attention<T>& a, int64_t queries) {
  const int64_t apart = a.group * ((queries + kBlockRows - 1) / kBlockRows);
  if (a.group > kBlockRows) return apart;
  const int64_t step = kBlockRows / a.group, together = (queries + step - 1) / step;
  return apart > together ? apart : together;
}

template <typename Kind, typename T>
struct Shared {
  static constexpr int64_t kPairWords = kBlockRows / 2;
  T *scores, *slopes;              // [kMoreKeys][kBlockRows]: then weights, and dS
  T* scaled;                       // dS times rstd
  float *value_words, *key_words;  // [kMoreKeys][kPairWords]: weights and dS of two rows a word
  float* query_words;              // [kMoreKeys / 2][kBlockRows]: dS of two keys a word
  T *key_sums, *value_sums;        // [kMoreKeys][width]
  Staged<Kind>* rounded;
  Staged<Kind>* zeros;             // a row of keys
  T* nothing;                      // and one of gradients
  const float** pair_rows;         // [kPairWords]

  Shared(const Widths<Kind>& w, Arena& arena) {
    const int64_t widest = w.width > w.value_width ? w.width : w.value_width;
    scores = arena.take<T>(kMoreKeys * kBlockRows);
    slopes = arena.take<T>(kMoreKeys * kBlockRows);
    scaled = arena.take<T>(kMoreKeys * kBlockRows);
    value_words = arena.take<float>(kMoreKeys * kPairWords);
    key_words = arena.take<float>(kMoreKeys * kPairWords);
    query_words = arena.take<float>(kMoreKeys / 2 * kBlockRows);
    key_sums = arena.take<T>(kMoreKeys * w.width);
    value_sums = arena.take<T>(kMoreKeys * w.value_width);
    rounded = arena.take<Staged<Kind>>(kBlockRows * widest);
    zeros = arena.take<Staged<Kind>>(w.width);
    nothing = arena.take<T>(widest);
    pair_rows = arena.take<const float*>(kPairWords);
    if (zeros != nullptr) std::memset(static_cast<void*>(zeros), 0, sizeof(*zeros) * static_cast<size_t>(w.width));
    if (nothing != nullptr) std::memset(nothing, 0, sizeof(T) * static_cast<size_t>(widest));
  }
};

template <typename Kind, typename T>
class Task {
  using Raw = typename Kind::Raw;
  using Dot = typename Kind::Dot;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kSteps = 3;  // calls of rows_ahead_.some() while a part or block meets keys

 public:
  Task(const Attention<T>& a, const AttentionGradients<T>& to, const AttentionUnit& unit, int64_t next, int64_t most_queries,
       Arena& arena)
      : a_(a),
        to_(to),
        widths_(a, true),
        shared_(widths_, arena),
        keys_(widths_, arena),
        ahead_(a, arena),
        unit_(unit),
        next_(next),
        blocks_(arena.take<Block<Kind, T>>(most_blocks(a, most_queries))),
        arena_(arena),
        queries_(a, unit.sequence) {
    heads_ = a.kv_heads * a.group;
    for (int64_t m = 0; m < a.segments; ++m) {
      keys_needed_ |= to.segment[m].key != nullptr;
      values_needed_ |= to.segment[m].value != nullptr;
      any_causal_ |= a.segment[m].causal;
    }
    keys_needed_ |= to.key_norm != nullptr;
    queries_needed_ = to.query != nullptr || to.latent != nullptr || to.query_norm != nullptr;
  }

  void run() {
    for (kv_head_ = unit_.first_head; kv_head_ < unit_.last_head; kv_head_ += parts_) {
      make_blocks();
      look_at_rows();
      for (int64_t m = 0; m < a_.segments; ++m) meet_segment(m);
      for (int64_t n = 0; n < count_; ++n) finish(blocks_[n]);
    }
    fence();
  }

 private:
  // How many query heads of a KV head share a block.
  int64_t together(int64_t kv_head) const { return heads_of_block(a_, unit_.sequence, kv_head * a_.group); }

  // Those of the KV head at hand, or one whose parts are as many as it holds.
  void make_blocks() {
    Arena arena = arena_;
    const int64_t heads = together(kv_head_), step = kBlockRows / heads, rows = queries_.count * heads;
    parts_ = 1;
    if (heads == a_.group && rows > 0 && rows <= kFewRows) {
      const int64_t most = at_most(kBlockRows / rows, unit_.last_head - kv_head_);
      while (parts_ < most && together(kv_head_ + parts_) == heads) ++parts_;
    }
    count_ = 0;
    for (int64_t head = kv_head_ * a_.group; head < (kv_head_ + 1) * a_.group; head += heads) {
      for (int64_t query = 0; query < queries_.count; query += step) {
        Block<Kind, T>& block = blocks_[count_++];
        take(block, a_, widths_, arena);
        block.first = query;
        block.first_head = head;
        block.heads = heads;
        block.parts = parts_;
        block.part_rows = (at_most(query + step, queries_.count) - query) * heads;
        start(block);
      }
    }
  }

  const Raw* query_of(int64_t query, int64_t head) const {
    return static_cast<const Raw*>(a_.query.values) + (queries_.first + query) * a_.query.row_stride +
           head * a_.query.head_stride;
  }

  bool met_nothing(const Block<Kind, T>& block, int64_t r) const { return to_.lse[block.result[r]] == -__builtin_huge_val(); }

  void start(Block<Kind, T>& block) {
    const Widths<Kind>& w = widths_;
    block.rows = block.parts * block.part_rows;
    block.lanes = round_up(block.rows, kLanes);
    block.finite = true;
    std::memset(block.sums, 0, sizeof(T) * static_cast<size_t>((block.rows + 1) * w.width));
    std::memset(block.bias_sums, 0, sizeof(T) * static_cast<size_t>(a_.segments * kBlockRows));
    std::memset(block.gate_sums, 0, sizeof(T) * static_cast<size_t>(a_.segments * kBlockRows));
    for (int64_t r = block.rows; r < kBlockRows; ++r) {
      block.factor[r] = block.slope[r] = block.near[r] = block.rest[r] = block.constant[r] = T(0);
      block.gate[r] = T(1);
      block.shift[r] = -static_cast<T>(__builtin_huge_val());
    }
    block.for_each([&](int64_t r, int64_t query, int64_t head) {
      block.result[r] = (queries_.first_result + query) * heads_ + head;
      start_row(block, r, query_of(query, head));
    });
    if (block.few()) return;
    pack(block.queries, w.width, a_.width, block, block.packed);
    pack(block.grads, w.value_width, a_.value_width, block, block.packed_grads);
    if constexpr (Dot::kColumns == 2) {
      pair_rows(block.for_keys, w.width, block.rows, block.pairs);
      pair_rows(block.grads, w.value_width, block.rows, block.grad_pairs);
    }
  }

  void start_row(Block<Kind, T>& block, int64_t r, const Raw* query) {
    const Widths<Kind>& w = widths_;
    T *const q = block.queries + r * w.width, *const k = block.for_keys + r * w.width;
    T* const grads = block.grads + r * w.value_width;
    block.query_rows[r] = k;
    block.grad_rows[r] = grads;
    if (met_nothing(block, r)) {  // and may hold anything
      block.factor[r] = block.slope[r] = T(0);
      std::memset(q, 0, sizeof(T) * static_cast<size_t>(w.width));
      std::memset(k, 0, sizeof(T) * static_cast<size_t>(w.width));
      std::memset(grads, 0, sizeof(T) * static_cast<size_t>(w.value_width));
      return;
    }
    const double rstd = a_.query_norm == nullptr ? 1.0 : rstd_of(query, a_.width, a_.norm_eps);
    stage(query, a_.width, w.width, q);
    if (a_.query_norm != nullptr) {
      for (int64_t d = 0; d < a_.width; ++d) q[d] *= a_.query_norm[d];
    }
    for (int64_t d = 0; d < w.width; ++d) k[d] = q[d] * static_cast<T>(rstd);
    if (a_.key_norm != nullptr) {
      for (int64_t d = 0; d < a_.width; ++d) q[d] *= a_.key_norm[d];
    }
    block.exact[r] = a_.scale * kLog2E * rstd;
    block.factor[r] = static_cast<T>(block.exact[r]);
    start_grads(block, r);
    for (int64_t d = 0; any_causal_ && d < a_.width; ++d) block.finite &= k[d] - k[d] == 0;
    for (int64_t d = 0; any_causal_ && d < a_.value_width; ++d) block.finite &= grads[d] - grads[d] == 0;
  }

  // dO of a row, and − D + dlse. What is 0 in a result takes nothing from its gradient, which may be anything there.
  void start_grads(Block<Kind, T>& block, int64_t r) {
    T* const grads = block.grads + r * widths_.value_width;
    const int64_t at = block.result[r];
    double slope = to_.grad_lse != nullptr ? to_.grad_lse[at] : 0.0;
    if (to_.grad_out != nullptr) {
      stage(static_cast<const Raw*>(to_.grad_out) + at * a_.value_width, a_.value_width, widths_.value_width, grads);
      slope -= dot_of_nonzero(static_cast<const Raw*>(to_.out) + at * a_.value_width, grads, a_.value_width);
    } else {
      std::memset(grads, 0, sizeof(T) * static_cast<size_t>(widths_.value_width));
    }
    for (int64_t m = 0; to_.grad_mass != nullptr && m < a_.segments; ++m) {
      const double share = static_cast<double>(to_.mass[at * a_.segments + m]);
      slope -= share == 0 ? 0.0 : share * static_cast<double>(to_.grad_mass[at * a_.segments + m]);
    }
    block.slope[r] = static_cast<T>(slope);
  }

  // Eight chains, so that double precision costs little. Where x is 0, y may be anything.
  static double dot_of_nonzero(const Raw* x, const T* y, int64_t width) {
    double sums[8] = {};
    const auto term = [&](int64_t d) __attribute__((always_inline)) {
      const double a = static_cast<double>(widen(x[d])), product = a * static_cast<double>(y[d]);
      return a == 0 ? 0.0 : product;
    };
    int64_t d = 0;
    for (; d + 8 <= width; d += 8) {
      for (int l = 0; l < 8; ++l) sums[l] += term(d + l);
    }
    for (; d < width; ++d) sums[d % 8] += term(d);
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]));
  }

  void pack(const T* rows, int64_t padded, int64_t width, const Block<Kind, T>& block, typename Dot::Word* packed) {
    if constexpr (Dot::kColumns == 2) {
      stage(rows, block.rows * padded, block.rows * padded, shared_.rounded);
      pack_lanes<Dot>(shared_.rounded, padded, block.rows, width, block.lanes, packed);
    } else {
      pack_lanes<Dot>(rows, padded, block.rows, width, block.lanes, packed);
    }
  }

#if defined(__AVX512BF16__)
  static void pair_rows(const T* rows, int64_t width, int64_t count, float* pairs) {
    for (int64_t r = 0; r < count; r += 2) {
      for (int64_t d = 0; d < width; d += kLanes) {
        const V second = r + 1 < count ? load(rows + (r + 1) * width + d) : broadcast(T(0));
        store(pairs + r / 2 * width + d, pair_bf16(load(rows + r * width + d), second));
      }
    }
  }
#endif

  // x − lse in units of log2 as factor (s − near − rest) + shift: exact to a product's own rounding where weights are large.
  void start_segment(Block<Kind, T>& block, int64_t m) {
    block.find_read(a_, unit_.sequence, m);
    int64_t part = 0, left = block.part_rows;
    block.for_each([&](int64_t r, int64_t, int64_t head) __attribute__((always_inline)) {
      if (left-- == 0) {
        ++part;
        left = block.part_rows - 1;
      }
      block.near[r] = block.rest[r] = block.constant[r] = T(0);
      block.gate[r] = T(1);
      block.shift[r] = -static_cast<T>(__builtin_huge_val());
      if (!block.reads(part) || met_nothing(block, r)) return;
      const int64_t at = block.result[r];
      const double bias = a_.log_bias.values != nullptr ? static_cast<double>(a_.log_bias.at(unit_.sequence, head, m)) : 0.0;
      const double shift = bias - to_.lse[at] * kLog2E;
      if (block.factor[r] == T(0)) {
        block.shift[r] = static_cast<T>(shift);
      } else {
        const double near = -shift / block.exact[r];
        block.near[r] = static_cast<T>(near);
        block.rest[r] = static_cast<T>(near - static_cast<double>(block.near[r]));
        block.shift[r] = T(0);
      }
      if (a_.value_gate.values != nullptr) block.gate[r] = a_.value_gate.at(unit_.sequence, head, m);
      block.constant[r] = block.slope[r];
      if (to_.grad_mass != nullptr) block.constant[r] += to_.grad_mass[at * a_.segments + m];
    });
  }

  // The rows that are started after those at hand: of the next heads, or of the next sequence.
  void look_at_rows() {
    rows_ahead_ = RowsAhead();
    const bool here = kv_head_ + parts_ < unit_.last_head;
    if (!here && next_ < 0) return;
    const Queries queries = here ? queries_ : Queries(a_, next_);
    const int64_t kv_head = here ? kv_head_ + parts_ : unit_.first_head, first = kv_head * a_.group;
    const int64_t heads = at_most(parts_, a_.kv_heads - kv_head) * a_.group, element = sizeof(Raw);
    rows_ahead_.add(static_cast<const Raw*>(a_.query.values) + queries.first * a_.query.row_stride + first * a_.query.head_stride,
                    queries.count, a_.query.row_stride * element,
                    (a_.query.head_stride == a_.width ? heads : 1) * a_.width * element);
    const int64_t result = queries.first_result * heads_ + first, row = heads_ * a_.value_width * element;
    if (to_.grad_out != nullptr) {
      const auto add = [&](const void* rows) {
        rows_ahead_.add(static_cast<const Raw*>(rows) + result * a_.value_width, queries.count, row, row / heads_ * heads);
      };
      add(to_.out);
      add(to_.grad_out);
    }
    rows_ahead_.add(to_.lse + result, queries.count, heads_ * 8, heads * 8);
    int64_t meetings = 0;
    for (int64_t m = 0; m < a_.segments; ++m) {
      const int64_t* const offsets = a_.segment[m].offsets + unit_.sequence;
      meetings += (offsets[1] - offsets[0] + kBlockKeys - 1) / kBlockKeys;
    }
    rows_ahead_.start(meetings * kSteps * (parts_ > 1 ? parts_ : count_));
  }

  // What these heads, the next ones or the next sequence meet after the keys at hand.
  void look_ahead(int64_t m, int64_t place) {
    ahead_head_ = kv_head_;
    if (ahead_.look(unit_.sequence, m, place)) return;
    ahead_head_ += parts_;
    if (ahead_head_ < unit_.last_head) {
      ahead_.look(unit_.sequence, 0, 0);
    } else if (next_ >= 0) {
      ahead_head_ = unit_.first_head;
      ahead_.look(next_, 0, 0);
    }
  }
  Fetch keys_ahead(int64_t part) const { return ahead_.keys(at_most(ahead_head_ + part, a_.kv_heads - 1)); }
  Fetch values_ahead(int64_t part) const { return ahead_.values(at_most(ahead_head_ + part, a_.kv_heads - 1)); }

  // A KV head's part of a segment's rows.
  struct Head {
    const Raw *key, *value;
    int64_t key_stride, value_stride;
  };
  Head head_of(int64_t m, int64_t part) const {
    const AttentionSegment& segment = a_.segment[m];
    const int64_t kv_head = kv_head_ + part;
    return {static_cast<const Raw*>(segment.key.values) + kv_head * segment.key.head_stride,
            static_cast<const Raw*>(segment.value.values) + kv_head * segment.value.head_stride, segment.key.row_stride,
            segment.value.row_stride};
  }
  // Where what a part multiplies lies, and what norms its keys have.
  void point_at_few(const Head& head) {
    keys_.point_at_few(head.key, head.key_stride, head.value, head.value_stride, a_, widths_);
    if (a_.key_norm != nullptr) keys_.find_rstd(head.key, head.key_stride, a_.width, a_.norm_eps);
  }

  void meet_segment(int64_t m) {
    const AttentionSegment& segment = a_.segment[m];
    const int64_t begin = segment.offsets[unit_.sequence], end = segment.offsets[unit_.sequence + 1];
    bool read = false;
    for (int64_t n = 0; n < count_; ++n) {
      start_segment(blocks_[n], m);
      read |= blocks_[n].read != 0;
    }
    if (!read) {
      for (int64_t entry = begin; entry < end; ++entry) {
        for (int64_t part = 0; part < parts_; ++part) clear(m, entry, part);
      }
      return;
    }
    const int64_t ahead = end - begin - queries_.count;
    for (int64_t next = 0; keys_.gather(segment, begin, end - begin, next);) {
      look_ahead(m, next);
      parts_ > 1 ? meet_parts(m, begin, ahead) : meet_blocks(m, begin, ahead);
    }
  }

  bool all_see(const Block<Kind, T>& block, int64_t m, int64_t ahead) const {
    return !a_.segment[m].causal || keys_.position[keys_.count - 1] <= block.first + ahead;
  }

  // The keys at hand and the parts of a block. Query i sees the keys up to i + ahead.
  void meet_parts(int64_t m, int64_t begin, int64_t ahead) {
    Block<Kind, T>& block = blocks_[0];
    const bool everyone = all_see(block, m, ahead);
    weigh_few(block, m, everyone, ahead);
    for (int64_t part = 0; part < parts_; ++part) {
      if (!block.reads(part)) {
        for (int64_t j = 0; j < keys_.count; ++j) clear(m, begin + keys_.position[j], part);
        continue;
      }
      const Head head = head_of(m, part);
      point_at_few(head);
      start_sums();
      add_few(block, part, everyone);
      write_keys(m, begin, part, head);
    }
  }

  // The keys at hand and the blocks of a KV head.
  void meet_blocks(int64_t m, int64_t begin, int64_t ahead) {
    const Head head = head_of(m, 0);
    if (a_.key_norm != nullptr) keys_.find_rstd(head.key, head.key_stride, a_.width, a_.norm_eps);
    start_sums();
    bool pointed = false;
    const bool keys_finite = !a_.segment[m].causal || keys_.is_finite(head.key, head.key_stride, a_.width);
    for (int64_t n = 0; n < count_; ++n) {
      Block<Kind, T>& block = blocks_[n];
      const int64_t last = block.first + (block.rows - 1) / block.heads;
      if (block.read == 0 || (a_.segment[m].causal && keys_.position[0] > last + ahead)) continue;
      const bool everyone = all_see(block, m, ahead);
      if (!block.few() && (everyone || (block.finite && keys_finite))) {
        if (!pointed) {
          keys_.point_at_keys(head.key, head.key_stride, a_, widths_);
          keys_.point_at_values(head.value, head.value_stride, a_, widths_, false);
          pointed = true;
        }
        if (!everyone) keys_.find_limits(block, everyone, ahead);
        many(block, m, everyone);
      } else {
        weigh_few(block, m, everyone, ahead);
        add_few(block, 0, everyone);
      }
    }
    write_keys(m, begin, 0, head);
  }

  // Sums of the keys at hand.
  void start_sums() {
    std::memset(shared_.key_sums, 0, sizeof(T) * static_cast<size_t>(keys_.count * widths_.width));
    std::memset(shared_.value_sums, 0, sizeof(T) * static_cast<size_t>(keys_.count * widths_.value_width));
  }

  // Rows in lanes.
  void many(Block<Kind, T>& block, int64_t m, bool everyone) {
    using Word = typename Dot::Word;
    const int64_t count = keys_.count;
    rows_ahead_.some();
    score_block<Dot>(reinterpret_cast<const Word* const*>(keys_.key_rows), count, block.packed, block.lanes, widths_.depth,
                     shared_.scores, kBlockRows, keys_ahead(0));
    rows_ahead_.some();
    score_block<Dot>(reinterpret_cast<const Word* const*>(keys_.value_rows), count, block.packed_grads, block.lanes,
                     widths_.value_depth, shared_.slopes, kBlockRows, values_ahead(0));
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      everyone ? differentiate<true, true>(block, m, lane) : differentiate<false, true>(block, m, lane);
    }
    rows_ahead_.some();
    const T* const for_queries = a_.key_norm != nullptr ? shared_.scaled : shared_.slopes;
#if defined(__AVX512BF16__)
    if constexpr (Dot::kColumns == 2) {
      constexpr int64_t kWords = Shared<Kind, T>::kPairWords;
      const int64_t pairs = (block.rows + 1) / 2;
      const auto add_pairs = [&](const T* weights, float* words, const float* rows, int64_t width, T* sums) {
        for (int64_t j = 0; j < count; ++j) {
          store(words + j * kWords, append_bf16(load(weights + j * kBlockRows), load(weights + j * kBlockRows + kLanes)));
        }
        for (int64_t p = 0; p < pairs; ++p) shared_.pair_rows[p] = rows + p * width;
        weigh_values<kWords, 1, MultiplyPairs>(words, count, shared_.pair_rows, pairs, width, sums);
      };
      if (values_needed_) {
        add_pairs(shared_.scores, shared_.value_words, block.grad_pairs, widths_.value_width, shared_.value_sums);
      }
      if (keys_needed_) add_pairs(shared_.slopes, shared_.key_words, block.pairs, widths_.width, shared_.key_sums);
      if (!queries_needed_) return;
      const V zero = broadcast(T(0));
      for (int64_t j = 0; j < count; j += 2) {
        for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
          const T* const at = for_queries + j * kBlockRows + lane;
          store(shared_.query_words + j / 2 * kBlockRows + lane, pair_bf16(load(at), j + 1 < count ? load(at + kBlockRows) : zero));
        }
      }
      const Staged<Kind>* const spare = keys_.key_rows[count];
      if (count % 2 != 0) keys_.key_rows[count] = shared_.zeros;
      weigh_value_pairs<1, kBlockRows>(shared_.query_words, block.rows, keys_.key_rows, (count + 1) / 2, widths_.width, block.sums);
      keys_.key_rows[count] = spare;
      return;
    }
#endif
    if constexpr (Dot::kColumns == 1) {
      if (values_needed_) {
        weigh_values<kBlockRows, 1>(shared_.scores, count, block.grad_rows, block.rows, widths_.value_width,
                                    shared_.value_sums);
      }
      if (keys_needed_) {
        weigh_values<kBlockRows, 1>(shared_.slopes, count, block.query_rows, block.rows, widths_.width, shared_.key_sums);
      }
      if (queries_needed_) {
        weigh_values<1, kBlockRows>(for_queries, block.rows, keys_.key_rows, count, widths_.width, block.sums);
      }
    }
  }

  // Of products s and dP, the weights that values receive, and dS.
  struct Slope {
    V weight, slope;
  };
  static MMREC_INLINE V weight_of(V s, V near, V rest, V factor, V shift) {
    const V x = fma(sub(sub(s, near), rest), factor, shift);
    return select(greater(broadcast(T(Exp2<T>::kLowest)), x), broadcast(T(0)), exp2<T, true>(x));
  }

  // `norms`: those of the keys are taken into account here.
  template <bool everyone, bool norms>
  void differentiate(Block<Kind, T>& block, int64_t m, int64_t lane) {
    const V factor = load(block.factor + lane), near = load(block.near + lane), rest = load(block.rest + lane);
    const V shift = load(block.shift + lane), gate = load(block.gate + lane), constant = load(block.constant + lane);
    const V zero = broadcast(T(0)), limit = everyone ? zero : load(keys_.limit + lane);
    V bias_sum = load(block.bias_sums + m * kBlockRows + lane), gate_sum = load(block.gate_sums + m * kBlockRows + lane);
    for (int64_t j = 0; j < keys_.count; ++j) {
      T *const weights = shared_.scores + j * kBlockRows + lane, *const slopes = shared_.slopes + j * kBlockRows + lane;
      V s = load(weights), dp = load(slopes);
      if (norms && a_.key_norm != nullptr) s = mul(s, broadcast(keys_.rstd[j]));
      V p = weight_of(s, near, rest, factor, shift);
      if constexpr (!everyone) {
        const uint32_t seen = greater(limit, broadcast(static_cast<T>(j)));
        p = select(seen, p, zero);
        dp = select(seen, dp, zero);
      }
      gate_sum = fma(p, dp, gate_sum);
      V slope = mul(p, fma(dp, gate, constant)), weight = mul(p, gate);
      if constexpr (!everyone) {  // whatever came from above, and whatever the gate
        const uint32_t seen = greater(limit, broadcast(static_cast<T>(j)));
        slope = select(seen, slope, zero);
        weight = select(seen, weight, zero);
      }
      bias_sum = add(bias_sum, slope);
      store(weights, weight);
      store(slopes, slope);
      if (norms && a_.key_norm != nullptr) store(shared_.scaled + j * kBlockRows + lane, mul(slope, broadcast(keys_.rstd[j])));
    }
    store(block.bias_sums + m * kBlockRows + lane, bias_sum);
    store(block.gate_sums + m * kBlockRows + lane, gate_sum);
  }

  // The width in lanes of products, part by part: weights and slopes of all parts.
  void weigh_few(Block<Kind, T>& block, int64_t m, bool everyone, int64_t ahead) {
    const Widths<Kind>& w = widths_;
    for (int64_t part = 0; part < block.parts; ++part) {
      if (!block.reads(part)) continue;
      point_at_few(head_of(m, part));
      const int64_t end = (part + 1) * block.part_rows;
      for (int64_t r = part * block.part_rows; r < end; r += kFewRows) {
        const int64_t rows = at_most(end - r, kFewRows);
        rows_ahead_.some();
        few_scores(keys_.few_key_rows, keys_.count, block.queries + r * w.width, rows, w.width, shared_.scores + r,
                   kBlockRows, keys_ahead(part));
        rows_ahead_.some();
        few_scores(keys_.few_value_rows, keys_.count, block.grads + r * w.value_width, rows, w.value_width,
                   shared_.slopes + r, kBlockRows, values_ahead(part));
      }
      if (a_.key_norm != nullptr) times_rstd(shared_.scores, block, part, shared_.scores);
    }
    const bool all = everyone && block.reads_all();
    if (!all) keys_.find_limits(block, everyone, ahead);
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      all ? differentiate<true, false>(block, m, lane) : differentiate<false, false>(block, m, lane);
    }
  }

  void times_rstd(const T* from, const Block<Kind, T>& block, int64_t part, T* to) const {
    for (int64_t j = 0; j < keys_.count; ++j) {
      for (int64_t r = part * block.part_rows; r < (part + 1) * block.part_rows; ++r) {
        to[j * kBlockRows + r] = from[j * kBlockRows + r] * keys_.rstd[j];
      }
    }
  }

  // What they make of a part's keys and rows. Where rows do not see all keys, row by row: what is hidden may be NaN.
  void add_few(Block<Kind, T>& block, int64_t part, bool everyone) {
    rows_ahead_.some();
    if (a_.key_norm != nullptr) times_rstd(shared_.slopes, block, part, shared_.scaled);
    const int64_t first = part * block.part_rows;
    if (everyone) return add_rows(block, first, block.part_rows, keys_.count);
    for (int64_t r = first; r < first + block.part_rows; ++r) {
      if (keys_.limit[r] > T(0)) add_rows(block, r, 1, static_cast<int64_t>(keys_.limit[r]));
    }
  }

  // Rows [first, first + rows), which all see `count` keys.
  void add_rows(Block<Kind, T>& block, int64_t first, int64_t rows, int64_t count) {
    const T* const for_queries = a_.key_norm != nullptr ? shared_.scaled : shared_.slopes;
    if (values_needed_) {
      add_to_keys(shared_.scores + first, count, block.grad_rows + first, rows, widths_.value_width, shared_.value_sums);
    }
    if (keys_needed_) {
      add_to_keys(shared_.slopes + first, count, block.query_rows + first, rows, widths_.width, shared_.key_sums);
    }
    if (queries_needed_) {
      weigh_values<1, kBlockRows>(for_queries + first, rows, keys_.few_key_rows, count, widths_.width,
                                  block.sums + first * widths_.width);
    }
  }

  // To the sums of the first `count` keys. A key behind them, which the rows may not see, keeps its own: the last part of an odd
  // count would reach it, with weights of 0 but rows that may hold NaN.
  void add_to_keys(const T* weights, int64_t count, const T* const* from, int64_t rows, int64_t width, T* sums) const {
    const int64_t even = count > kFewRows && count < keys_.count ? count / 2 * 2 : count;
    weigh_values<kBlockRows, 1>(weights, even, from, rows, width, sums);
    if (even < count) weigh_values<kBlockRows, 1>(weights + even * kBlockRows, 1, from, rows, width, sums + even * width);
  }

  // factor · `from` to a row of a segment's gradients.
  void write(const SegmentGradients& to, void* rows, int64_t row, int64_t part, int64_t width, const T* from, T factor) const {
    const int64_t at = (row * a_.kv_heads + kv_head_ + part) * width;
    if (to.widened) {
      write_row(from, factor, width, static_cast<T*>(rows) + at);
    } else if (to.streamed) {
      stream_row(from, factor, width, static_cast<Raw*>(rows) + at);
    } else {
      write_row(from, factor, width, static_cast<Raw*>(rows) + at);
    }
  }

  // The gradients of an entry that a part does not read.
  void clear(int64_t m, int64_t entry, int64_t part) const {
    const SegmentGradients& to = to_.segment[m];
    const int64_t row = entry - to.first_entry;
    if (to.key != nullptr) write(to, to.key, row, part, a_.width, shared_.nothing, T(1));
    if (to.value != nullptr) write(to, to.value, row, part, a_.value_width, shared_.nothing, T(1));
  }

  void write_keys(int64_t m, int64_t begin, int64_t part, const Head& head) {
    const SegmentGradients& to = to_.segment[m];
    const T scale = static_cast<T>(a_.scale);
    for (int64_t j = 0; j < keys_.count; ++j) {
      const int64_t row = begin + keys_.position[j] - to.first_entry;
      if (to.value != nullptr) {
        write(to, to.value, row, part, a_.value_width, shared_.value_sums + j * widths_.value_width, T(1));
      }
      T* const sum = shared_.key_sums + j * widths_.width;
      if (a_.key_norm != nullptr && keys_needed_) {
        for (int64_t d = 0; d < a_.width; ++d) sum[d] *= scale;
        through_norm(head.key + keys_.row[j] * head.key_stride, static_cast<double>(keys_.rstd[j]), a_.key_norm, sum,
                     norm_sums(to_.key_norm, part));
      }
      if (to.key != nullptr) write(to, to.key, row, part, a_.width, sum, a_.key_norm != nullptr ? T(1) : scale);
    }
  }

  // Of a norm's weights, those of a part; or null.
  double* norm_sums(double* of, int64_t part) const {
    return of == nullptr ? nullptr : of + (unit_.sequence * a_.kv_heads + kv_head_ + part) * a_.width;
  }

  // From the gradient of u · weight, u = x · rstd, in place to that of x; that of the weight is added to `norm_sums`.
  void through_norm(const Raw* x, double rstd, const T* weight, T* grad, double* norm_sums) const {
    double dot = 0;
    for (int64_t d = 0; d < a_.width; ++d) {
      const double u = static_cast<double>(widen(x[d])) * rstd;
      if (norm_sums != nullptr) norm_sums[d] += static_cast<double>(grad[d]) * u;
      dot += static_cast<double>(grad[d]) * static_cast<double>(weight[d]) * u;
    }
    dot /= static_cast<double>(a_.width);
    for (int64_t d = 0; d < a_.width; ++d) {
      const double u = static_cast<double>(widen(x[d])) * rstd;
      grad[d] = static_cast<T>(rstd * (static_cast<double>(grad[d]) * static_cast<double>(weight[d]) - u * dot));
    }
  }

  void finish(Block<Kind, T>& block) {
    block.for_each([&](int64_t r, int64_t query, int64_t head) {
      const int64_t at = block.result[r];
      for (int64_t m = 0; m < a_.segments; ++m) {
        const int64_t to = (unit_.sequence * heads_ + head) * a_.segments + m;
        if (to_.log_bias != nullptr) to_.log_bias[to] += static_cast<double>(block.bias_sums[m * kBlockRows + r]);
        if (to_.value_gate != nullptr) to_.value_gate[to] += static_cast<double>(block.gate_sums[m * kBlockRows + r]);
      }
      const double nothing = -__builtin_huge_val();
      if (to_.sink != nullptr && !met_nothing(block, r) && static_cast<double>(a_.sink[head]) != nothing) {
        double lanes[Vec<double>::kLanes];
        store(lanes, exp2<double, true>(broadcast((static_cast<double>(a_.sink[head]) - to_.lse[at]) * kLog2E)));
        to_.sink[unit_.sequence * heads_ + head] += lanes[0] * static_cast<double>(block.slope[r]);
      }
      if (queries_needed_) finish_query(block.sums + r * widths_.width, query, head);
    });
  }

  void finish_query(T* sum, int64_t query, int64_t head) {
    T scale = static_cast<T>(a_.scale);
    if (a_.key_norm != nullptr) {
      for (int64_t d = 0; d < a_.width; ++d) sum[d] = sum[d] * scale * a_.key_norm[d];
      scale = T(1);
    }
    if (to_.latent != nullptr) {
      const int64_t row = ((unit_.sequence - to_.first_sequence) * a_.latent_rows + query) * heads_ + head;
      return write_row(sum, scale, a_.width, to_.latent + row * a_.width);
    }
    if (a_.query_norm != nullptr) {
      for (int64_t d = 0; d < a_.width; ++d) sum[d] *= scale;
      scale = T(1);
      bool any = false;  // a query that meets no key may hold NaN
      for (int64_t d = 0; d < a_.width; ++d) any |= sum[d] != T(0);
      const Raw* const raw = query_of(query, head);
      if (any) {
        through_norm(raw, rstd_of(raw, a_.width, a_.norm_eps), a_.query_norm, sum,
                     norm_sums(to_.query_norm, head / a_.group - kv_head_));
      }
    }
    if (to_.query == nullptr) return;
    const int64_t row = (queries_.first + query) * heads_ + head;
    write_row(sum, scale, a_.width, static_cast<Raw*>(to_.query) + row * a_.width);
  }

  const Attention<T>& a_;
  const AttentionGradients<T>& to_;
  const Widths<Kind> widths_;
  Shared<Kind, T> shared_;
  Keys<Kind, T> keys_;
  Ahead<Kind, T> ahead_;
  RowsAhead rows_ahead_;
  const AttentionUnit& unit_;
  int64_t next_;  // the sequence whose keys are met after this one's, or −1
  int64_t ahead_head_ = 0, parts_ = 1;  // of KV heads: those at hand
  Block<Kind, T>* blocks_;
  Arena arena_;  // for the blocks' own memory
  const Queries queries_;
  int64_t heads_, kv_head_ = 0, count_ = 0;
  bool keys_needed_ = false, values_needed_ = false, queries_needed_ = false, any_causal_ = false;
};

template <typename T>
int64_t scratch_bytes(const Attention<T>& a, int64_t most_queries) {
  int64_t bytes = 0;
  with_kind<T>(a.element, [&](auto kind) {
    using Kind = decltype(kind);
    const Widths<Kind> widths(a, true);
    Arena arena{nullptr};
    Shared<Kind, T>(widths, arena);
    Keys<Kind, T>(widths, arena);
    Ahead<Kind, T>(a, arena);
    const int64_t blocks = most_blocks(a, most_queries);
    arena.take<Block<Kind, T>>(blocks);
    bytes = arena.used + blocks * block_bytes<Kind>(a, widths);
  });
  return bytes;
}

template <typename T>
void differentiate(const Attention<T>& a, const AttentionGradients<T>& to, const AttentionUnit& unit, int64_t next,
                   int64_t most_queries, char* scratch) {
  with_kind<T>(a.element, [&](auto kind) {
    Arena arena{scratch};
    Task<decltype(kind), T>(a, to, unit, next, most_queries, arena).run();
  });
}

template <typename T>
constexpr AttentionBackward<T> kKernels = {scratch_bytes<T>, differentiate<T>};

}  // namespace

void attention_kernels(AttentionBackward<float>& kernels) { kernels = kKernels<float>; }
void attention_kernels(AttentionBackward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
