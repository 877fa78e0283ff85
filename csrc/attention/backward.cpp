// Attention on CPU, the backward: where gradients go, sums over sequences, registration.
//
// A row that one sequence owns gets its gradient from one task. Rows that many sequences share (through an index, or latent
// queries) get it in two steps: each reference's share is written out for as many sequences as kChunkBytes hold, then every row
// adds up its own in their order. Chunks depend on sizes alone, so results have the same bits for any number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <utility>

#include "../common/parallel.h"
#include "problem.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kChunkBytes = int64_t{32} << 20;

// The bits of `needs`, in the order of ATTENTION_NEEDS.
enum Need : int { kQuery, kLogBias, kValueGate, kSink, kQueryNorm, kKeyNorm };

// The gradients of one side (keys or values) of the segments, and of what they need beside it.
template <typename T>
struct Side {
  int64_t width = 0;
  Tensor rows;                       // of the segments that need it, one after the other
  std::vector<char*> begin;          // per segment, or null
  std::vector<Buffer<T>> sums;       // per segment, where rows are shared and not T themselves
  std::vector<Buffer<T>> shares;     // per segment: those of a chunk's references
};

// What comes from above, and what the forward left.
struct Upstream {
  const std::optional<Tensor>&out, &lse, &mass;
};
struct Left {
  const Tensor &out, &lse, &mass;
};
struct Needs {
  int64_t singles, keys, values;
  bool operator[](Need need) const { return (singles >> need & 1) != 0; }
};

template <typename T>
class Pass {

 public:
  Pass(const AttentionArguments& arguments, const Upstream& upstream, const Left& left, const Needs& needs)
      : arguments_(arguments), needs_(needs), problem_(arguments), segments_(static_cast<size_t>(problem_.kernel.segments)) {
    const auto held = [&](const Tensor& tensor) {
      held_.push_back(torch::stable::contiguous(tensor));
      return held_.back().const_data_ptr();
    };
    if (upstream.out) to_.grad_out = held(*upstream.out);
    if (upstream.lse) to_.grad_lse = static_cast<const double*>(held(*upstream.lse));
    to_.out = held(left.out);
    to_.lse = static_cast<const double*>(held(left.lse));
    if (upstream.mass) {
      to_.grad_mass = static_cast<const T*>(held(*upstream.mass));
      to_.mass = static_cast<const T*>(held(left.mass));
    }
    for (int64_t b = 0; b < problem_.sequences; ++b) most_queries_ = std::max(most_queries_, problem_.queries_of(b));
    make_results();
  }

  Results run() {
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const int64_t bytes = kernels_here<AttentionBackward<T>>().scratch_bytes(problem_.kernel, most_queries_);
    for (int64_t first = 0; first < problem_.sequences;) {
      const int64_t last = end_of_chunk(first);
      start_chunk(first, last);
      problem_.divide(threads, first, last, true);
      for_each_task(
          static_cast<int64_t>(problem_.tasks.size()) - 1, [&] { return Buffer<char>(bytes); },
          [&](int64_t task, const Buffer<char>& scratch) {
            const int64_t end = problem_.tasks[task + 1];
            for (int64_t u = problem_.tasks[task]; u < end; ++u) {
              const int64_t next = u + 1 < end ? problem_.units[u + 1].sequence : -1;
              kernels_here<AttentionBackward<T>>().differentiate(problem_.kernel, to_, problem_.units[u], next, most_queries_,
                                                                 scratch.get());
            }
          });
      if (latent()) add_latent(first, last);
      for (int64_t m = 0; m < problem_.kernel.segments; ++m) {
        if (problem_.kernel.segment[m].index == nullptr) continue;
        add_references(m, first, last, keys_);
        add_references(m, first, last, values_);
      }
      first = last;
    }
    if (latent()) finish_latent();
    return {query_,
            finished(keys_),
            finished(values_),
            per_segment(Need::kLogBias, arguments_.log_bias, log_bias_),
            per_segment(Need::kValueGate, arguments_.value_gate, value_gate_),
            summed(Need::kSink, arguments_.sink, sink_, heads()),
            summed(Need::kQueryNorm, arguments_.query_norm, query_norm_, problem_.kernel.width),
            summed(Need::kKeyNorm, arguments_.key_norm, key_norm_, problem_.kernel.width)};
  }

 private:
  int64_t heads() const { return problem_.heads(); }
  bool latent() const { return problem_.kernel.query_offsets == nullptr; }

  Tensor empty(int64_t count, ScalarType type) const { return torch::stable::new_empty(arguments_.query, {count}, type); }

