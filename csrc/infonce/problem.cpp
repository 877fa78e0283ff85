#include "problem.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "../common/check.h"
#include "../common/tensors.h"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;

int64_t element_bytes(Element element) {
  return element == Element::kFloat64 ? 8 : element == Element::kFloat32 ? 4 : 2;
}

// A matrix whose rows lie in one piece each.
Matrix matrix_of(const Tensor& tensor, std::vector<Tensor>& held) {
  held.push_back(tensor.size(1) <= 1 || tensor.stride(1) == 1 ? tensor : torch::stable::contiguous(tensor));
  const Tensor& rows = held.back();
  return {rows.const_data_ptr(), rows.size(0), rows.size(1), rows.stride(0)};
}

template <typename V>
const V* values_of(const std::optional<Tensor>& tensor, std::vector<Tensor>& held) {
  if (!tensor) return nullptr;
  held.push_back(torch::stable::contiguous(*tensor));
  return static_cast<const V*>(held.back().const_data_ptr());
}

double clamped(double norm) { return norm > kNormEps ? norm : kNormEps; }

// Factors of what nobody keeps meet weights of zero. Where NaN or infinity is kept, the dot products have it as well.
double finite_or_one(double factor) { return std::isfinite(factor) ? factor : 1.0; }

}  // namespace

template <typename T>
Problem<T>::Problem(const Arguments& arguments) : positives_elsewhere_(arguments.positives_elsewhere) {
  query = matrix_of(arguments.query, held_);
  key = matrix_of(arguments.key, held_);
  logits.element = element_of(arguments.query);
  logits.rows = query.rows;
  logits.columns = key.rows;
  logits.depth = divide_up(query.width, logits.element == Element::kBFloat16Pairs ? 2 : 1);
  find_terms(arguments);
  if (arguments.key_ids) find_ids(arguments);
  if (arguments.exclude_offsets && arguments.exclude_positions) find_excluded(arguments);
  find_factors(arguments);
}

template <typename T>
void Problem<T>::find_terms(const Arguments& arguments) {
  const int64_t* const wanted = values_of<int64_t>(arguments.target, held_);
  const bool* const query_mask = values_of<bool>(arguments.query_mask, held_);
  const bool* const key_mask = values_of<bool>(arguments.key_mask, held_);
  target.resize(static_cast<size_t>(query.rows));
  bool any_read = false, all_read = true;
  row_read_.resize(static_cast<size_t>(query.rows));
  for (int64_t i = 0; i < query.rows; ++i) {
    int64_t t = wanted != nullptr ? wanted[i] : i;
    if (wanted != nullptr) {
      MMREC_CHECK(t < key.rows, "target must be below the number of keys, ", key.rows, ", got ",
                  *std::max_element(wanted, wanted + query.rows));
    }
    const bool present = query_mask == nullptr || query_mask[i];
    if (positives_elsewhere_ || t < 0 || t >= key.rows || !present || (key_mask != nullptr && !key_mask[t])) t = -1;
    target[i] = t;
    row_read_[i] = present && (arguments.symmetric || positives_elsewhere_ || t >= 0);
    any_read |= row_read_[i] != 0;
    all_read &= row_read_[i] != 0;
  }
  if (all_read) row_read_.clear();
  key_bits_.assign(static_cast<size_t>(column_tiles() * kBitWords), 0);
  for (int64_t j = 0; any_read && j < key.rows; ++j) {
    if (key_mask == nullptr || key_mask[j]) key_bits_[j / 64] |= uint64_t{1} << (j % 64);
  }
  logits.target = target.data();
  logits.row_read = row_read_.empty() ? nullptr : row_read_.data();
  logits.key_bits = key_bits_.data();
}

// Ids as 32 bits: as they are where they fit, else their ranks among the keys' ids.
template <typename T>
void Problem<T>::find_ids(const Arguments& arguments) {
  const int64_t* const ids = values_of<int64_t>(arguments.key_ids, held_);
  const int64_t* const wanted = values_of<int64_t>(arguments.query_ids, held_);
  std::vector<int64_t> ranks;
  if (std::any_of(ids, ids + key.rows, [](int64_t id) { return id > std::numeric_limits<int32_t>::max(); })) {
    ranks.assign(ids, ids + key.rows);
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
  }
  const auto narrowed = [&](int64_t id, int32_t none) {
    if (id < 0) return none;
    if (ranks.empty()) return id > std::numeric_limits<int32_t>::max() ? none : static_cast<int32_t>(id);
    const auto found = std::lower_bound(ranks.begin(), ranks.end(), id);
    return found != ranks.end() && *found == id ? static_cast<int32_t>(found - ranks.begin()) : none;
  };
  key_ids_.assign(static_cast<size_t>(column_tiles() * kTileColumns), -2);
  for (int64_t j = 0; j < key.rows; ++j) key_ids_[j] = narrowed(ids[j], -2);
  query_ids_.resize(static_cast<size_t>(query.rows));
  for (int64_t i = 0; i < query.rows; ++i) {
    query_ids_[i] = wanted != nullptr ? narrowed(wanted[i], -1) : target[i] >= 0 ? std::max(key_ids_[target[i]], -1) : -1;
  }
  logits.query_ids = query_ids_.data();
  logits.key_ids = key_ids_.data();
}

