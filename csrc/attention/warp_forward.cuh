// Attention for tiny sequences on NVIDIA GPUs: a warp owns a sequence and a KV head, all in registers.
//
// out_i = Σ_m gate_m Σ_{j∈m} P_ij v_j, one softmax over the union of the segments; see docs/attention.md. Sixteen rows (queries
// x heads of the KV head) meet sixteen keys at a time: S = Q K' is 2 D/16 products m16n8k16 and P V another D/8, without shared
// memory or barriers. The 16 along which a product adds up may be taken in any order: a lane reads 16 bytes of a row of K and
// calls them its part of two products, if it does the same with Q. Columns of V may be named in any order: a lane reads eight
// of them of four keys, and writes eight next to each other. P leaves its product in the form in which the next one takes it.
//
// Reads q, k, v once, for up to 16 rows; writes out, lse, mass once. 4 D flops for each of 16 x ⌈keys / 16⌉ pairs.
#pragma once

#include "../common/warp.cuh"

namespace mmrec {

constexpr int kWarpSegments = 8;  // a column of masses each

struct WarpSegment {
  const char *key, *value;
  const int64_t* index;  // or null
  int64_t key_row, key_head, value_row, value_head;  // bytes
  int64_t rows, entries;
};

// [B, H, M] read with strides, 0 where it is broadcast.
struct WarpPerSegment {
  const float* data;  // or null
  int64_t batch, head, segment;

  MMREC_DEVICE float at(int64_t b, int64_t h, int m) const { return data[b * batch + h * head + m * segment]; }
};

struct WarpParams {
  const char* query;
  const int64_t* query_offsets;  // null: latent queries, query_rows of every sequence
  const int64_t* offsets;        // [M, B + 1]
  const float *sink, *query_norm, *key_norm;  // or null
  char* out;
  double* lse;
  float* mass;  // or null
  WarpPerSegment log_bias, value_gate;
  int64_t query_row, query_head;  // bytes
  int64_t batch, query_rows;
  int kv_heads, group, segments, causal;
  float scale, norm_eps;
  WarpSegment segment[kWarpSegments];
};

template <typename T, int D>
struct WarpForward {
  static constexpr float kLog2E = 1.4426950408889634f;
  static constexpr double kLn2 = 0.6931471805599453;
  static constexpr float kNothing = -__builtin_huge_valf();
  static constexpr float kMost = 1099511627776.0f;  // 2^40: finite biases and sinks beyond it count as it
  static constexpr int kSteps = D / 16;             // products along D
  static constexpr int kColumns = D < 64 ? D / 8 : 8;  // of V, next to each other in a lane
  static constexpr int kTiles = D / 8;                 // of eight columns
  static constexpr int kAlways = -(1 << 30);           // the first query that sees a key that is not causal

  const WarpParams& p;
  const int lane, g, t;  // t: the lane of four that share a row
  int64_t b;
  int hk, n_queries, total;
  int64_t first, first_result;
  // Of segment `lane`: its first entry, its length and place in the union, and how far its causal diagonal is shifted.
  int64_t entry;
  int count, before, diagonal;

  static MMREC_DEVICE float bounded(float x) {
    const float power = x * kLog2E;
    return power == kNothing ? power : fminf(fmaxf(power, -kMost), kMost);
  }
  static MMREC_DEVICE int64_t clamped(int64_t x, int64_t most) { return x < 0 ? 0 : x > most ? most : x; }

  // Which column of a row the lane's element e of D / 4 is: 16 bytes lie together, and so do a quad's.
  static MMREC_DEVICE int column(int e, int t) { return D == 16 ? 4 * t + e : e / 8 * 32 + 8 * t + e % 8; }

  // The lane's elements of a row, two words for each product; 0 without a row.
  static MMREC_DEVICE void load_row(const char* row, int t, uint32_t (&words)[kSteps][2]) {
    constexpr int kAtOnce = D == 16 ? 2 : 4;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; i += kAtOnce) {
      warp::Words<kAtOnce> read{};
      if (row != nullptr) read = *reinterpret_cast<const warp::Words<kAtOnce>*>(row + 2 * column(2 * i, t));
#pragma unroll
      for (int w = 0; w < kAtOnce; ++w) words[(i + w) / 2][(i + w) % 2] = read.word[w];
    }
  }

