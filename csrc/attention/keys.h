// Attention: the keys that rows meet at a time, where they lie or copied where they must be.
#pragma once

#include <type_traits>

#include "../common/arena.h"
#include "../common/exp2.h"
#include "../common/pack.h"
#include "../common/rows.h"
#include "../common/pairs.h"
#include "attention_kernel.h"

namespace mmrec {
namespace MMREC_ISA {
namespace {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;
// Rows of results are made in whole groups.
constexpr int64_t kMoreRows = kBlockRows + kGroup, kMoreKeys = kBlockKeys + kGroup;

// Widths as the products read them.
template <typename Kind>
struct Widths {
  using Raw = typename Kind::Raw;
  int64_t depth, value_depth;  // words of a key and of a value
  int64_t width, value_width;  // padded
  bool keys_in_place, few_keys_in_place, values_in_place, few_values_in_place;

  // `wide`: keys and values are both multiplied along their width and added up row by row, else keys and values in turn.
  template <typename T>
  Widths(const Attention<T>& a, bool wide) {
    constexpr int64_t kLanes = Vec<T>::kLanes, kColumns = Kind::Dot::kColumns;
    constexpr bool kSame = std::is_same_v<Raw, Staged<Kind>>;
    depth = words_of(a.width, kColumns);
    value_depth = words_of(a.value_width, kColumns);
    width = round_up(a.width, wide ? kLanes * kColumns : kLanes);
    value_width = round_up(a.value_width, kLanes * kColumns);
    keys_in_place = kSame && (wide ? width == a.width : a.width % kColumns == 0);
    values_in_place = kSame && value_width == a.value_width;
    few_keys_in_place = width == a.width;
    few_values_in_place = value_width == a.value_width;
  }
};

template <typename Raw>
double rstd_of(const Raw* row, int64_t width, double eps) {
  return 1.0 / __builtin_sqrt(dot_in_double(row, row, width) / static_cast<double>(width) + eps);
}

// The queries of a sequence, and where their results begin.
struct Queries {
  int64_t first, count, first_result;

  template <typename T>
  Queries(const Attention<T>& a, int64_t sequence)
      : first(a.query_offsets == nullptr ? 0 : a.query_offsets[sequence]),
        count(a.query_offsets == nullptr ? a.latent_rows : a.query_offsets[sequence + 1] - first),
        first_result(a.query_offsets == nullptr ? sequence * a.latent_rows : first) {}
};

// A bias of −inf removes a segment from a head of a sequence.
template <typename T>
bool is_removed(const Attention<T>& a, int64_t sequence, int64_t head, int64_t m) {
  return a.log_bias.values != nullptr && a.log_bias.at(sequence, head, m) == -static_cast<T>(__builtin_huge_val());
}

// How many query heads from `head` on share a block: those of a KV head, unless a bias removes a segment from some of them
// only, which then do not read it.
template <typename T>
int64_t heads_of_block(const Attention<T>& a, int64_t sequence, int64_t head) {
  const int64_t first = head / a.group * a.group;
  if (a.group > kBlockRows) return 1;
  for (int64_t m = 0; a.log_bias.values != nullptr && m < a.segments; ++m) {
    for (int64_t h = first + 1; h < first + a.group; ++h) {
      if (is_removed(a, sequence, first, m) != is_removed(a, sequence, h, m)) return 1;
    }
  }
  return a.group;
}

// Rows that are multiplied together: per part the queries of a sequence from `first` on and of `heads` query heads that share a KV
// head, row = query · heads + head; part p begins at head first_head + p · heads. Several parts where a KV head has few rows.
struct Rows {
  int64_t first, first_head, heads, parts, part_rows, rows, lanes;
  uint32_t read;  // of the segment at hand: bit p is set where no bias removes it from part p

  bool few() const { return part_rows <= kFewRows; }
  bool reads(int64_t part) const { return (read >> part & 1) != 0; }
  bool reads_all() const { return read == all_parts(); }
  uint32_t all_parts() const { return static_cast<uint32_t>((uint64_t{1} << parts) - 1); }

  template <typename T>
  void find_read(const Attention<T>& a, int64_t sequence, int64_t m) {
    read = all_parts();
    for (int64_t part = 0; part < parts; ++part) {
      if (is_removed(a, sequence, first_head + part * heads, m)) read &= ~(uint32_t{1} << part);
    }
  }

