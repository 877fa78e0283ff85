// Attention, the forward: a running softmax over the segments of a sequence.
//
// Work: 4 · rows · keys · width flops; every key and value is read once per block of rows, from where it lies. All heads of a
// block of keys are done before the next block, so that rows are read as they follow each other in memory. Where a KV head has
// few rows, a block has those of several, as its parts: each is multiplied with its own keys, and the softmax has lanes enough.

#include "keys.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

// A reference below all scores; differences stay finite.
template <typename T>
constexpr T kNothing = T(-1e30);
// As many heads at a time as this holds, which the second level of cache does.
constexpr int64_t kStateBytes = 256 << 10;

template <typename Kind, typename T>
struct Block : Rows {
  using Word = typename Kind::Dot::Word;
  T* queries;    // [rows][padded width]
  Word* packed;  // [depth][lanes], where a part has more than kFewRows
  T* out;        // [kMoreRows][padded value width]: sums relative to the highest x so far
  T* factor;     // [kBlockRows], as all of these
  T* rest;       // what factor's rounding left
  T* product;    // the highest x so far, as the product and the bias that it is made of
  T* bias_of_highest;
  T* sum;        // of the segment at hand
  T* scaled;     // 2^(highest x before − now)
  T* bias;
  T* gate;
  T* sums;       // [segments][kBlockRows]
  T* products;   // [segments][kBlockRows]: of the highest that they are relative to
  T* biases;
  bool has_gate;
  bool fresh;    // nothing is in `out` yet
};

template <typename Kind, typename T>
void take(Block<Kind, T>& block, const Attention<T>& a, const Widths<Kind>& widths, Arena& arena) {
  block.queries = arena.take<T>(kBlockRows * widths.width);
  block.packed = arena.take<typename Kind::Dot::Word>(widths.depth * kBlockRows + 64);
  block.out = arena.take<T>(kMoreRows * widths.value_width);
  T** const vectors[] = {&block.factor, &block.rest,   &block.product, &block.bias_of_highest,
                         &block.sum,    &block.scaled, &block.bias,    &block.gate};
  for (T** vector : vectors) *vector = arena.take<T>(kBlockRows);
  block.sums = arena.take<T>(a.segments * kBlockRows);
  block.products = arena.take<T>(a.segments * kBlockRows);
  block.biases = arena.take<T>(a.segments * kBlockRows);
}

template <typename Kind, typename T>
int64_t block_bytes(const Attention<T>& a, const Widths<Kind>& widths) {
  Block<Kind, T> block;
  Arena arena{nullptr};
  take(block, a, widths, arena);
  return arena.used;
}

// How many blocks a task holds at a time.
template <typename Kind, typename T>
int64_t blocks_at_a_time(const Attention<T>& a, const Widths<Kind>& widths) {
  const int64_t fit = kStateBytes / block_bytes<Kind>(a, widths);
  return at_most(fit < 1 ? 1 : fit, a.kv_heads * a.group);
}

// What a task has beside its blocks and keys.
template <typename Kind, typename T>
struct Shared {
  T* scores;              // [kMoreKeys][kBlockRows]
  T* weights;             // pairs of keys
  Staged<Kind>* rounded;  // queries as pairs are made of them
  Staged<Kind>* zeros;    // a row of values

  Shared(const Widths<Kind>& widths, Arena& arena) {
    scores = arena.take<T>(kMoreKeys * kBlockRows);
    weights = arena.take<T>(kMoreKeys * kBlockRows);
    rounded = arena.take<Staged<Kind>>(kBlockRows * (widths.width + 2));
    zeros = arena.take<Staged<Kind>>(widths.value_width);
    if (zeros != nullptr) std::memset(static_cast<void*>(zeros), 0, sizeof(*zeros) * static_cast<size_t>(widths.value_width));
  }
};

template <typename Kind, typename T>
class Task {
  using Raw = typename Kind::Raw;
  using Dot = typename Kind::Dot;
  using V = Vec<T>;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kBytes = sizeof(Raw);