  void make_results() {
    const Attention<T>& kernel = problem_.kernel;
    const auto per_sequence = [&](std::vector<double>& sums, bool needed, int64_t each) {
      sums.assign(static_cast<size_t>(needed ? problem_.sequences * each : 0), 0.0);
      return needed ? sums.data() : nullptr;
    };
    to_.log_bias = per_sequence(log_bias_, needs_[kLogBias] && arguments_.log_bias, heads() * kernel.segments);
    to_.value_gate = per_sequence(value_gate_, needs_[kValueGate] && arguments_.value_gate, heads() * kernel.segments);
    to_.sink = per_sequence(sink_, needs_[kSink] && arguments_.sink, heads());
    const bool query_norm = needs_[kQueryNorm] && arguments_.query_norm;
    to_.query_norm = per_sequence(query_norm_, query_norm && !latent(), kernel.kv_heads * kernel.width);
    to_.key_norm = per_sequence(key_norm_, needs_[kKeyNorm] && arguments_.key_norm, kernel.kv_heads * kernel.width);
    const int64_t query_rows = arguments_.query.size(0), row = heads() * kernel.width;
    query_ = needs_[kQuery] ? torch::stable::new_empty(arguments_.query, {query_rows, heads(), kernel.width})
                            : empty(0, arguments_.query.scalar_type());
    if (latent()) {
      if (needs_[kQuery] || query_norm) latent_.assign(static_cast<size_t>(query_rows * row), T(0));
    } else if (needs_[kQuery]) {
      char* const to = static_cast<char*>(query_.mutable_data_ptr());
      const int64_t bytes = row * arguments_.query.element_size();
      const int64_t begin = problem_.query_begin(), end = problem_.query_end();
      clear(to, begin * bytes);
      clear(to + end * bytes, (query_rows - end) * bytes);
      to_.query = to;
    }
    make_side(keys_, arguments_.keys, needs_.keys, kernel.width);
    make_side(values_, arguments_.values, needs_.values, kernel.value_width);
    to_.segment = segments_.data();
    for (size_t m = 0; m < segments_.size(); ++m) {
      segments_[m] = {keys_.begin[m], values_.begin[m], false, streamed(keys_) && streamed(values_), 0};
    }
  }

  void make_side(Side<T>& side, const std::vector<Tensor>& tensors, int64_t needs, int64_t width) {
    const int64_t kv_heads = problem_.kernel.kv_heads, element = arguments_.query.element_size(), row = kv_heads * width;
    int64_t rows = 0;
    for (size_t m = 0; m < tensors.size(); ++m) rows += (needs >> m & 1) != 0 ? tensors[m].size(0) : 0;
    side.width = width;
    side.rows = needs != 0 ? torch::stable::new_empty(arguments_.query, {rows, kv_heads, width})
                           : empty(0, arguments_.query.scalar_type());
    prefer_large_pages(side.rows.mutable_data_ptr(), side.rows.numel() * element);
    side.sums.resize(tensors.size());
    side.shares.resize(tensors.size());
    char* at = static_cast<char*>(side.rows.mutable_data_ptr());
    for (size_t m = 0; m < tensors.size(); ++m) {
      const bool needed = (needs >> m & 1) != 0;
      side.begin.push_back(needed ? at : nullptr);
      if (!needed) continue;
      const int64_t count = tensors[m].size(0), bytes = row * element;
      const AttentionSegment& segment = problem_.kernel.segment[m];
      if (segment.index != nullptr) {
        if (element == static_cast<int64_t>(sizeof(T))) {
          clear(at, count * bytes);
        } else {
          side.sums[m] = Buffer<T>(count * row);
          std::fill_n(side.sums[m].get(), count * row, T(0));
        }
      } else {
        const int64_t begin = segment.offsets[0], end = segment.offsets[problem_.sequences];
        clear(at, begin * bytes);
        clear(at + end * bytes, (count - end) * bytes);
      }
      at += count * bytes;
    }
  }

  // Whether rows go past the caches; also of a side that nobody needs.
  bool streamed(const Side<T>& side) const {
    const int64_t element = arguments_.query.element_size(), bytes = side.rows.numel() * element;
    return bytes == 0 || (bytes >= kStreamedBytes && is_whole_lines(side.rows.const_data_ptr(), side.width * element));
  }

  // The sequences from `first` on whose shares kChunkBytes hold, at least one.
  int64_t end_of_chunk(int64_t first) const {
    const Attention<T>& kernel = problem_.kernel;
    int64_t bytes = 0, last = first;
    for (; last < problem_.sequences && (bytes <= kChunkBytes || last == first); ++last) {
      if (!latent_.empty()) bytes += static_cast<int64_t>(latent_.size() * sizeof(T));
      for (size_t m = 0; m < segments_.size(); ++m) {
        if (kernel.segment[m].index == nullptr) continue;
        const int64_t entries = kernel.segment[m].offsets[last + 1] - kernel.segment[m].offsets[last];
        for (const Side<T>* side : {&keys_, &values_}) {
          if (side->begin[m] != nullptr) bytes += entries * kernel.kv_heads * side->width * static_cast<int64_t>(sizeof(T));
        }
      }
    }
    return last;
  }