  MMREC_DEVICE WarpForward(const WarpParams& params, int64_t unit)
      : p(params), lane(warp::lane()), g(lane >> 2), t(lane & 3) {
    b = unit / p.kv_heads;
    hk = static_cast<int>(unit % p.kv_heads);
    if (p.query_offsets == nullptr) {
      first = 0;
      n_queries = static_cast<int>(p.query_rows);
      first_result = b * p.query_rows;
    } else {
      first = clamped(p.query_offsets[b], p.query_rows);
      const int64_t last = clamped(p.query_offsets[b + 1], p.query_rows);
      n_queries = last > first ? static_cast<int>(last - first) : 0;
      first_result = first;
    }
    find_keys();
  }

  MMREC_DEVICE void find_keys() {
    entry = 0;
    count = 0;
    diagonal = kAlways;
    if (lane < p.segments && n_queries > 0) {
      const int64_t most = p.segment[lane].entries;
      const int64_t* offset = p.offsets + lane * (p.batch + 1) + b;
      entry = clamped(offset[0], most);
      const int64_t last = clamped(offset[1], most);
      count = last > entry ? static_cast<int>(last - entry) : 0;
      if (p.causal >> lane & 1) diagonal = n_queries - count;
      if (p.log_bias.data != nullptr && count > 0) {
        bool seen = false;
        for (int h = 0; h < p.group; ++h) seen |= p.log_bias.at(b, hk * p.group + h, lane) != kNothing;
        if (!seen) count = 0;
      }
    }
    int sum = count;
    for (int by = 1; by < 32; by *= 2) {
      const int left = warp::shuffle_up(sum, by);
      if (lane >= by) sum += left;
    }
    before = sum - count;
    total = warp::shuffle(sum, 31);
  }

  // Rows that no sequence owns: out 0, lse -inf, mass 0.
  MMREC_DEVICE void fill(int64_t begin, int64_t end) const {
    const int heads = p.kv_heads * p.group;
    for (int64_t r = begin; r < end; ++r) {
      for (int h = hk * p.group; h < (hk + 1) * p.group; ++h) {
        const int64_t at = r * heads + h;
        for (int d = lane; d < D / 2; d += 32) reinterpret_cast<uint32_t*>(p.out)[at * (D / 2) + d] = 0;
        if (lane == 0) p.lse[at] = -__builtin_huge_val();
        if (p.mass != nullptr && lane < p.segments) p.mass[at * p.segments + lane] = 0.0f;
      }
    }
  }

  // Two rows of the tile are the lane's: what is kept of each.
  struct Row {
    int query, head;
    bool valid;
    float factor, reference, alone, top, weight;
  };