 public:
  Task(const Attention<T>& a, const AttentionResults<T>& to, const AttentionUnit& unit, int64_t next, Arena& arena)
      : a_(a),
        to_(to),
        widths_(a, false),
        shared_(widths_, arena),
        keys_(widths_, arena),
        ahead_(a, arena),
        unit_(unit),
        next_(next),
        most_blocks_(blocks_at_a_time<Kind>(a, widths_)),
        blocks_(arena.take<Block<Kind, T>>(most_blocks_)),
        arena_(arena),
        queries_(a, unit.sequence) {}

  void run() {
    int64_t head = unit_.first_head * a_.group;
    const int64_t last = unit_.last_head * a_.group;
    while (head < last) {
      // Heads whose blocks have the same number of queries.
      const int64_t together = heads_of_block(a_, unit_.sequence, head);
      int64_t end = head + together;
      while (end < last && heads_of_block(a_, unit_.sequence, end) == together) end += together;
      const int64_t step = kBlockRows / together;
      for (int64_t query = unit_.first_row; query < unit_.last_row; query += step) {
        const int64_t stop = at_most(query + step, unit_.last_row), rows = (stop - query) * together;
        const int64_t parts = rows <= kFewRows ? kBlockRows / rows : 1;
        for (int64_t from = head; from < end;) {
          int64_t count = 0;
          for (; from < end && count < most_blocks_; ++count) {
            Block<Kind, T>& block = blocks_[count];
            block.first = query;
            block.first_head = from;
            block.heads = together;
            block.parts = at_most(parts, (end - from) / together);
            block.part_rows = rows;
            from += block.parts * together;
          }
          attend(count, stop);
        }
      }
      head = end;
    }
  }

 private:
  // Blocks of the queries before `last`.
  void attend(int64_t count, int64_t last) {
    Block<Kind, T>* const blocks = blocks_;
    Arena arena = arena_;
    for (int64_t n = 0; n < count; ++n) {
      take(blocks[n], a_, widths_, arena);
      start(blocks[n]);
    }
    look_at_rows(count, last);
    for (int64_t m = 0; m < a_.segments; ++m) {
      const AttentionSegment& segment = a_.segment[m];
      const int64_t begin = segment.offsets[unit_.sequence], end = segment.offsets[unit_.sequence + 1];
      for (int64_t n = 0; n < count; ++n) start_segment(blocks[n], m);
      // Query i sees the keys up to i + keys − queries.
      const int64_t ahead = end - begin - queries_.count;
      const int64_t seen = segment.causal ? at_most(last + ahead, end - begin) : end - begin;
      for (int64_t next = 0; keys_.gather(segment, begin, seen, next);) {
        if (!ahead_.look(unit_.sequence, m, next) && next_ >= 0) ahead_.look(next_, 0, 0);
        for (int64_t n = 0; n < count; ++n) {
          if (blocks[n].read != 0) meet(blocks[n], segment, segment.causal ? blocks[n].first + ahead : seen, ahead);
        }
      }
      for (int64_t n = 0; n < count; ++n) {
        std::memcpy(blocks[n].sums + m * kBlockRows, blocks[n].sum, sizeof(T) * kBlockRows);
        std::memcpy(blocks[n].products + m * kBlockRows, blocks[n].product, sizeof(T) * kBlockRows);
        std::memcpy(blocks[n].biases + m * kBlockRows, blocks[n].bias_of_highest, sizeof(T) * kBlockRows);
      }
    }
    for (int64_t n = 0; n < count; ++n) finish(blocks[n]);
  }

  // The queries that are started after those at hand.
  void look_at_rows(int64_t blocks, int64_t last) {
    rows_ahead_ = RowsAhead();
    const bool here = last < unit_.last_row;
    if (!here && next_ < 0) return;
    const Queries queries = here ? queries_ : Queries(a_, next_);
    const int64_t first = here ? last : 0, count = at_most((here ? unit_.last_row : queries.count) - first, kBlockRows);
    const int64_t head = unit_.first_head * a_.group, heads = (unit_.last_head - unit_.first_head) * a_.group;
    rows_ahead_.add(static_cast<const Raw*>(a_.query.values) + (queries.first + first) * a_.query.row_stride +
                        head * a_.query.head_stride,
                    count, a_.query.row_stride * kBytes, (a_.query.head_stride == a_.width ? heads : 1) * a_.width * kBytes);
    int64_t meetings = 0;
    for (int64_t m = 0; m < a_.segments; ++m) {
      const int64_t* const offsets = a_.segment[m].offsets + unit_.sequence;
      meetings += (offsets[1] - offsets[0] + kBlockKeys - 1) / kBlockKeys;
    }
    rows_ahead_.start(meetings * blocks);
  }