template <typename T>
void Problem<T>::find_excluded(const Arguments& arguments) {
  const int64_t* const offsets = values_of<int64_t>(arguments.exclude_offsets, held_);
  const int64_t* const positions = values_of<int64_t>(arguments.exclude_positions, held_);
  const int64_t length = arguments.exclude_positions->size(0);
  MMREC_CHECK(offsets[0] >= 0 && offsets[query.rows] <= length, "exclude[0] must be non-decreasing and inside [0, ", length,
              "], got ", offsets[0], " … ", offsets[query.rows]);
  for (int64_t i = 0; i < query.rows; ++i) {
    MMREC_CHECK(offsets[i] <= offsets[i + 1], "exclude[0] must be non-decreasing and inside [0, ", length, "], got ",
                offsets[i], " before ", offsets[i + 1], " at ", i);
  }
  excluded_offsets_.assign(1, 0);
  for (int64_t i = 0; i < query.rows; ++i) {
    const auto start = static_cast<std::ptrdiff_t>(excluded_.size());
    for (int64_t n = offsets[i]; n < offsets[i + 1]; ++n) {
      MMREC_CHECK(positions[n] < key.rows, "exclude[1] must be below the number of keys, ", key.rows, ", got ",
                  *std::max_element(positions + offsets[0], positions + offsets[query.rows]));
      if (positions[n] >= 0) excluded_.push_back(positions[n]);
    }
    std::sort(excluded_.begin() + start, excluded_.end());
    excluded_.erase(std::unique(excluded_.begin() + start, excluded_.end()), excluded_.end());
    excluded_offsets_.push_back(static_cast<int64_t>(excluded_.size()));
  }
  logits.excluded_offsets = excluded_offsets_.data();
  logits.excluded = excluded_.data();
}

template <typename T>
void Problem<T>::find_factors(const Arguments& arguments) {
  if (arguments.normalize) {
    query_norm.resize(static_cast<size_t>(query.rows));
    key_norm.resize(static_cast<size_t>(key.rows));
    for_each_range(query.rows, 256, [&](int64_t begin, int64_t end) {
      kernels.forward.norms(logits.element, query, begin, end, query_norm.data());
    });
    for_each_range(key.rows, 256, [&](int64_t begin, int64_t end) {
      kernels.forward.norms(logits.element, key, begin, end, key_norm.data());
    });
  }
  held_.push_back(torch::stable::contiguous(arguments.scale));
  const T* const scales = static_cast<const T*>(held_.back().const_data_ptr());
  const bool one = held_.back().size(0) == 1;
  for (auto* vector : {&scale, &row_factor, &sigma_, &sigma_rest_}) vector->resize(static_cast<size_t>(query.rows));
  for (int64_t i = 0; i < query.rows; ++i) {
    scale[i] = scales[one ? 0 : i];
    const double factor = static_cast<double>(scale[i]) / (query_norm.empty() ? 1.0 : clamped(query_norm[i]));
    row_factor[i] = static_cast<T>(finite_or_one(factor));
    sigma_[i] = static_cast<T>(factor * kLog2E);
    sigma_rest_[i] = static_cast<T>(factor * kLog2E - static_cast<double>(sigma_[i]));
  }
  logits.sigma = sigma_.data();
  logits.sigma_rest = sigma_rest_.data();
  log_q = values_of<T>(arguments.log_q, held_);
  if (log_q == nullptr && key_norm.empty()) return;
  bias_.assign(static_cast<size_t>(column_tiles() * kTileColumns), T(0));
  if (!key_norm.empty()) kappa_.assign(bias_.size(), T(1));
  for (int64_t j = 0; j < key.rows; ++j) {
    if (!key_norm.empty()) kappa_[j] = static_cast<T>(finite_or_one(1.0 / clamped(key_norm[j])));
    if (log_q != nullptr) bias_[j] = static_cast<T>(static_cast<double>(log_q[j]) * kLog2E);
  }
  if (!key_norm.empty()) logits.kappa = kappa_.data();
  logits.bias = bias_.data();
}