  // A quad reads a row of Q, scaled by the weights of the norms; its reciprocal RMS goes into the factor.
  MMREC_DEVICE void load_query(Row& row, uint32_t (&q)[kSteps][4], int half) {
    const char* from = nullptr;
    if (row.valid && total > 0) from = p.query + (first + row.query) * p.query_row + row.head * p.query_head;
    uint32_t words[kSteps][2];
    load_row(from, t, words);
    float squares = 0.0f;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t& word = words[s][i];
        if (p.query_norm != nullptr || p.key_norm != nullptr) {
          float low = T::low(word), high = T::high(word);
          squares = fmaf(low, low, fmaf(high, high, squares));
          const int d = column(4 * s + 2 * i, t);
          if (p.query_norm != nullptr) {
            low *= p.query_norm[d];
            high *= p.query_norm[d + 1];
          }
          if (p.key_norm != nullptr) {
            low *= p.key_norm[d];
            high *= p.key_norm[d + 1];
          }
          word = T::pack(low, high);
        }
        q[s][2 * i + half] = word;
      }
    }
    row.factor = p.scale * kLog2E;
    if (p.query_norm != nullptr) row.factor *= warp::reciprocal_root(warp::quad_sum(squares) / D + p.norm_eps);
  }

  // The highest bias among the segments that the row sees: scores are relative to it, and lose no digits beside it.
  MMREC_DEVICE void find_reference(Row& row) {
    row.reference = 0.0f;
    if (p.log_bias.data != nullptr) {
      float highest = kNothing;
      for (int m = 0; m < p.segments; ++m) {
        const int keys = warp::shuffle(count, m), from = warp::shuffle(diagonal, m);
        if (row.valid && keys > 0 && from <= row.query) highest = fmaxf(highest, bounded(p.log_bias.at(b, row.head, m)));
      }
      if (highest != kNothing) row.reference = highest;
    }
    row.alone = kNothing;
    if (p.sink != nullptr && row.valid) row.alone = bounded(p.sink[row.head]) - row.reference;
    row.top = row.alone;
    row.weight = row.alone == kNothing || t != 0 ? 0.0f : 1.0f;  // summed over the quad in the end
  }

  // Where key `lane` % 16 of the tile lies.
  struct Key {
    const char *key, *value;
    int segment;      // -1: no key
    int first_query;  // that sees it
  };

  MMREC_DEVICE Key locate(int start) const {
    Key found{nullptr, nullptr, -1, 0};
    const int place = start + (lane & 15);
    int owner = 0;
    for (int m = 1; m < p.segments; ++m) {
      const int begin = warp::shuffle(before, m), keys = warp::shuffle(count, m);
      if (keys > 0 && place >= begin) owner = m;
    }
    const int position = place - warp::shuffle(before, owner);
    int64_t row = warp::shuffle(entry, owner) + position;
    found.first_query = warp::shuffle(diagonal, owner) + position;
    if (place < total) {
      const WarpSegment& segment = p.segment[owner];
      if (segment.index != nullptr) row = segment.index[row];
      if (row >= 0 && row < segment.rows) {
        found.key = segment.key + row * segment.key_row + hk * segment.key_head;
        found.value = segment.value + row * segment.value_row + hk * segment.value_head;
        found.segment = owner;
      }
    }
    return found;
  }

  MMREC_DEVICE void tile(int r0) {
    Row row[2];
    uint32_t q[kSteps][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = r0 + g + 8 * i;
      row[i].query = r / p.group;
      row[i].head = hk * p.group + r % p.group;
      row[i].valid = row[i].query < n_queries;
      load_query(row[i], q, i);
      find_reference(row[i]);
    }
    float acc[kTiles][4] = {}, mass[4] = {};
    for (int start = 0; start < total; start += 16) meet(start, row, q, acc, mass);
    finish(row, acc, mass);
  }

  MMREC_DEVICE void meet(int start, Row (&row)[2], const uint32_t (&q)[kSteps][4], float (&acc)[kTiles][4],
                         float (&mass)[4]) {
    const Key mine = locate(start);
    float s[2][4] = {};
    float rms[2][2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const char* key = reinterpret_cast<const char*>(
          warp::shuffle(reinterpret_cast<unsigned long long>(mine.key), 8 * n + g));
      uint32_t k[kSteps][2];
      load_row(key, t, k);
      float squares = 0.0f;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        T::mma(s[n], q[step], k[step]);
        if (p.key_norm != nullptr) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float low = T::low(k[step][i]), high = T::high(k[step][i]);
            squares = fmaf(low, low, fmaf(high, high, squares));
          }
        }
      }
      if (p.key_norm != nullptr) {
        const float mean = warp::quad_sum(squares) / D;
        const float inverse = warp::reciprocal_root(mean + p.norm_eps);
        // Row g of K is column g of S.
        rms[n][0] = warp::shuffle(inverse, 8 * t);
        rms[n][1] = warp::shuffle(inverse, 8 * t + 4);
      }
    }

    // The lane's four keys: 2t, 2t + 1, 2t + 8, 2t + 9.
    int segment[4], first_query[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int from = 2 * t + (j & 1) + 8 * (j >> 1);
      segment[j] = warp::shuffle(mine.segment, from);
      first_query[j] = warp::shuffle(mine.first_query, from);
    }
    float weight[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float shift[4], highest = row[i].top;
      bool keep[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& product = s[j >> 1][2 * i + (j & 1)];
        product *= rms[j >> 1][j & 1];
        keep[j] = segment[j] >= 0 && first_query[j] <= row[i].query && row[i].valid;
        shift[j] = 0.0f;
        if (p.log_bias.data != nullptr && keep[j]) {
          const float bias = bounded(p.log_bias.at(b, row[i].head, segment[j]));
          keep[j] = bias != kNothing;
          shift[j] = bias - row[i].reference;
        }
        if (keep[j]) highest = fmaxf(highest, fmaf(product, row[i].factor, shift[j]));
      }
      highest = warp::quad_max(highest);
      const float safe = highest == kNothing ? 0.0f : highest;
      const float shrink = exp2f(row[i].top - safe);
      row[i].top = highest;
      row[i].weight *= shrink;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float product = s[j >> 1][2 * i + (j & 1)];
        weight[i][j] = keep[j] ? exp2f(fmaf(product, row[i].factor, shift[j] - safe)) : 0.0f;
        row[i].weight += weight[i][j];
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        acc[n][2 * i] *= shrink;
        acc[n][2 * i + 1] *= shrink;
      }
      mass[2 * i] *= shrink;
      mass[2 * i + 1] *= shrink;
    }
    if (p.mass != nullptr) add_mass(weight, segment, mass);
    if (p.value_gate.data != nullptr) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          // The gate of a segment that is not met may be NaN.
          if (weight[i][j] != 0.0f) weight[i][j] *= p.value_gate.at(b, row[i].head, segment[j]);
        }
      }
    }
    const uint32_t weights[4] = {T::pack(weight[0][0], weight[0][1]), T::pack(weight[1][0], weight[1][1]),
                                 T::pack(weight[0][2], weight[0][3]), T::pack(weight[1][2], weight[1][3])};
    const char* value[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      value[j] = reinterpret_cast<const char*>(warp::shuffle(reinterpret_cast<unsigned long long>(mine.value),
                                                             2 * t + (j & 1) + 8 * (j >> 1)));
    }