  // Calls run(row, query, head) for all of them.
  template <typename Run>
  MMREC_INLINE void for_each(const Run& run) const {
    int64_t r = 0;
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t query = 0; query * heads < part_rows; ++query) {
        for (int64_t h = 0; h < heads; ++h) run(r++, first + query, first_head + part * heads + h);
      }
    }
  }
};

// Keys that are met some time after those at hand, in the same sequence or in the next one. While a head meets the keys at
// hand, that head's part of these rows is asked for: a core alone does not see how rows of one head follow each other.
template <typename Kind, typename T>
class Ahead {
  using Raw = typename Kind::Raw;

 public:
  Ahead(const Attention<T>& a, Arena& arena)
      : a_(a), key_(arena.take<const char*>(kBlockKeys)), value_(arena.take<const char*>(kBlockKeys)) {}

  // The keys from place `place` of segment m of a sequence on; false if there are none.
  bool look(int64_t sequence, int64_t m, int64_t place) {
    for (count_ = 0; m < a_.segments; ++m, place = 0) {
      const AttentionSegment& segment = a_.segment[m];
      const int64_t end = segment.offsets[sequence + 1];
      for (int64_t e = segment.offsets[sequence] + place; e < end && count_ < kBlockKeys; ++e) {
        const int64_t row = segment.index != nullptr ? segment.index[e] : e;
        if (row < 0) continue;
        key_[count_] = at(segment.key, row);
        value_[count_++] = at(segment.value, row);
      }
      if (count_ == 0) continue;
      key_step_ = segment.key.head_stride * kBytes;
      value_step_ = segment.value.head_stride * kBytes;
      return true;
    }
    return false;
  }

  Fetch keys(int64_t kv_head) const { return {key_, count_, a_.width * kBytes, kv_head * key_step_}; }
  Fetch values(int64_t kv_head) const { return {value_, count_, a_.value_width * kBytes, kv_head * value_step_}; }

 private:
  static constexpr int64_t kBytes = static_cast<int64_t>(sizeof(Raw));

  static const char* at(const HeadRows& rows, int64_t row) {
    return static_cast<const char*>(rows.values) + row * rows.row_stride * kBytes;
  }

  const Attention<T>& a_;
  const char **key_, **value_;
  int64_t count_ = 0, key_step_ = 0, value_step_ = 0;
};

// What is read of rows when they are started: asked for, a few lines at a time, while those before them meet their keys.
class RowsAhead {
 public:
  // `bytes` of each of `rows` rows that are `stride` bytes apart, beside what was added before.
  void add(const void* begin, int64_t rows, int64_t stride, int64_t bytes) {
    if (rows <= 0 || bytes <= 0) return;
    lines_ += rows * ((bytes + 63) / 64);
    spans_[count_++] = {static_cast<const char*>(begin), rows, stride, bytes};
  }

  // All of it in `steps` calls of some().
  void start(int64_t steps) { each_ = (lines_ + steps - 1) / (steps < 1 ? 1 : steps); }

  void some() {
    for (int64_t n = each_; n > 0 && at_ < count_; --n) {
      Span& span = spans_[at_];
      __builtin_prefetch(span.begin + offset_, 0, 2);
      if ((offset_ += 64) < span.bytes) continue;
      offset_ = 0;
      span.begin += span.stride;
      if (--span.rows == 0) ++at_;
    }
  }

 private:
  struct Span {
    const char* begin;
    int64_t rows, stride, bytes;
  };
  Span spans_[4];
  int64_t count_ = 0, lines_ = 0, each_ = 0, at_ = 0, offset_ = 0;
};

// Up to kBlockKeys keys of a segment.
template <typename Kind, typename T>
struct Keys {
  using Raw = typename Kind::Raw;
  int64_t count;
  int64_t* row;                    // [kMoreKeys]: where they lie
  int64_t* position;               // and their places in the segment
  T* rstd;                         // [kMoreKeys]
  T* limit;                        // [kBlockRows]: how many of them a row sees
  const Staged<Kind>** key_rows;   // [kMoreKeys]
  const Staged<Kind>** value_rows;
  const Raw** few_key_rows;
  const Raw** few_value_rows;