template <typename T>
void Problem<T>::pack_logits() {
  query_groups_ = Buffer<T>(row_tiles() * kTileRows * logits.depth);
  key_panels_ = Buffer<T>(column_tiles() * kTileColumns * logits.depth);
  const int64_t rows = row_tiles();
  for_each_task(rows + column_tiles(), [&](int64_t task) {
    if (task < rows) {
      kernels.forward.pack_queries(logits.element, query, task, query_groups_.get());
    } else {
      kernels.forward.pack_keys(logits.element, key, task - rows, key_panels_.get());
    }
  });
  logits.query_groups = query_groups_.get();
  logits.key_panels = key_panels_.get();
}

template <typename T>
bool Problem<T>::keeps(int64_t row, int64_t column) const {
  if (!is_read(row) || !key_is_read(column) || target[row] == column) return false;
  if (!query_ids_.empty() && query_ids_[row] >= 0 && query_ids_[row] == key_ids_[column]) return false;
  if (excluded_offsets_.empty()) return true;
  const auto begin = excluded_.begin() + excluded_offsets_[row], end = excluded_.begin() + excluded_offsets_[row + 1];
  return !std::binary_search(begin, end, column);
}

template <typename T>
bool Problem<T>::is_finite(const Matrix& matrix, int64_t row) const {
  const auto finite = [&](auto* values, auto exponent) {
    for (int64_t d = 0; d < matrix.width; ++d) {
      if ((values[d] & exponent) == exponent) return false;
    }
    return true;
  };
  const char* const bytes = static_cast<const char*>(matrix.values) + row * matrix.stride * element_bytes(logits.element);
  switch (element_bytes(logits.element)) {
    case 8:
      return finite(reinterpret_cast<const uint64_t*>(bytes), uint64_t{0x7ff} << 52);
    case 4:
      return finite(reinterpret_cast<const uint32_t*>(bytes), uint32_t{0x7f800000});
    default:
      return finite(reinterpret_cast<const uint16_t*>(bytes), uint16_t{0x7f80});
  }
}

template <typename T>
template <typename IsRead, typename Keeps>
std::vector<uint8_t> Problem<T>::alive(const Matrix& side, int64_t others, const IsRead& read, const Keeps& keeps) const {
  std::vector<uint8_t> found(static_cast<size_t>(side.rows));
  for_each_range(side.rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      found[i] = read(i);
      if (!found[i] || !sparse() || is_finite(side, i)) continue;
      found[i] = 0;
      for (int64_t j = 0; j < others && found[i] == 0; ++j) found[i] = keeps(i, j);
    }
  });
  return found;
}

template <typename T>
std::vector<uint8_t> Problem<T>::alive_rows() const {
  return alive(query, key.rows, [&](int64_t i) { return is_read(i); }, [&](int64_t i, int64_t j) { return keeps(i, j); });
}

template <typename T>
std::vector<uint8_t> Problem<T>::alive_keys() const {
  return alive(key, query.rows, [&](int64_t j) { return key_is_read(j); }, [&](int64_t j, int64_t i) { return keeps(i, j); });
}

template <typename T>
std::vector<double> Problem<T>::positives() const {
  std::vector<double> found(static_cast<size_t>(query.rows));
  for_each_range(query.rows, 256, [&](int64_t begin, int64_t end) {
    kernels.forward.dots(logits.element, query, key, target.data(), begin, end, found.data());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = target[i];
      if (t < 0) continue;
      if (!key_norm.empty()) found[i] /= clamped(query_norm[i]) * clamped(key_norm[t]);
      found[i] = static_cast<double>(scale[i]) * found[i] - (log_q != nullptr ? static_cast<double>(log_q[t]) : 0.0);
    }
  });
  return found;
}

template <typename T>
Exponentials<T> exponentials_in(void* memory, const Problem<T>& problem, int64_t first_row, int64_t rows) {
  Exponentials<T> made{first_row, rows, problem.padded_columns(), memory, nullptr, nullptr};
  char* const values = static_cast<char*>(memory);
  made.refs = reinterpret_cast<T*>(values + rows * made.padded_columns * element_bytes(problem.logits.element));
  made.exact = made.refs + problem.column_tiles() * rows;
  return made;
}

template <typename T>
int64_t exponential_bytes(const Problem<T>& problem, int64_t rows) {
  return rows * problem.padded_columns() * element_bytes(problem.logits.element) +
         (rows + divide_up(rows, kTileRows)) * problem.column_tiles() * static_cast<int64_t>(sizeof(T));
}

#define MMREC_INSTANTIATE(T)                                                                         \
  template class Problem<T>;                                                                         \
  template Exponentials<T> exponentials_in<T>(void*, const Problem<T>&, int64_t, int64_t);           \
  template int64_t exponential_bytes<T>(const Problem<T>&, int64_t);
MMREC_INSTANTIATE(float)
MMREC_INSTANTIATE(double)
#undef MMREC_INSTANTIATE

}  // namespace mmrec