#pragma unroll
    for (int chunk = 0; chunk < kTiles / kColumns; ++chunk) {
      warp::Words<kColumns / 2> v[4] = {};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (value[j] != nullptr) {
          v[j] = *reinterpret_cast<const warp::Words<kColumns / 2>*>(value[j] + 2 * (64 * chunk + kColumns * g));
        }
      }
#pragma unroll
      for (int column = 0; column < kColumns; ++column) {
        const int word = column / 2;
        uint32_t pair[2];
        for (int i = 0; i < 2; ++i) {
          const uint32_t a = v[2 * i].word[word], c = v[2 * i + 1].word[word];
          pair[i] = column % 2 == 0 ? warp::low_halves(a, c) : warp::high_halves(a, c);
        }
        T::mma(acc[chunk * kColumns + column], weights, pair);
      }
    }
  }

  // Column m of the product of weights with "key j is of segment m". Weights go in as two summands of 16 bits: masses have
  // twice the digits of an output.
  MMREC_DEVICE void add_mass(const float (&weight)[2][4], const int (&segment)[4], float (&mass)[4]) const {
    uint32_t is[2], high[4], rest[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      is[i] = T::pack(segment[2 * i] == g ? 1.0f : 0.0f, segment[2 * i + 1] == g ? 1.0f : 0.0f);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float a = weight[i][2 * half], c = weight[i][2 * half + 1];
        const uint32_t word = T::pack(a, c);
        high[2 * half + i] = word;
        rest[2 * half + i] = T::pack(a - T::low(word), c - T::high(word));
      }
    }
    T::mma(mass, high, is);
    T::mma(mass, rest, is);
  }

  MMREC_DEVICE void finish(const Row (&row)[2], const float (&acc)[kTiles][4], const float (&mass)[4]) const {
    const int heads = p.kv_heads * p.group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weight = warp::quad_sum(row[i].weight);
      if (!row[i].valid) continue;
      const int64_t at = (first_result + row[i].query) * heads + row[i].head;
      const float divisor = weight == 0.0f ? 1.0f : weight;
#pragma unroll
      for (int chunk = 0; chunk < kTiles / kColumns; ++chunk) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          warp::Words<kColumns / 2> words;
#pragma unroll
          for (int w = 0; w < kColumns / 2; ++w) {
            const int column = chunk * kColumns + 2 * w;
            words.word[w] = T::pack(acc[column][2 * i + n] / divisor, acc[column + 1][2 * i + n] / divisor);
          }
          char* to = p.out + 2 * (at * D + 64 * chunk + kColumns * (2 * t + n));
          *reinterpret_cast<warp::Words<kColumns / 2>*>(to) = words;
        }
      }
      if (t == 0) {
        double lse = (static_cast<double>(row[i].top) + static_cast<double>(row[i].reference) +
                      log2(static_cast<double>(divisor))) * kLn2;
        // Alone, the sink is what comes out.
        if (p.sink != nullptr && weight == 1.0f && row[i].top == row[i].alone && fabsf(bounded(p.sink[row[i].head])) < kMost) {
          lse = static_cast<double>(p.sink[row[i].head]);
        }
        p.lse[at] = weight == 0.0f ? -__builtin_huge_val() : lse;
      }
      if (p.mass != nullptr) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (2 * t + n < p.segments) p.mass[at * p.segments + 2 * t + n] = mass[2 * i + n] / divisor;
        }
      }
    }
  }

  MMREC_DEVICE void run() {
    for (int r0 = 0; r0 < n_queries * p.group; r0 += 16) tile(r0);
    if (p.query_offsets == nullptr) return;
    if (b == 0) fill(0, first);
    if (b == p.batch - 1) fill(clamped(p.query_offsets[p.batch], p.query_rows), p.query_rows);
  }
};

}  // namespace mmrec
