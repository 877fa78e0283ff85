// `route` for few tokens on NVIDIA GPUs in one launch: weights, experts, statistics, losses and the experts' plan.
//
// A block takes kTokens tokens, a warp four of them, as many at once as have room beside each other with an expert to a lane (two
// from 64 experts on). A lane reads the gate's row of its expert, all lanes of a token the token's row. What a block sums up goes
// to memory, and the block that comes last adds the sums of all in their order, makes statistics and losses of them, and places
// every slot: it counts where the pairs of each expert and block begin. Which block is last changes nothing.
//
// The kernel is a few phases with barriers between; within a phase only the lanes of a warp speak to each other. So the phases
// also run on the host (tests/emulated_warp.h). Reads x and the gate's rows that are used once per token from cache; formulas:
// reference.py.
#pragma once

#include "../common/elements.cuh"

namespace mmrec {

constexpr int kSmallTokens = 4096, kSmallExperts = 64, kSmallModalities = 8;

enum class SmallScore : int { kSoftmax, kTopkSoftmax, kSigmoid };

struct SmallRouteParams {
  const char *x, *gate;
  const int64_t* modality;                    // or null
  const uint8_t *valid, *allowed;             // or null
  const float* bias;                          // [M, E] or null
  float* weights;                             // [T, k]
  int32_t* experts;                           // [T, k]
  float *stats, *losses;                      // [M, E, 3], [4, M]
  int64_t *starts, *pair_tokens, *pair_of;    // [E + 1], [T · k], [T, k]
  float *sums, *totals;                       // of each block: [M, 3, kE] (slots, Σ p̄, Σ weight), [M, 3] (tokens, Σ lse², Σ H)
  int32_t *counts, *ranks;                    // [blocks, kE], [T, k]
  unsigned* arrived;                          // 0
  int64_t x_row;                              // bytes
  int tokens, width, num_experts, modalities, k, blocks;
  int x_aligned, gate_aligned, divides;
  SmallScore score;
};

// X, G: element types of x and the gate. kE: experts, rounded up to 8, 16, 32 or 64.
template <typename X, typename G, int kE>
struct SmallRoute {
  static constexpr int kTokens = 32, kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kGroup = kE < 32 ? kE : 32, kPer = kE / kGroup, kAtOnce = 32 / kGroup;
  static constexpr int kNone = 1 << 20;
  static constexpr float kInfinity = __builtin_huge_valf();

  struct Shared {
    float share[kTokens][kE], weight[kTokens][kE];
    int slot[kTokens][kE];  // −1: not chosen
    int modality[kTokens];  // −1: not routed
    float lse[kTokens], entropy[kTokens];
    uint32_t named[kE];  // which of the block's tokens
    double sums[kSmallModalities][3][kE], totals[kSmallModalities][3];
    int64_t starts[kE + 1];
    int count[kE];
    int last;
  };

  const SmallRouteParams& p;
  Shared& s;
  const int block, thread;

  template <typename T>
  static MMREC_DEVICE T group_sum(T x) {
    for (int mask = 1; mask < kGroup; mask *= 2) x += warp::shuffle_xor(x, mask);
    return x;
  }
  static MMREC_DEVICE float group_max(float x) {
    for (int mask = 1; mask < kGroup; mask *= 2) x = fmaxf(x, warp::shuffle_xor(x, mask));
    return x;
  }
  static MMREC_DEVICE float log_sigmoid(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }
  static MMREC_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

  // Of a lane's experts: the sum of powers e^(u − top) over a token's lanes, where `in`.
  struct Powers {
    float top, total, power[kPer];

    MMREC_DEVICE Powers(const float (&u)[kPer], const bool (&in)[kPer]) {
      float highest = -kInfinity;
      for (int j = 0; j < kPer; ++j) highest = in[j] ? fmaxf(highest, u[j]) : highest;
      top = group_max(highest);
      float sum = 0;
      for (int j = 0; j < kPer; ++j) {
        power[j] = in[j] ? expf(u[j] - top) : 0.0f;
        sum += power[j];
      }
      total = group_sum(sum);
    }
  };

  // Phase 1, by warps: the block's tokens.
  MMREC_DEVICE void route_tokens() {
    const int lane = warp::lane(), expert = lane % kGroup, warp_of = thread / 32;
    for (int first = 0; first < 4; first += kAtOnce) route_token(warp_of * 4 + first + lane / kGroup, expert);
  }