  Keys(const Widths<Kind>& widths, Arena& arena) {
    row = arena.take<int64_t>(kMoreKeys);
    position = arena.take<int64_t>(kMoreKeys);
    rstd = arena.take<T>(kMoreKeys);
    limit = arena.take<T>(kBlockRows);
    key_rows = arena.take<const Staged<Kind>*>(kMoreKeys);
    value_rows = arena.take<const Staged<Kind>*>(kMoreKeys);
    few_key_rows = arena.take<const Raw*>(kMoreKeys);
    few_value_rows = arena.take<const Raw*>(kMoreKeys);
    keys_ = arena.take<Staged<Kind>>(kMoreKeys * (widths.width + 2));
    values_ = arena.take<Staged<Kind>>(kMoreKeys * widths.value_width);
    few_keys_ = arena.take<Raw>(kMoreKeys * widths.width);
    few_values_ = arena.take<Raw>(kMoreKeys * widths.value_width);
  }

  // Those from place `next` on and before `end`, of a sequence whose entries begin at `begin`; false if there are none.
  bool gather(const AttentionSegment& segment, int64_t begin, int64_t end, int64_t& next) {
    for (count = 0; next < end && count < kBlockKeys; ++next) {
      const int64_t found = segment.index != nullptr ? segment.index[begin + next] : begin + next;
      if (found < 0) continue;
      row[count] = found;
      position[count++] = next;
    }
    return count > 0;
  }

  void find_rstd(const Raw* key, int64_t stride, int64_t width, double eps) {
    for (int64_t j = 0; j < count; ++j) {
      rstd[j] = static_cast<T>(rstd_of(key + row[j] * stride, width, eps));
    }
    for (int64_t j = count; j < kMoreKeys; ++j) rstd[j] = T(1);
  }

  // How many of them are at or before place `last`.
  int64_t seen_up_to(int64_t last, int64_t from = 0) const {
    while (from < count && position[from] <= last) ++from;
    return from;
  }

  // Query i sees the places up to i + ahead; a part that does not read the segment sees none, and `everyone` else sees all.
  void find_limits(const Rows& rows, bool everyone, int64_t ahead) {
    int64_t part = 0, left = rows.part_rows, seen = everyone ? count : 0;
    rows.for_each([&](int64_t r, int64_t query, int64_t) {
      if (left-- == 0) {
        ++part;
        left = rows.part_rows - 1;
        seen = everyone ? count : 0;
      }
      if (!everyone) seen = seen_up_to(query + ahead, seen);
      limit[r] = rows.reads(part) ? static_cast<T>(seen) : T(0);
    });
  }

  void point_at_keys(const Raw* key, int64_t stride, const Attention<T>& a, const Widths<Kind>& w) {
    point(key, stride, a.width, w.width, w.keys_in_place, keys_, key_rows);
  }
  // `copied`: not where they lie.
  Staged<Kind>* point_at_values(const Raw* value, int64_t stride, const Attention<T>& a, const Widths<Kind>& w, bool copied) {
    point(value, stride, a.value_width, w.value_width, w.values_in_place && !copied, values_, value_rows);
    return values_;
  }
  void point_at_few(const Raw* key, int64_t key_stride, const Raw* value, int64_t value_stride, const Attention<T>& a,
                    const Widths<Kind>& w) {
    point(key, key_stride, a.width, w.width, w.few_keys_in_place, few_keys_, few_key_rows);
    point(value, value_stride, a.value_width, w.value_width, w.few_values_in_place, few_values_, few_value_rows);
  }

  bool is_finite(const Raw* rows, int64_t stride, int64_t width) const {
    bool finite = true;
    for (int64_t j = 0; j < count; ++j) {
      const Raw* const x = rows + row[j] * stride;
      for (int64_t d = 0; d < width; ++d) finite &= widen(x[d]) - widen(x[d]) == 0;
    }
    return finite;
  }

 private:
  // Pointers to the rows at hand, or to copies that are padded and of the right type.
  template <typename To>
  void point(const Raw* rows, int64_t stride, int64_t width, int64_t padded, bool in_place, To* copies,
             const To** pointers) const {
    if constexpr (std::is_same_v<To, Raw>) {
      if (in_place) {
        for (int64_t j = 0; j < count; ++j) pointers[j] = rows + row[j] * stride;
        pointers[count] = pointers[count - 1];
        return;
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      pointers[j] = copies + j * padded;
      stage(rows + row[j] * stride, width, padded, copies + j * padded);
    }
    pointers[count] = pointers[count - 1];
  }

  Staged<Kind>*keys_, *values_;
  Raw *few_keys_, *few_values_;
};

}  // namespace
}  // namespace MMREC_ISA
}  // namespace mmrec