  void start(Block<Kind, T>& block) {
    block.rows = block.parts * block.part_rows;
    block.lanes = round_up(block.rows, kLanes);
    block.fresh = true;
    block.has_gate = a_.value_gate.values != nullptr;
    std::memset(block.out, 0, sizeof(T) * static_cast<size_t>((block.rows + 1) * widths_.value_width));
    const auto* const queries = static_cast<const Raw*>(a_.query.values);
    // Factors are not negative, so that the highest product is the highest score of its segment.
    const double scale = a_.scale < 0 ? -a_.scale : a_.scale, factor = scale * kLog2E;
    const T rounded = static_cast<T>(factor), rest = static_cast<T>(factor - static_cast<double>(rounded));
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      store(block.factor + lane, broadcast(rounded));
      store(block.rest + lane, broadcast(rest));
      store(block.bias_of_highest + lane, broadcast(kNothing<T>));
      store(block.product + lane, broadcast(T(0)));
      store(block.bias + lane, broadcast(T(0)));
      store(block.gate + lane, broadcast(T(1)));
    }
    block.for_each([&](int64_t r, int64_t i, int64_t head) __attribute__((always_inline)) {
      const Raw* const query =
          queries + (queries_.first + i) * a_.query.row_stride + head * a_.query.head_stride;
      T* const to = block.queries + r * widths_.width;
      stage(query, a_.width, widths_.width, to);
      if (a_.query_norm != nullptr) {
        const double own = factor * rstd_of(query, a_.width, a_.norm_eps);
        block.factor[r] = static_cast<T>(own);
        block.rest[r] = static_cast<T>(own - static_cast<double>(block.factor[r]));
        for (int64_t d = 0; d < a_.width; ++d) to[d] *= a_.query_norm[d];
      }
      if (a_.key_norm != nullptr) {
        for (int64_t d = 0; d < a_.width; ++d) to[d] *= a_.key_norm[d];
      }
      if (a_.scale < 0) {
        for (int64_t d = 0; d < a_.width; ++d) to[d] = -to[d];
      }
    });
    if (block.few()) return;
    if constexpr (Dot::kColumns == 2) {
      for (int64_t r = 0; r < block.rows; ++r) {
        stage(block.queries + r * widths_.width, widths_.width, widths_.width, shared_.rounded + r * widths_.width);
      }
      pack_lanes<Dot>(shared_.rounded, widths_.width, block.rows, a_.width, block.lanes, block.packed);
    } else {
      pack_lanes<Dot>(block.queries, widths_.width, block.rows, a_.width, block.lanes, block.packed);
    }
  }

  // 2^(x − x') from products s, s' and the difference of biases: neither x is rounded at its own size. 0 where that would not
  // be a normal number.
  static MMREC_INLINE V power(V s, V other, V factor, V bias_difference) {
    const V x = fma(sub(s, other), factor, bias_difference);
    return select(greater(broadcast(T(Exp2<T>::kLowest)), x), broadcast(T(0)), exp2<T>(x));
  }

  // Takes in the highest product of some keys; returns what the sums so far have to be multiplied with. Which x is higher is
  // told by differences of products and of biases: beside a large bias, x itself could not tell products apart.
  static MMREC_INLINE V raise(Block<Kind, T>& block, int64_t lane, V product) {
    const V factor = load(block.factor + lane), bias = load(block.bias + lane);
    const V old_product = load(block.product + lane), old_bias = load(block.bias_of_highest + lane);
    const uint32_t higher = greater(fma(sub(product, old_product), factor, sub(bias, old_bias)), broadcast(T(0)));
    const V by = select(higher, power(old_product, product, factor, sub(old_bias, bias)), broadcast(T(1)));
    store(block.product + lane, select(higher, product, old_product));
    store(block.bias_of_highest + lane, select(higher, bias, old_bias));
    store(block.scaled + lane, by);
    store(block.sum + lane, mul(load(block.sum + lane), by));
    return by;
  }

  int64_t kv_head_of(const Block<Kind, T>& block, int64_t part) const {
    return (block.first_head + part * block.heads) / a_.group;
  }

  void start_segment(Block<Kind, T>& block, int64_t m) {
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) store(block.sum + lane, broadcast(T(0)));
    block.find_read(a_, unit_.sequence, m);
    if (a_.log_bias.values == nullptr && !block.has_gate) return;
    block.for_each([&](int64_t r, int64_t, int64_t head) __attribute__((always_inline)) {
      if (a_.log_bias.values != nullptr) block.bias[r] = a_.log_bias.at(unit_.sequence, head, m);
      if (block.has_gate) block.gate[r] = a_.value_gate.at(unit_.sequence, head, m);
    });
  }

  // The keys at hand, of which every row sees those up to place `all_see`, and query i those up to i + ahead.
  void meet(Block<Kind, T>& block, const AttentionSegment& segment, int64_t all_see, int64_t ahead) {
    rows_ahead_.some();
    const bool everyone = keys_.position[keys_.count - 1] <= all_see;
    if (!everyone || !block.reads_all()) keys_.find_limits(block, everyone, ahead);
    if (block.few()) return few(block, segment, everyone);
    const int64_t kv_head = kv_head_of(block, 0);
    const auto* const key = static_cast<const Raw*>(segment.key.values) + kv_head * segment.key.head_stride;
    const auto* const value = static_cast<const Raw*>(segment.value.values) + kv_head * segment.value.head_stride;
    const int64_t value_stride = segment.value.row_stride;
    if (a_.key_norm != nullptr) keys_.find_rstd(key, segment.key.row_stride, a_.width, a_.norm_eps);
    keys_.point_at_keys(key, segment.key.row_stride, a_, widths_);
    const bool clean = everyone || keys_.is_finite(value, value_stride, a_.value_width);
    Staged<Kind>* const copies = keys_.point_at_values(value, value_stride, a_, widths_, !clean);
    if (clean) return many(block, kv_head, everyone);
    keep_finite(copies);
    many(block, kv_head, everyone);
    add_infinite(block, value, value_stride);
  }

  // Weights of what a row does not see are 0, and 0 · NaN must not reach it. So infinite numbers and NaN leave the products, and
  // are added for the rows that see them.
  void keep_finite(Staged<Kind>* values) const {
    for (int64_t d = 0; d < keys_.count * widths_.value_width; ++d) {
      if (!(widen(values[d]) - widen(values[d]) == 0)) values[d] = Staged<Kind>{};
    }
  }

  void add_infinite(Block<Kind, T>& block, const Raw* value, int64_t stride) const {
    for (int64_t j = 0; j < keys_.count; ++j) {
      const Raw* const v = value + keys_.row[j] * stride;
      for (int64_t d = 0; d < a_.value_width; ++d) {
        const T x = static_cast<T>(widen(v[d]));
        for (int64_t r = 0; !(x - x == 0) && r < block.rows; ++r) {
          if (keys_.limit[r] > static_cast<T>(j)) block.out[r * widths_.value_width + d] += block.gate[r] * x;
        }
      }
    }
  }

  // Rows in lanes.
  void many(Block<Kind, T>& block, int64_t kv_head, bool everyone) {
    const int64_t keys = keys_.count;
    T* const scores = shared_.scores;
    score_block<Dot>(reinterpret_cast<const typename Dot::Word* const*>(keys_.key_rows), keys, block.packed, block.lanes,
                     widths_.depth, scores, kBlockRows, ahead_.keys(kv_head));
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      everyone ? weigh<true, Dot::kColumns == 2>(block, keys, lane) : weigh<false, Dot::kColumns == 2>(block, keys, lane);
    }
    rescale(block);
