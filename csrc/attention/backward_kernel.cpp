// Attention, the backward: the weights again, and what they and their slopes make of rows and keys.
//
//     P_rj = exp(s_rj − lse_r)        dP_rj = dO_r · v_j        dS_rj = P_rj (gate_rm dP_rj + dmass_rm − D_r + dlse_r)
//     D_r = dO_r · out_r + Σ_m dmass_rm mass_rm
//     dq_r = scale Σ_j dS_rj k_j      dk_j = scale Σ_r dS_rj q_r      dv_j = Σ_r gate_rm P_rj dO_r
//
// A KV head of a sequence has one owner, which walks the keys; with some of them at hand it meets all rows. So sums of keys are
// complete when the next keys come, sums of rows at the end, and every sum has a fixed order. Five products of
// 2 · rows · keys · width flops where the forward has two.

#include "keys.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

template <typename Kind, typename T>
struct Block {
  using Word = typename Kind::Dot::Word;
  int64_t first, first_head, heads, rows, lanes;  // first: query; row = (query − first) · heads + head
  T* queries;         // [rows][width]: times the norms' weights
  T* for_keys;        // [rows][width]: what keys receive, dS_rj times it: normalised, without the keys' weights
  T* grads;           // [rows][value width]: dO
  Word* packed;       // [depth][lanes]
  Word* packed_grads; // [value depth][lanes]
  float *pairs, *grad_pairs;  // [rows / 2][width]: rows of for_keys and grads by two, where products are of pairs
  T* sums;            // [kMoreRows][width]: Σ_j dS_rj rstd_j k_j
  T* factor;          // [kBlockRows], as all of these: x = factor (s − near − rest) + shift
  T *near, *rest, *shift, *gate, *constant, *slope;  // constant: dmass − D + dlse; slope: − D + dlse
  T *bias_sums, *gate_sums;  // [segments][kBlockRows]
  const T **query_rows, **grad_rows;
  bool read;
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
  T *scores, *slopes;              // [kMoreKeys][kBlockRows], or [kFewRows][kBlockKeys]: then weights, and dS
  T* scaled;                       // dS times rstd
  float *value_words, *key_words;  // [kMoreKeys][kPairWords]: weights and dS of two rows a word
  float* query_words;              // [kMoreKeys / 2][kBlockRows]: dS of two keys a word
  T *key_sums, *value_sums;        // [kMoreKeys][width]
  double* norm_sums;               // [width]
  Staged<Kind>* rounded;
  Staged<Kind>* zeros;             // a row of keys
  const float** pair_rows;         // [kPairWords]

  Shared(const Widths<Kind>& w, Arena& arena) {
    scores = arena.take<T>(kMoreKeys * kBlockRows);
    slopes = arena.take<T>(kMoreKeys * kBlockRows);
    scaled = arena.take<T>(kMoreKeys * kBlockRows);
    value_words = arena.take<float>(kMoreKeys * kPairWords);
    key_words = arena.take<float>(kMoreKeys * kPairWords);
    query_words = arena.take<float>(kMoreKeys / 2 * kBlockRows);
    key_sums = arena.take<T>(kMoreKeys * w.width);
    value_sums = arena.take<T>(kMoreKeys * w.value_width);
    norm_sums = arena.take<double>(w.width);
    rounded = arena.take<Staged<Kind>>(kBlockRows * (w.width > w.value_width ? w.width : w.value_width));
    zeros = arena.take<Staged<Kind>>(w.width);
    pair_rows = arena.take<const float*>(kPairWords);
    if (zeros != nullptr) std::memset(static_cast<void*>(zeros), 0, sizeof(*zeros) * static_cast<size_t>(w.width));
  }
};