  MMREC_DEVICE void route_token(int own, int expert) {
    const int t = block * kTokens + own;
    const bool inside = t < p.tokens;
    int m = inside ? 0 : -1;
    if (inside && p.modality != nullptr) {
      const int64_t given = p.modality[t];
      m = given >= 0 && given < p.modalities ? static_cast<int>(given) : -1;
    }
    if (inside && p.valid != nullptr && p.valid[t] == 0) m = -1;
    bool choice[kPer];
    int count = 0;
    for (int j = 0; j < kPer; ++j) {
      const int e = expert + 32 * j;
      choice[j] = m >= 0 && e < p.num_experts && (p.allowed == nullptr || p.allowed[m * p.num_experts + e] != 0);
      count += choice[j] ? 1 : 0;
    }
    count = group_sum(count);

    float logit[kPer], u[kPer];
    for (int j = 0; j < kPer; ++j) {
      logit[j] = choice[j] ? dot(t, expert + 32 * j) : 0.0f;
      u[j] = logit[j];
    }
    const Powers of_logits(logit, choice);
    const float lse = of_logits.top + logf(of_logits.total);
    Powers scores = of_logits;
    if (p.score == SmallScore::kSigmoid) {
      for (int j = 0; j < kPer; ++j) u[j] = log_sigmoid(logit[j]);
      scores = Powers(u, choice);
    }
    float share[kPer], spread = 0, nan = 0;
    for (int j = 0; j < kPer; ++j) {
      share[j] = choice[j] ? scores.power[j] / scores.total : 0.0f;
      if (scores.power[j] > 0.0f) spread += share[j] * (u[j] - scores.top);
      nan += share[j] - share[j];
    }
    const float entropy = logf(scores.total) - group_sum(spread);
    nan = group_sum(nan);

    int slot[kPer];
    rank(m, expert, choice, logit, share, slot);
    bool chosen[kPer];
    for (int j = 0; j < kPer; ++j) chosen[j] = slot[j] >= 0;
    const Powers among(u, chosen);
    for (int j = 0; j < kPer; ++j) {
      const int e = expert + 32 * j;
      float weight = share[j];
      if (p.divides != 0) {
        weight = among.power[j] / among.total;
      } else if (p.score == SmallScore::kSigmoid) {
        weight = sigmoid(logit[j]);
      }
      weight = chosen[j] ? weight + nan : 0.0f;
      s.share[own][e] = share[j];
      s.weight[own][e] = weight;
      s.slot[own][e] = slot[j];
      if (chosen[j]) {
        p.weights[t * p.k + slot[j]] = weight;
        p.experts[t * p.k + slot[j]] = e;
      }
    }
    if (expert == 0) {
      s.modality[own] = count > 0 ? m : -1;
      s.lse[own] = lse;
      s.entropy[own] = entropy;
    }
    for (int unused = expert; inside && unused < p.k; unused += kGroup) {
      if (unused < count) continue;
      p.weights[t * p.k + unused] = 0.0f;
      p.experts[t * p.k + unused] = -1;
    }
  }