#if defined(__AVX512BF16__)
    if constexpr (Dot::kColumns == 2) {
      if (keys % 2 != 0) keys_.value_rows[keys] = shared_.zeros;
      weigh_value_pairs<1, kBlockRows>(shared_.weights, block.rows, keys_.value_rows, (keys + 1) / 2, widths_.value_width, block.out,
                        ahead_.values(kv_head));
      return;
    }
#endif
    if constexpr (Dot::kColumns == 1) {
      weigh_values<1, kBlockRows>(scores, block.rows, keys_.value_rows, keys, widths_.value_width, block.out,
                                  ahead_.values(kv_head));
    }
  }

  // From scores to weights, in the lanes from `lane` on; as pairs of keys in `weights`.
  template <bool everyone, bool pairs>
  void weigh(Block<Kind, T>& block, int64_t keys, int64_t lane) {
    T* const scores = shared_.scores + lane;
    const V none = broadcast(-static_cast<T>(__builtin_huge_val())), zero = broadcast(T(0));
    const V limit = everyone ? zero : load(keys_.limit + lane);
    const auto seen = [&](int64_t j) __attribute__((always_inline)) { return greater(limit, broadcast(static_cast<T>(j))); };
    V highest = none;
    for (int64_t j = 0; j < keys; ++j) {
      V s = load(scores + j * kBlockRows);
      if (a_.key_norm != nullptr && !block.few()) {
        s = mul(s, broadcast(keys_.rstd[j]));
        store(scores + j * kBlockRows, s);
      }
      if constexpr (!everyone) s = select(seen(j), s, none);
      highest = max(s, highest);
    }
    raise(block, lane, highest);
    const V factor = load(block.factor + lane), product = load(block.product + lane);
    const V bias = sub(load(block.bias + lane), load(block.bias_of_highest + lane));
    const V gate = load(block.gate + lane);
    V sum = load(block.sum + lane);
    const auto weight = [&](int64_t j) __attribute__((always_inline)) {
      V w = power(load(scores + j * kBlockRows), product, factor, bias);
      if constexpr (!everyone) w = select(seen(j), w, zero);
      sum = add(sum, w);
      if (block.has_gate) w = mul(w, gate);
      if constexpr (!everyone) w = select(seen(j), w, zero);  // whatever the gate
      return w;
    };
    if constexpr (!pairs) {
      for (int64_t j = 0; j < keys; ++j) store(scores + j * kBlockRows, weight(j));
    } else {
#if defined(__AVX512BF16__)
      float* const to = shared_.weights + lane;
      for (int64_t j = 0; j + 1 < keys; j += 2) {
        const V first = weight(j);
        store(to + j / 2 * kBlockRows, pair_bf16(first, weight(j + 1)));
      }
      if (keys % 2 != 0) store(to + keys / 2 * kBlockRows, pair_bf16(weight(keys - 1), zero));
#endif
    }
    store(block.sum + lane, sum);
  }

  // To the highest scores so far.
  void rescale(Block<Kind, T>& block) {
    const V one = broadcast(T(1));
    for (int64_t lane = 0; !block.fresh && lane < block.lanes; lane += kLanes) {
      uint32_t less = greater(one, load(block.scaled + lane));
      for (int64_t r = lane; r < block.rows && less != 0; ++r, less >>= 1) {
        if ((less & 1) == 0) continue;
        const V by = broadcast(block.scaled[r]);
        T* const out = block.out + r * widths_.value_width;
        for (int64_t d = 0; d < widths_.value_width; d += kLanes) store(out + d, mul(load(out + d), by));
      }
    }
    block.fresh = false;
  }

  // The width in lanes of products, part by part. A part that does not read the keys sees none of them.
  void few(Block<Kind, T>& block, const AttentionSegment& segment, bool everyone) {
    const int64_t keys = keys_.count, rows = block.part_rows;
    T* const scores = shared_.scores;
    for (int64_t part = 0; part < block.parts; ++part) {
      if (!block.reads(part)) continue;
      const int64_t kv_head = point_at_few(block, segment, part);
      few_scores(keys_.few_key_rows, keys, block.queries + part * rows * widths_.width, rows, widths_.width,
                 scores + part * rows, kBlockRows, ahead_.keys(kv_head));
      if (a_.key_norm == nullptr) continue;
      keys_.find_rstd(static_cast<const Raw*>(segment.key.values) + kv_head * segment.key.head_stride, segment.key.row_stride,
                      a_.width, a_.norm_eps);
      for (int64_t j = 0; j < keys; ++j) {
        for (int64_t r = part * rows; r < (part + 1) * rows; ++r) scores[j * kBlockRows + r] *= keys_.rstd[j];
      }
    }
    const bool all = everyone && block.reads_all();
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      all ? weigh<true, false>(block, keys, lane) : weigh<false, false>(block, keys, lane);
    }
    rescale(block);
    for (int64_t part = 0; part < block.parts; ++part) {
      if (!block.reads(part)) continue;
      const Fetch ahead = ahead_.values(point_at_few(block, segment, part));
      T* const out = block.out + part * rows * widths_.value_width;
      if (everyone) {
        weigh_values<1, kBlockRows>(scores + part * rows, rows, keys_.few_value_rows, keys, widths_.value_width, out, ahead);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r) {  // what a row does not see may be NaN
        const auto seen = static_cast<int64_t>(keys_.limit[part * rows + r]);
        if (seen == 0) continue;
        weigh_values<1, kBlockRows>(scores + part * rows + r, 1, keys_.few_value_rows, seen, widths_.value_width,
                                    out + r * widths_.value_width, ahead.part(r, rows));
      }
    }
  }

  // Returns the part's KV head.
  int64_t point_at_few(const Block<Kind, T>& block, const AttentionSegment& segment, int64_t part) {
    const int64_t kv_head = kv_head_of(block, part);
    keys_.point_at_few(static_cast<const Raw*>(segment.key.values) + kv_head * segment.key.head_stride, segment.key.row_stride,
                       static_cast<const Raw*>(segment.value.values) + kv_head * segment.value.head_stride,
                       segment.value.row_stride, a_, widths_);
    return kv_head;
  }

  // log2 of numbers in [2^-1000, 2^1000], to double precision: 2 atanh((f − 1) / (f + 1)) for the fraction f.
  static MMREC_INLINE double log2_of(double x) {
    if (!(x - x == 0)) return x;
    int64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const int64_t exponent = (bits - 0x3fe6a09e667f3bcd) >> 52;  // so that the fraction lies between the roots of 1/2 and 2
    bits -= exponent << 52;
    double f;
    std::memcpy(&f, &bits, sizeof(f));
    const double z = (f - 1) / (f + 1), z2 = z * z;
    double series = 1.0 / 21;
    for (int n = 19; n >= 1; n -= 2) series = series * z2 + 1.0 / n;
    return static_cast<double>(exponent) + 2 * kLog2E * z * series;
  }

  void finish(Block<Kind, T>& block) {
    const int64_t heads = a_.kv_heads * a_.group;
    T factors[kBlockRows], totals[kBlockRows];
    const V zero = broadcast(T(0));
    if (a_.sink != nullptr) {
      // A sink is a bias without a product. What was summed is relative to it where it is highest.
      block.for_each([&](int64_t r, int64_t, int64_t head) { block.bias[r] = sink_of(head); });
      for (int64_t r = block.rows; r < block.lanes; ++r) block.bias[r] = kNothing<T>;
    }
    for (int64_t lane = 0; lane < block.lanes; lane += kLanes) {
      // A query that met no key may hold anything.
      const uint32_t met = greater(load(block.bias_of_highest + lane), broadcast(kNothing<T>));
      const V factor = select(met, load(block.factor + lane), zero);
      store(block.factor + lane, factor);
      V total = zero;
      store(factors + lane, broadcast(T(1)));
      if (a_.sink != nullptr) {
        store(factors + lane, raise(block, lane, zero));
        const V sink = load(block.bias + lane);
        total = power(zero, load(block.product + lane), factor, sub(sink, load(block.bias_of_highest + lane)));
        total = select(greater(broadcast(T(0.9) * kNothing<T>), sink), zero, total);
      }
      const V product = load(block.product + lane), bias = load(block.bias_of_highest + lane);
      for (int64_t m = 0; m < a_.segments; ++m) {
        // What met no key stays 0 beside what met NaN.
        T* const sums = block.sums + m * kBlockRows + lane;
        const V sum = load(sums), by = power(load(block.products + m * kBlockRows + lane), product, factor,
                                             sub(load(block.biases + m * kBlockRows + lane), bias));
        const V share = select(greater(sum, zero), mul(sum, by), sum);
        store(sums, share);
        total = add(total, share);
      }
      store(totals + lane, total);
    }
    block.for_each([&](int64_t r, int64_t i, int64_t head) __attribute__((always_inline)) {
      const int64_t at = (queries_.first_result + i) * heads + head;
      const bool nothing = totals[r] == T(0);
      const T inverse = nothing ? T(0) : T(1) / totals[r];
      write_row(block.out + r * widths_.value_width, factors[r] * inverse, a_.value_width,
                static_cast<Raw*>(to_.out) + at * a_.value_width);
      bool keys = false;
      for (int64_t m = 0; m < a_.segments; ++m) {
        const T share = block.sums[m * kBlockRows + r];
        keys |= !(share == T(0));
        if (to_.mass != nullptr) to_.mass[at * a_.segments + m] = share == T(0) ? T(0) : share * inverse;
      }
      if (nothing || !keys) {
        to_.lse[at] = nothing ? -__builtin_huge_val() : static_cast<double>(a_.sink[head]);
      } else {
        const double exact = static_cast<double>(block.factor[r]) + static_cast<double>(block.rest[r]);
        const double highest = static_cast<double>(block.product[r]) * exact + static_cast<double>(block.bias_of_highest[r]);
        to_.lse[at] = (highest + log2_of(static_cast<double>(totals[r]))) * kLn2;
      }
    });
  }

  T sink_of(int64_t head) const {
    const double sink = static_cast<double>(a_.sink[head]) * kLog2E;
    if (sink == -__builtin_huge_val()) return kNothing<T>;
    return static_cast<T>(sink < -kMostBias ? -kMostBias : sink);
  }

  const Attention<T>& a_;
  const AttentionResults<T>& to_;
  const Widths<Kind> widths_;
  Shared<Kind, T> shared_;
  Keys<Kind, T> keys_;
  Ahead<Kind, T> ahead_;
  RowsAhead rows_ahead_;
  const AttentionUnit& unit_;
  int64_t next_;  // the sequence whose keys are met after this one's, or −1
  int64_t most_blocks_;
  Block<Kind, T>* blocks_;
  Arena arena_;  // for the blocks' own memory
  const Queries queries_;
};