  void start_chunk(int64_t first, int64_t last) {
    const Attention<T>& kernel = problem_.kernel;
    to_.first_sequence = first;
    if (!latent_.empty()) {
      latent_shares_ = Buffer<T>((last - first) * static_cast<int64_t>(latent_.size()));
      to_.latent = latent_shares_.get();
    }
    for (size_t m = 0; m < segments_.size(); ++m) {
      const AttentionSegment& segment = kernel.segment[m];
      if (segment.index == nullptr) continue;
      const auto shares = [&](Side<T>& side) -> void* {
        if (side.begin[m] == nullptr) return nullptr;
        side.shares[m] = Buffer<T>((segment.offsets[last] - segment.offsets[first]) * kernel.kv_heads * side.width);
        return side.shares[m].get();
      };
      segments_[m] = {shares(keys_), shares(values_), true, false, segment.offsets[first]};
    }
  }

  void add_latent(int64_t first, int64_t last) {
    const auto size = static_cast<int64_t>(latent_.size());
    if (size == 0) return;
    for_each_range(size, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < last - first; ++b) {
        const T* const share = latent_shares_.get() + b * size;
        for (int64_t i = begin; i < end; ++i) latent_[i] += share[i];
      }
    });
  }

  // The shares of a chunk's references to the sums of the rows that they name, in their order.
  void add_references(int64_t m, int64_t first, int64_t last, Side<T>& side) {
    if (side.begin[m] == nullptr) return;
    const AttentionSegment& segment = problem_.kernel.segment[m];
    std::vector<std::pair<int64_t, int64_t>> references;  // row, entry
    for (int64_t b = first; b < last; ++b) {
      if (problem_.queries_of(b) == 0) continue;
      for (int64_t entry = segment.offsets[b]; entry < segment.offsets[b + 1]; ++entry) {
        if (segment.index[entry] >= 0) references.emplace_back(segment.index[entry], entry);
      }
    }
    std::sort(references.begin(), references.end());
    std::vector<size_t> groups;
    for (size_t n = 0; n < references.size(); ++n) {
      if (n == 0 || references[n].first != references[n - 1].first) groups.push_back(n);
    }
    groups.push_back(references.size());
    T* const sums = side.sums[m].get() != nullptr ? side.sums[m].get() : reinterpret_cast<T*>(side.begin[m]);
    const int64_t row = problem_.kernel.kv_heads * side.width, begin = segment.offsets[first];
    for_each_range(static_cast<int64_t>(groups.size()) - 1, 16, [&](int64_t from, int64_t to) {
      for (size_t n = groups[from]; n < groups[to]; ++n) {
        T* const sum = sums + references[n].first * row;
        const T* const share = side.shares[m].get() + (references[n].second - begin) * row;
        for (int64_t d = 0; d < row; ++d) sum[d] += share[d];
      }
    });
  }

  // Sums that are not rows themselves yet.
  Tensor finished(Side<T>& side) {
    for (size_t m = 0; m < side.sums.size(); ++m) {
      if (side.sums[m].get() == nullptr) continue;
      auto* const to = reinterpret_cast<uint16_t*>(side.begin[m]);
      const std::vector<Tensor>& tensors = &side == &keys_ ? arguments_.keys : arguments_.values;
      for_each_range(tensors[m].size(0) * problem_.kernel.kv_heads * side.width, 1 << 14, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) to[i] = narrowed(static_cast<float>(side.sums[m][i]));
      });
    }
    return side.rows;
  }

  // To the nearest bfloat16, ties to even; NaN stays NaN.
  static uint16_t narrowed(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }

  // Through the norm of the latent queries, which are few.
  void finish_latent() {
    const Attention<T>& kernel = problem_.kernel;
    const int64_t width = kernel.width;
    if (latent_.empty()) return;
    const Tensor wide = torch::stable::contiguous(torch::stable::to(arguments_.query, ScalarType::Double));
    const auto* const rows = static_cast<const double*>(wide.const_data_ptr());
    query_norm_.assign(static_cast<size_t>(width), 0.0);
    std::vector<double> finished(latent_.begin(), latent_.end());
    for (size_t at = 0; kernel.query_norm != nullptr && at < finished.size(); at += static_cast<size_t>(width)) {
      const double* const x = rows + at;
      double* const grad = finished.data() + at;
      double square = 0, dot = 0;
      for (int64_t d = 0; d < width; ++d) square += x[d] * x[d];
      const double rstd = 1.0 / std::sqrt(square / static_cast<double>(width) + kernel.norm_eps);
      bool any = false;
      for (int64_t d = 0; d < width; ++d) any |= grad[d] != 0;
      if (!any) continue;  // such a query may hold NaN
      for (int64_t d = 0; d < width; ++d) {
        query_norm_[d] += grad[d] * x[d] * rstd;
        dot += grad[d] * static_cast<double>(kernel.query_norm[d]) * x[d] * rstd;
      }
      for (int64_t d = 0; d < width; ++d) {
        grad[d] = rstd * (grad[d] * static_cast<double>(kernel.query_norm[d]) - x[d] * rstd * dot / static_cast<double>(width));
      }
    }
    if (!needs_[kQuery]) return;
    Tensor made = torch::stable::new_empty(arguments_.query, {arguments_.query.size(0), heads(), width}, ScalarType::Double);
    std::copy(finished.begin(), finished.end(), static_cast<double*>(made.mutable_data_ptr()));
    query_ = torch::stable::to(made, arguments_.query.scalar_type());
  }

  // Σ over sequences (and KV heads) of `sums`, [… , count].
  Tensor summed(Need need, const std::optional<Tensor>& of, const std::vector<double>& sums, int64_t count) const {
    if (!needs_[need] || !of) return empty(0, arguments_.query.scalar_type());
    Tensor total = empty(count, ScalarType::Double);
    auto* const to = static_cast<double*>(total.mutable_data_ptr());
    std::fill_n(to, count, 0.0);
    for (size_t i = 0; i < sums.size(); ++i) to[i % static_cast<size_t>(count)] += sums[i];
    return torch::stable::to(total, of->scalar_type());
  }

  // [sequences, heads, segments] to the shape of `of`.
  Tensor per_segment(Need need, const std::optional<Tensor>& of, const std::vector<double>& sums) const {
    if (!needs_[need] || !of) return empty(0, arguments_.query.scalar_type());
    const int64_t b = of->size(0), h = of->size(1), m = of->size(2), segments = problem_.kernel.segments;
    Tensor total = torch::stable::new_empty(*of, {b, h, m}, ScalarType::Double);
    auto* const to = static_cast<double*>(total.mutable_data_ptr());
    std::fill_n(to, b * h * m, 0.0);
    for (size_t i = 0; i < sums.size(); ++i) {
      const auto at = static_cast<int64_t>(i);
      const int64_t segment = at % segments, head = at / segments % heads(), sequence = at / segments / heads();
      to[((b == 1 ? 0 : sequence) * h + (h == 1 ? 0 : head)) * m + (m == 1 ? 0 : segment)] += sums[i];
    }
    return torch::stable::to(total, of->scalar_type());
  }

  const AttentionArguments& arguments_;
  const Needs& needs_;
  AttentionProblem<T> problem_;
  AttentionGradients<T> to_{};
  std::vector<SegmentGradients> segments_;
  std::vector<Tensor> held_;
  Tensor query_;
  Side<T> keys_, values_;
  std::vector<T> latent_;
  Buffer<T> latent_shares_;
  std::vector<double> log_bias_, value_gate_, sink_, query_norm_, key_norm_;
  int64_t most_queries_ = 0;
};