template <typename Kind, typename T>
class Task {
  using Raw = typename Kind::Raw;
  using Dot = typename Kind::Dot;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;

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
    for (kv_head_ = unit_.first_head; kv_head_ < unit_.last_head; ++kv_head_) {
      make_blocks();
      if (to_.key_norm != nullptr) std::memset(shared_.norm_sums, 0, sizeof(double) * static_cast<size_t>(a_.width));
      for (int64_t m = 0; m < a_.segments; ++m) meet_segment(m);
      if (to_.key_norm != nullptr) {
        std::memcpy(to_.key_norm + (unit_.sequence * a_.kv_heads + kv_head_) * a_.width, shared_.norm_sums,
                    sizeof(double) * static_cast<size_t>(a_.width));
      }
      for (int64_t n = 0; n < count_; ++n) finish(blocks_[n]);
    }
    fence();
  }

 private:
  void make_blocks() {
    Arena arena = arena_;
    count_ = 0;
    const int64_t first_head = kv_head_ * a_.group, together = heads_of_block(a_, unit_.sequence, first_head);
    const int64_t step = kBlockRows / together;
    for (int64_t head = first_head; head < first_head + a_.group; head += together) {
      for (int64_t query = 0; query < queries_.count; query += step) {
        Block<Kind, T>& block = blocks_[count_++];
        take(block, a_, widths_, arena);
        block.first = query;
        block.first_head = head;
        block.heads = together;
        start(block, at_most(query + step, queries_.count));
      }
    }
  }

  // The row of the results, [row][head].
  int64_t result_of(const Block<Kind, T>& block, int64_t r) const {
    return (queries_.first_result + block.first + r / block.heads) * heads_ + block.first_head + r % block.heads;
  }

  const Raw* query_of(const Block<Kind, T>& block, int64_t r) const {
    return static_cast<const Raw*>(a_.query.values) + (queries_.first + block.first + r / block.heads) * a_.query.row_stride +
           (block.first_head + r % block.heads) * a_.query.head_stride;
  }

  double rstd_of_query(const Raw* query) const {
    return a_.query_norm == nullptr ? 1.0 : rstd_of(query, a_.width, a_.norm_eps);
  }

  void start(Block<Kind, T>& block, int64_t last) {
    const Widths<Kind>& w = widths_;
    block.rows = (last - block.first) * block.heads;
    block.lanes = round_up(block.rows, kLanes);
    block.finite = true;
    std::memset(block.sums, 0, sizeof(T) * static_cast<size_t>(kMoreRows * w.width));
    std::memset(block.bias_sums, 0, sizeof(T) * static_cast<size_t>(a_.segments * kBlockRows));
    std::memset(block.gate_sums, 0, sizeof(T) * static_cast<size_t>(a_.segments * kBlockRows));
    for (int64_t r = 0; r < block.rows; ++r) {
      block.query_rows[r] = block.for_keys + r * w.width;
      block.grad_rows[r] = block.grads + r * w.value_width;
      if (to_.lse[result_of(block, r)] == -__builtin_huge_val()) {  // met no key, and may hold anything
        block.factor[r] = block.slope[r] = T(0);
        std::memset(block.queries + r * w.width, 0, sizeof(T) * static_cast<size_t>(w.width));
        std::memset(block.for_keys + r * w.width, 0, sizeof(T) * static_cast<size_t>(w.width));
        std::memset(block.grads + r * w.value_width, 0, sizeof(T) * static_cast<size_t>(w.value_width));
        continue;
      }
      const Raw* const query = query_of(block, r);
      const double rstd = rstd_of_query(query);
      T *const q = block.queries + r * w.width, *const k = block.for_keys + r * w.width;
      stage(query, a_.width, w.width, q);
      if (a_.query_norm != nullptr) {
        for (int64_t d = 0; d < a_.width; ++d) q[d] *= a_.query_norm[d];
      }
      for (int64_t d = 0; d < w.width; ++d) k[d] = q[d] * static_cast<T>(rstd);
      if (a_.key_norm != nullptr) {
        for (int64_t d = 0; d < a_.width; ++d) q[d] *= a_.key_norm[d];
      }
      block.factor[r] = static_cast<T>(a_.scale * kLog2E * rstd);
      start_grads(block, r);
      for (int64_t d = 0; any_causal_ && d < a_.width; ++d) block.finite &= k[d] - k[d] == 0;
      for (int64_t d = 0; any_causal_ && d < a_.value_width; ++d) {
        block.finite &= block.grad_rows[r][d] - block.grad_rows[r][d] == 0;
      }
    }
    for (int64_t r = block.rows; r < kBlockRows; ++r) block.factor[r] = block.slope[r] = T(0);
    if (block.rows <= kFewRows) return;
    pack(block.queries, w.width, a_.width, block, block.packed);
    pack(block.grads, w.value_width, a_.value_width, block, block.packed_grads);
    if constexpr (Dot::kColumns == 2) {
      pair_rows(block.for_keys, w.width, block.rows, block.pairs);
      pair_rows(block.grads, w.value_width, block.rows, block.grad_pairs);
    }
  }

  // dO of a row, and − D + dlse. What is 0 in a result takes nothing from its gradient, which may be anything there.
  void start_grads(Block<Kind, T>& block, int64_t r) {
    T* const grads = block.grads + r * widths_.value_width;
    const int64_t at = result_of(block, r);
    std::memset(grads, 0, sizeof(T) * static_cast<size_t>(widths_.value_width));
    double slope = to_.grad_lse != nullptr ? to_.grad_lse[at] : 0.0;
    if (to_.grad_out != nullptr) {
      stage(static_cast<const Raw*>(to_.grad_out) + at * a_.value_width, a_.value_width, widths_.value_width, grads);
      const Raw* const out = static_cast<const Raw*>(to_.out) + at * a_.value_width;
      double dot = 0;
      for (int64_t d = 0; d < a_.value_width; ++d) {
        const double x = static_cast<double>(widen(out[d]));
        dot += x == 0 ? 0.0 : x * static_cast<double>(grads[d]);
      }
      slope -= dot;
    }
    for (int64_t m = 0; to_.grad_mass != nullptr && m < a_.segments; ++m) {
      const double share = static_cast<double>(to_.mass[at * a_.segments + m]);
      slope -= share == 0 ? 0.0 : share * static_cast<double>(to_.grad_mass[at * a_.segments + m]);
    }
    block.slope[r] = static_cast<T>(slope);
  }

  void pack(const T* rows, int64_t padded, int64_t width, const Block<Kind, T>& block, typename Dot::Word* packed) {
    if constexpr (Dot::kColumns == 2) {
      for (int64_t d = 0; d < block.rows * padded; ++d) shared_.rounded[d] = narrow(rows[d]);
      pack_lanes<Dot>(shared_.rounded, padded, block.rows, width, block.lanes, packed);
    } else {
      pack_lanes<Dot>(rows, padded, block.rows, width, block.lanes, packed);
    }
  }

  static void pair_rows(const T* rows, int64_t width, int64_t count, float* pairs) {
    for (int64_t r = 0; r < count; r += 2) {
      for (int64_t d = 0; d < width; ++d) {
        const uint32_t second = r + 1 < count ? narrow(static_cast<float>(rows[(r + 1) * width + d])).bits : 0;
        pairs[r / 2 * width + d] = pair(narrow(static_cast<float>(rows[r * width + d])).bits, second);
      }
    }
  }

  // x − lse in units of log2 as factor (s − near − rest) + shift: exact to a product's own rounding where weights are large.
  void start_segment(Block<Kind, T>& block, int64_t m) {
    block.read = !is_removed(a_, unit_.sequence, block.first_head, m);
    for (int64_t r = 0; r < kBlockRows; ++r) {
      block.near[r] = block.rest[r] = block.constant[r] = T(0);
      block.gate[r] = T(1);
      block.shift[r] = -static_cast<T>(__builtin_huge_val());
    }
    for (int64_t r = 0; block.read && r < block.rows; ++r) {
      const int64_t head = block.first_head + r % block.heads, at = result_of(block, r);
      if (to_.lse[at] == -__builtin_huge_val()) continue;
      const double bias = a_.log_bias.values != nullptr ? static_cast<double>(a_.log_bias.at(unit_.sequence, head, m)) : 0.0;
      const double shift = bias - to_.lse[at] * kLog2E, factor = static_cast<double>(block.factor[r]);
      if (factor == 0) {
        block.shift[r] = static_cast<T>(shift);
      } else {
        const double exact = a_.scale * kLog2E * rstd_of_query(query_of(block, r));
        block.near[r] = static_cast<T>(-shift / exact);
        block.rest[r] = static_cast<T>(-shift / exact - static_cast<double>(block.near[r]));
        block.shift[r] = T(0);
      }
      if (a_.value_gate.values != nullptr) block.gate[r] = a_.value_gate.at(unit_.sequence, head, m);
      block.constant[r] = block.slope[r];
      if (to_.grad_mass != nullptr) block.constant[r] += to_.grad_mass[at * a_.segments + m];
    }
  }

  // What this head, the next one or the next sequence meets after the keys at hand.
  void look_ahead(int64_t m, int64_t place) {
    ahead_head_ = kv_head_;
    if (ahead_.look(unit_.sequence, m, place)) return;
    if (++ahead_head_ < unit_.last_head) {
      ahead_.look(unit_.sequence, 0, 0);
    } else if (next_ >= 0) {
      ahead_head_ = unit_.first_head;
      ahead_.look(next_, 0, 0);
    }
  }
  Fetch keys_ahead() const { return ahead_.keys(ahead_head_); }
  Fetch values_ahead() const { return ahead_.values(ahead_head_); }

  void meet_segment(int64_t m) {
    const AttentionSegment& segment = a_.segment[m];
    const int64_t begin = segment.offsets[unit_.sequence], end = segment.offsets[unit_.sequence + 1];
    bool read = false;
    for (int64_t n = 0; n < count_; ++n) {
      start_segment(blocks_[n], m);
      read |= blocks_[n].read;
    }
    if (!read) return clear(m, begin, end);
    const auto* const key = static_cast<const Raw*>(segment.key.values) + kv_head_ * segment.key.head_stride;
    const auto* const value = static_cast<const Raw*>(segment.value.values) + kv_head_ * segment.value.head_stride;
    const int64_t key_stride = segment.key.row_stride, value_stride = segment.value.row_stride;
    const int64_t ahead = end - begin - queries_.count;
    for (int64_t next = 0; keys_.gather(segment, begin, end - begin, next);) {
      look_ahead(m, next);
      if (a_.key_norm != nullptr) keys_.find_rstd(key, key_stride, a_.width, a_.norm_eps);
      std::memset(shared_.key_sums, 0, sizeof(T) * static_cast<size_t>(keys_.count * widths_.width));
      std::memset(shared_.value_sums, 0, sizeof(T) * static_cast<size_t>(keys_.count * widths_.value_width));
      bool pointed = false, few_pointed = false, keys_finite = true;
      if (segment.causal) keys_finite = keys_.is_finite(key, key_stride, a_.width);
      for (int64_t n = 0; n < count_; ++n) {
        Block<Kind, T>& block = blocks_[n];
        const int64_t last = block.first + (block.rows - 1) / block.heads;
        if (!block.read || (segment.causal && keys_.position[0] > last + ahead)) continue;
        const bool everyone = !segment.causal || keys_.position[keys_.count - 1] <= block.first + ahead;
        if (block.rows > kFewRows && (everyone || (block.finite && keys_finite))) {
          if (!pointed) {
            keys_.point_at_keys(key, key_stride, a_, widths_);
            keys_.point_at_values(value, value_stride, a_, widths_, false);
            pointed = true;
          }
          if (!everyone) keys_.find_limits(block.rows, block.heads, block.first, ahead);
          many(block, m, everyone);
          continue;
        }
        if (!few_pointed) keys_.point_at_few(key, key_stride, value, value_stride, a_, widths_);
        few_pointed = true;
        if (everyone && block.rows <= kFewRows) {
          few(block, m, 0, block.rows, keys_.count);
          continue;
        }
        for (int64_t r = 0; r < block.rows; ++r) {
          const int64_t seen = keys_.seen_up_to(block.first + r / block.heads + ahead);
          if (seen > 0) few(block, m, r, 1, seen);
        }
      }
      write_keys(m, begin, key, key_stride);
    }
  }

  // Rows in lanes.
  void many(Block<Kind, T>& block, int64_t m, bool everyone) {
    using Word = typename Dot::Word;
    const int64_t count = keys_.count;
    score_block<Dot>(reinterpret_cast<const Word* const*>(keys_.key_rows), count, block.packed, block.lanes, widths_.depth,
                     shared_.scores, keys_ahead());
    score_block<Dot>(reinterpret_cast<const Word* const*>(keys_.value_rows), count, block.packed_grads, block.lanes,
                     widths_.value_depth, shared_.slopes, values_ahead());
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      everyone ? differentiate<true>(block, m, lane) : differentiate<false>(block, m, lane);
    }
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
      weigh_value_pairs(shared_.query_words, block.rows, keys_.key_rows, (count + 1) / 2, widths_.width, block.sums);
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

  template <bool everyone>
  void differentiate(Block<Kind, T>& block, int64_t m, int64_t lane) {
    const V factor = load(block.factor + lane), near = load(block.near + lane), rest = load(block.rest + lane);
    const V shift = load(block.shift + lane), gate = load(block.gate + lane), constant = load(block.constant + lane);
    const V zero = broadcast(T(0)), limit = everyone ? zero : load(keys_.limit + lane);
    V bias_sum = load(block.bias_sums + m * kBlockRows + lane), gate_sum = load(block.gate_sums + m * kBlockRows + lane);
    for (int64_t j = 0; j < keys_.count; ++j) {
      T *const weights = shared_.scores + j * kBlockRows + lane, *const slopes = shared_.slopes + j * kBlockRows + lane;
      V s = load(weights), dp = load(slopes);
      if (a_.key_norm != nullptr) s = mul(s, broadcast(keys_.rstd[j]));
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
      if (a_.key_norm != nullptr) store(shared_.scaled + j * kBlockRows + lane, mul(slope, broadcast(keys_.rstd[j])));
    }
    store(block.bias_sums + m * kBlockRows + lane, bias_sum);
    store(block.gate_sums + m * kBlockRows + lane, gate_sum);
  }

  // The width in lanes: rows [first, first + rows), which all see `count` keys.
  void few(Block<Kind, T>& block, int64_t m, int64_t first, int64_t rows, int64_t count) {
    few_scores(keys_.few_key_rows, count, block.queries + first * widths_.width, rows, widths_.width, shared_.scores,
               keys_ahead());
    few_scores(keys_.few_value_rows, count, block.grads + first * widths_.value_width, rows, widths_.value_width,
               shared_.slopes, values_ahead());
    const V zero = broadcast(T(0));
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = first + r;
      const V factor = broadcast(block.factor[at]), near = broadcast(block.near[at]), rest = broadcast(block.rest[at]);
      const V shift = broadcast(block.shift[at]), gate = broadcast(block.gate[at]), constant = broadcast(block.constant[at]);
      V bias_sum = zero, gate_sum = zero;
      for (int64_t j = 0; j < count; j += kLanes) {
        T *const weights = shared_.scores + r * kBlockKeys + j, *const slopes = shared_.slopes + r * kBlockKeys + j;
        const uint32_t here = lanes_before<kLanes>(count - j);
        V s = load(weights);
        if (a_.key_norm != nullptr) s = mul(s, load(keys_.rstd + j));
        const V p = select(here, weight_of(s, near, rest, factor, shift), zero), dp = select(here, load(slopes), zero);
        gate_sum = fma(p, dp, gate_sum);
        const V slope = select(here, mul(p, fma(dp, gate, constant)), zero);
        bias_sum = add(bias_sum, slope);
        store(weights, select(here, mul(p, gate), zero));
        store(slopes, slope);
        if (a_.key_norm != nullptr) store(shared_.scaled + r * kBlockKeys + j, mul(slope, load(keys_.rstd + j)));
      }
      block.bias_sums[m * kBlockRows + at] += reduce_add(bias_sum);
      block.gate_sums[m * kBlockRows + at] += reduce_add(gate_sum);
    }
    const T* const for_queries = a_.key_norm != nullptr ? shared_.scaled : shared_.slopes;
    if (values_needed_) {
      add_to_keys(shared_.scores, count, block.grad_rows + first, rows, widths_.value_width, shared_.value_sums);
    }
    if (keys_needed_) {
      add_to_keys(shared_.slopes, count, block.query_rows + first, rows, widths_.width, shared_.key_sums);
    }
    if (queries_needed_) {
      weigh_values<kBlockKeys, 1>(for_queries, rows, keys_.few_key_rows, count, widths_.width,
                                  block.sums + first * widths_.width);
    }
  }

  // To the sums of the first `count` keys. A key behind them, which the rows may not see, keeps its own: the last part of an odd
  // count would reach it, with weights of 0 but rows that may hold NaN.
  void add_to_keys(const T* weights, int64_t count, const T* const* from, int64_t rows, int64_t width, T* sums) const {
    const int64_t even = count > kFewRows ? count / 2 * 2 : count;
    weigh_values<1, kBlockKeys>(weights, even, from, rows, width, sums);
    if (even < count) weigh_values<1, kBlockKeys>(weights + even, 1, from, rows, width, sums + even * width);
  }

  // A row of a segment's gradients.
  void write(const SegmentGradients& to, void* rows, int64_t row, int64_t width, const T* from) const {
    const int64_t at = (row * a_.kv_heads + kv_head_) * width;
    if (to.widened) {
      std::memcpy(static_cast<T*>(rows) + at, from, sizeof(T) * static_cast<size_t>(width));
    } else if (to.streamed) {
      stream_row(from, width, static_cast<Raw*>(rows) + at);
    } else {
      write_row(from, width, static_cast<Raw*>(rows) + at);
    }
  }

  void clear(int64_t m, int64_t begin, int64_t end) {
    const SegmentGradients& to = to_.segment[m];
    std::memset(shared_.key_sums, 0, sizeof(T) * static_cast<size_t>(widths_.width));
    std::memset(shared_.value_sums, 0, sizeof(T) * static_cast<size_t>(widths_.value_width));
    for (int64_t entry = begin; entry < end; ++entry) {
      if (to.key != nullptr) write(to, to.key, entry - to.first_entry, a_.width, shared_.key_sums);
      if (to.value != nullptr) write(to, to.value, entry - to.first_entry, a_.value_width, shared_.value_sums);
    }
  }

  void write_keys(int64_t m, int64_t begin, const Raw* key, int64_t stride) {
    const SegmentGradients& to = to_.segment[m];
    for (int64_t j = 0; j < keys_.count; ++j) {
      const int64_t row = begin + keys_.position[j] - to.first_entry;
      if (to.value != nullptr) {
        write(to, to.value, row, a_.value_width, shared_.value_sums + j * widths_.value_width);
      }
      if (to.key == nullptr && to_.key_norm == nullptr) continue;
      T* const sum = shared_.key_sums + j * widths_.width;
      for (int64_t d = 0; d < a_.width; ++d) sum[d] *= static_cast<T>(a_.scale);
      if (a_.key_norm != nullptr) {
        through_norm(key + keys_.row[j] * stride, static_cast<double>(keys_.rstd[j]), a_.key_norm, sum,
                     to_.key_norm != nullptr ? shared_.norm_sums : nullptr);
      }
      if (to.key != nullptr) write(to, to.key, row, a_.width, sum);
    }
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
    double* const norm_sums =
        to_.query_norm != nullptr ? to_.query_norm + (unit_.sequence * a_.kv_heads + kv_head_) * a_.width : nullptr;
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t head = block.first_head + r % block.heads, query = block.first + r / block.heads, at = result_of(block, r);
      for (int64_t m = 0; m < a_.segments; ++m) {
        const int64_t to = (unit_.sequence * heads_ + head) * a_.segments + m;
        if (to_.log_bias != nullptr) to_.log_bias[to] += static_cast<double>(block.bias_sums[m * kBlockRows + r]);
        if (to_.value_gate != nullptr) to_.value_gate[to] += static_cast<double>(block.gate_sums[m * kBlockRows + r]);
      }
      const double nothing = -__builtin_huge_val();
      if (to_.sink != nullptr && to_.lse[at] != nothing && static_cast<double>(a_.sink[head]) != nothing) {
        double lanes[Vec<double>::kLanes];
        store(lanes, exp2<double, true>(broadcast((static_cast<double>(a_.sink[head]) - to_.lse[at]) * kLog2E)));
        to_.sink[unit_.sequence * heads_ + head] += lanes[0] * static_cast<double>(block.slope[r]);
      }
      if (!queries_needed_) continue;
      T* const sum = block.sums + r * widths_.width;
      for (int64_t d = 0; d < a_.width; ++d) sum[d] *= static_cast<T>(a_.scale);
      if (a_.key_norm != nullptr) {
        for (int64_t d = 0; d < a_.width; ++d) sum[d] *= a_.key_norm[d];
      }
      if (to_.latent != nullptr) {
        const int64_t row = ((unit_.sequence - to_.first_sequence) * a_.latent_rows + query) * heads_ + head;
        std::memcpy(to_.latent + row * a_.width, sum, sizeof(T) * static_cast<size_t>(a_.width));
        continue;
      }
      const Raw* const raw = query_of(block, r);
      bool any = false;  // a query that meets no key may hold NaN
      for (int64_t d = 0; d < a_.width; ++d) any |= sum[d] != T(0);
      if (a_.query_norm != nullptr && any) through_norm(raw, rstd_of_query(raw), a_.query_norm, sum, norm_sums);
      if (to_.query != nullptr) {
        const int64_t row = (queries_.first + query) * heads_ + head;
        write_row(sum, a_.width, static_cast<Raw*>(to_.query) + row * a_.width);
      }
    }
  }

  const Attention<T>& a_;
  const AttentionGradients<T>& to_;
  const Widths<Kind> widths_;
  Shared<Kind, T> shared_;
  Keys<Kind, T> keys_;
  Ahead<Kind, T> ahead_;
  const AttentionUnit& unit_;
  int64_t next_;  // the sequence whose keys are met after this one's, or −1
  int64_t ahead_head_ = 0;
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