template <typename T>
int64_t scratch_bytes(const Attention<T>& a) {
  int64_t bytes = 0;
  with_kind<T>(a.element, [&](auto kind) {
    using Kind = decltype(kind);
    const Widths<Kind> widths(a, false);
    const int64_t blocks = blocks_at_a_time<Kind>(a, widths);
    Arena arena{nullptr};
    Shared<Kind, T>(widths, arena);
    Keys<Kind, T>(widths, arena);
    Ahead<Kind, T>(a, arena);
    arena.take<Block<Kind, T>>(blocks);
    bytes = arena.used + blocks * block_bytes<Kind>(a, widths);
  });
  return bytes;
}

template <typename T>
void attend(const Attention<T>& a, const AttentionResults<T>& to, const AttentionUnit& unit, int64_t next, char* scratch) {
  with_kind<T>(a.element, [&](auto kind) {
    Arena arena{scratch};
    Task<decltype(kind), T>(a, to, unit, next, arena).run();
  });
}

template <typename T>
constexpr AttentionForward<T> kKernels = {scratch_bytes<T>, attend<T>};

}  // namespace

void attention_kernels(AttentionForward<float>& kernels) { kernels = kKernels<float>; }
void attention_kernels(AttentionForward<double>& kernels) { kernels = kKernels<double>; }

}  // namespace MMREC_ISA
}  // namespace mmrec