  MMREC_DEVICE float dot(int t, int e) const {
    const char* const row = p.x + t * p.x_row;
    const char* const gate = p.gate + static_cast<int64_t>(e) * p.width * G::kBytes;
    float sums[4] = {};
    for (int d = 0; d < p.width; d += 8) {
      float a[8], b[8];
      elements::load_eight<X>(row, d, p.width, p.x_aligned != 0, a);
      elements::load_eight<G>(gate, d, p.width, p.gate_aligned != 0, b);
      for (int i = 0; i < 8; ++i) sums[i % 4] = fmaf(a[i], b[i], sums[i % 4]);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  // The slot of each of the lane's experts in the order of score + bias, ties to the lower expert; −1 where it gets none.
  MMREC_DEVICE void rank(int m, int expert, const bool (&choice)[kPer], const float (&logit)[kPer],
                         const float (&share)[kPer], int (&slot)[kPer]) const {
    float key[kPer];
    bool left[kPer];
    for (int j = 0; j < kPer; ++j) {
      key[j] = logit[j];
      if (p.bias != nullptr && choice[j]) {
        if (p.score == SmallScore::kSoftmax) key[j] = share[j];
        if (p.score == SmallScore::kSigmoid) key[j] = sigmoid(logit[j]);
        key[j] += p.bias[m * p.num_experts + expert + 32 * j];
      }
      if (!(key[j] == key[j])) key[j] = kInfinity;  // a NaN comes first: then all weights of the token are NaN
      left[j] = choice[j];
      slot[j] = -1;
    }
    const int slots = p.k < p.num_experts ? p.k : p.num_experts;
    for (int next = 0; next < slots; ++next) {
      float best = -kInfinity;
      int at = kNone;
      const auto take = [&](float other, int e) {
        if (e != kNone && (at == kNone || other > best || (other == best && e < at))) {
          best = other;
          at = e;
        }
      };
      for (int j = 0; j < kPer; ++j) {
        if (left[j]) take(key[j], expert + 32 * j);
      }
      for (int mask = 1; mask < kGroup; mask *= 2) {
        const float other = warp::shuffle_xor(best, mask);
        take(other, warp::shuffle_xor(at, mask));
      }
      for (int j = 0; j < kPer; ++j) {
        if (left[j] && at == expert + 32 * j) {
          slot[j] = next;
          left[j] = false;
        }
      }
    }
  }

  // Phase 2, by threads: the block's sums, in the order of its tokens.
  MMREC_DEVICE void add_tokens() {
    for (int i = thread; i < p.modalities * kE; i += kThreads) {
      const int m = i / kE, e = i % kE;
      float taken = 0, share = 0, given = 0;
      for (int own = 0; own < kTokens; ++own) {
        if (s.modality[own] != m) continue;
        taken += s.slot[own][e] >= 0 ? 1.0f : 0.0f;
        share += s.share[own][e];
        given += s.weight[own][e];
      }
      float* const to = p.sums + (static_cast<int64_t>(block) * p.modalities + m) * 3 * kE + e;
      to[0] = taken;
      to[kE] = share;
      to[2 * kE] = given;
    }
    for (int m = thread; m < p.modalities; m += kThreads) {
      float tokens = 0, squares = 0, unsure = 0;
      for (int own = 0; own < kTokens; ++own) {
        if (s.modality[own] != m) continue;
        tokens += 1;
        squares += s.lse[own] * s.lse[own];
        unsure += s.entropy[own];
      }
      float* const to = p.totals + (static_cast<int64_t>(block) * p.modalities + m) * 3;
      to[0] = tokens;
      to[1] = squares;
      to[2] = unsure;
    }
    for (int e = thread; e < kE; e += kThreads) {
      uint32_t named = 0;
      for (int own = 0; own < kTokens; ++own) named |= s.slot[own][e] >= 0 ? 1u << own : 0u;
      s.named[e] = named;
      p.counts[block * kE + e] = warp::ones(named);
    }
  }

  // Phase 3, by threads: how many of the block's tokens before it name the expert of a slot.
  MMREC_DEVICE void rank_slots() {
    for (int i = thread; i < kTokens * kE; i += kThreads) {
      const int own = i / kE, e = i % kE, slot = s.slot[own][e];
      if (slot >= 0) p.ranks[(block * kTokens + own) * p.k + slot] = warp::ones(s.named[e] & ((1u << own) - 1u));
    }
  }

  // Phase 4, by threads of the block that came last: the sums of all blocks, and where each one's pairs of an expert begin.
  MMREC_DEVICE void add_blocks() {
    const int columns = p.modalities * 3 * kE;
    for (int i = thread; i < columns; i += kThreads) {
      double sum = 0;
      for (int b = 0; b < p.blocks; ++b) sum += static_cast<double>(warp::from_others(p.sums + static_cast<int64_t>(b) * columns + i));
      s.sums[i / (3 * kE)][i / kE % 3][i % kE] = sum;
    }
    for (int i = thread; i < p.modalities * 3; i += kThreads) {
      double sum = 0;
      for (int b = 0; b < p.blocks; ++b) sum += static_cast<double>(warp::from_others(p.totals + b * p.modalities * 3 + i));
      s.totals[i / 3][i % 3] = sum;
    }
    // The last warps count, so that they need not wait for the first ones' sums.
    for (int e = kThreads - 1 - thread; e < kE; e += kThreads) {
      int running = 0;
      for (int b = 0; b < p.blocks; ++b) {
        int32_t* const at = p.counts + b * kE + e;
        const int here = warp::from_others(at);
        *at = running;
        running += here;
      }
      s.count[e] = running;
    }
  }

  // Phase 5, by threads: where each expert's pairs begin; statistics and losses.
  MMREC_DEVICE void finish() {
    if (thread == 0) {
      int64_t running = 0;
      for (int e = 0; e <= p.num_experts; ++e) {
        s.starts[e] = running;
        p.starts[e] = running;
        if (e < p.num_experts) running += s.count[e];
      }
    }
    for (int i = thread; i < p.modalities * p.num_experts; i += kThreads) {
      const int m = i / p.num_experts, e = i % p.num_experts;
      for (int n = 0; n < 3; ++n) p.stats[3 * i + n] = static_cast<float>(s.sums[m][n][e]);
    }
    for (int m = kThreads - 1 - thread; m < p.modalities; m += kThreads) {
      const double tokens = s.totals[m][0], per_token = tokens > 0 ? 1 / tokens : 0;
      double slots = 0, choices = 0, balance = 0, spread = 0;
      for (int e = 0; e < p.num_experts; ++e) {
        const double mean = s.sums[m][1][e] * per_token;
        choices += p.allowed == nullptr || p.allowed[m * p.num_experts + e] != 0 ? 1 : 0;
        slots += s.sums[m][0][e];
        balance += s.sums[m][0][e] * mean;
        if (mean != 0) spread -= mean * log(mean);
      }
      p.losses[m] = static_cast<float>(slots > 0 ? choices * balance / slots : 0);
      p.losses[p.modalities + m] = static_cast<float>(s.totals[m][1] * per_token);
      p.losses[2 * p.modalities + m] = static_cast<float>(s.totals[m][2] * per_token);
      p.losses[3 * p.modalities + m] = static_cast<float>(spread);
    }
  }

  // Phase 6, by threads: the pair of each slot, by expert, then by token.
  MMREC_DEVICE void place() {
    for (int i = thread; i < p.tokens * p.k; i += kThreads) {
      const int e = warp::from_others(p.experts + i), t = i / p.k;
      int64_t pair = -1;
      if (e >= 0) {
        pair = s.starts[e] + p.counts[t / kTokens * kE + e] + warp::from_others(p.ranks + i);
        p.pair_tokens[pair] = t;
      }
      p.pair_of[i] = pair;
    }
  }
};

}  // namespace mmrec