Results backward(const std::optional<Tensor>& grad_out, const std::optional<Tensor>& grad_lse,
                 const std::optional<Tensor>& grad_mass, const Tensor& out, const Tensor& lse, const Tensor& mass,
                 const Tensor& query, const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                 const Tensor& offsets, const std::vector<Tensor>& index, const std::optional<Tensor>& query_offsets,
                 const std::optional<Tensor>& log_bias, const std::optional<Tensor>& value_gate,
                 const std::optional<Tensor>& sink, const std::optional<Tensor>& query_norm,
                 const std::optional<Tensor>& key_norm, double scale, double norm_eps, int64_t indexed, int64_t causal,
                 int64_t needs, int64_t key_needs, int64_t value_needs) {
  const AttentionArguments arguments{query,    keys, values,     offsets,  index, query_offsets, log_bias, value_gate,
                                     sink, query_norm, key_norm, scale, norm_eps,      indexed,  causal};
  const Upstream upstream{grad_out, grad_lse, grad_mass};
  const Left left{out, lse, mass};
  const Needs needed{needs, key_needs, value_needs};
  return query.scalar_type() == ScalarType::Double ? Pass<double>(arguments, upstream, left, needed).run()
                                                   : Pass<float>(arguments, upstream, left, needed).run();
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_attention_backward", TORCH_BOX(&mmrec::backward)); }
