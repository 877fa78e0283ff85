// Streaming top-k on NVIDIA GPUs, for few queries.    score[b, n] = (q_b · x_n) · scale_n + bias_n
//
// Grid (split, query): a block reads its part of the items once, a warp per row; a score above the running threshold is
// appended to a key buffer in shared memory, which is sorted and cut back to k when it fills. A second kernel merges the
// parts. A key is (ordered score, ~id) in 64 bits: the order is total, so the result depends neither on the order in
// which warps append nor on the split; the only atomics count slots in shared memory.
//
// Reads N·D elements per query (use the Triton kernel for many); writes splits·k keys per query. Flops 2·B·N·D.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

#include "../common/check.h"
#include "../common/cuda.cuh"

namespace mmrec {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsPerWarp = 8;                     // scored between two block-wide barriers
constexpr int kTile = kWarps * kRowsPerWarp;        // rows a block scores between two barriers
constexpr int64_t kMaxK = 2048;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Params {
  const void* query;    // [B, D]
  const void* items;    // [N, D], rows item_stride elements apart
  const float* scales;  // [N] or null
  const float* bias;    // [N] or null
  const int64_t* exclude_offsets;    // [B + 1] or null
  const int64_t* exclude_ids;
  const int64_t* candidate_offsets;  // [B + 1] or null
  const int64_t* candidate_ids;
  int64_t exclude_length, candidate_length;
  int64_t num_items, width, query_stride, item_stride;
  int k, capacity, splits;
  uint64_t* partial;  // [B, splits, k]
  float* scores;      // [B, k]
  int64_t* ids;       // [B, k]
};

__device__ uint64_t make_key(float score, int64_t id) {
  // -0 + 0 is +0: the two zeros are one score.
  const uint32_t bits = __float_as_uint(score + 0.0f);
  const uint32_t ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | static_cast<uint32_t>(~static_cast<uint32_t>(id));
}
__device__ float key_score(uint64_t key) {
  const uint32_t ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ int64_t key_id(uint64_t key) { return static_cast<int64_t>(~static_cast<uint32_t>(key)); }

// Descending; capacity is a power of two.
__device__ void sort_keys(uint64_t* keys, int capacity) {
  for (int size = 2; size <= capacity; size <<= 1) {
    for (int stride = size >> 1; stride > 0; stride >>= 1) {
      __syncthreads();
      for (int i = threadIdx.x; i < capacity; i += kThreads) {
        const int j = i ^ stride;
        if (j > i) {
          const uint64_t a = keys[i], b = keys[j];
          const bool descending = (i & size) == 0;
          if ((a < b) == descending) {
            keys[i] = b;
            keys[j] = a;
          }
        }
      }
    }
  }
  __syncthreads();
}

// The key buffer of one block. 0 is below every key: "empty".
struct Buffer {
  uint64_t* keys;
  int* count;
  uint64_t* threshold;
  int capacity, k;
  bool repeats;  // equal keys may come in: a candidate list names an id twice

  __device__ void reset() {
    for (int i = threadIdx.x; i < capacity; i += kThreads) keys[i] = 0;
    if (threadIdx.x == 0) {
      *count = 0;
      *threshold = 0;
    }
    __syncthreads();
  }
  // Room for a tile more is kept by cut().
  __device__ void append(uint64_t key) { keys[atomicAdd(count, 1)] = key; }

  __device__ void cut() {
    sort_keys(keys, capacity);
    if (repeats) {
      // Every thread reads its neighbours before any writes.
      constexpr int kPer = 4096 / kThreads;
      bool again[kPer];
      for (int j = 0, i = threadIdx.x; i < capacity; ++j, i += kThreads) again[j] = i > 0 && keys[i] == keys[i - 1];
      __syncthreads();
      for (int j = 0, i = threadIdx.x; i < capacity; ++j, i += kThreads) {
        if (again[j]) keys[i] = 0;
      }
      sort_keys(keys, capacity);
    }
    for (int i = k + threadIdx.x; i < capacity; i += kThreads) keys[i] = 0;
    if (threadIdx.x == 0) {
      *count = k;
      *threshold = keys[k - 1];
    }
    __syncthreads();
  }
  __device__ void cut_if_full() {
    __syncthreads();
    if (*count > capacity - kTile) cut();
    __syncthreads();
  }
};

__device__ Buffer make_buffer(const Params& p) {
  extern __shared__ uint64_t shared[];
  __shared__ int count;
  __shared__ uint64_t threshold;
  Buffer buffer{shared, &count, &threshold, p.capacity, p.k, p.candidate_offsets != nullptr};
  buffer.reset();
  return buffer;
}

template <typename Item>
__device__ float widen(Item a) { return static_cast<float>(a); }
template <>
__device__ float widen<__nv_bfloat16>(__nv_bfloat16 a) { return __bfloat162float(a); }
template <>
__device__ float widen<__half>(__half a) { return __half2float(a); }

// kVector elements of a row are one load of a lane.
template <typename Item, int kVector>
__device__ float dot(const float* query, const Item* row, int64_t width, int lane) {
  struct alignas(sizeof(Item) * kVector) Pack {
    Item value[kVector];
  };
  float sum = 0.0f;
  for (int64_t d = lane * kVector; d < width; d += 32 * kVector) {
    const Pack pack = *reinterpret_cast<const Pack*>(row + d);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum = fmaf(query[d + i], widen(pack.value[i]), sum);
  }
#pragma unroll
  for (int stride = 16; stride > 0; stride >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, stride);
  return sum;
}

__device__ int64_t clamp_offset(int64_t offset, int64_t length) {
  return offset < 0 ? 0 : offset > length ? length : offset;
}

// The warp looks for id in a list in any order.
__device__ bool listed(const int64_t* list, int64_t begin, int64_t end, int64_t id, int lane) {
  for (int64_t j = begin; j < end; j += 32) {
    if (__any_sync(0xffffffffu, j + lane < end && list[j + lane] == id)) return true;
  }
  return false;
}

template <typename Query, typename Item, int kVector>
__global__ void __launch_bounds__(kThreads) scan_kernel(Params p) {
  const int64_t b = blockIdx.y;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Buffer buffer = make_buffer(p);
  float* query = reinterpret_cast<float*>(buffer.keys + p.capacity);
  for (int64_t d = threadIdx.x; d < p.width; d += kThreads) {
    query[d] = widen(static_cast<const Query*>(p.query)[b * p.query_stride + d]);
  }
  __syncthreads();

  int64_t first = 0, last = p.num_items;
  if (p.candidate_offsets != nullptr) {
    first = clamp_offset(p.candidate_offsets[b], p.candidate_length);
    last = clamp_offset(p.candidate_offsets[b + 1], p.candidate_length);
  }
  int64_t exclude_begin = 0, exclude_end = 0;
  if (p.exclude_offsets != nullptr) {
    exclude_begin = clamp_offset(p.exclude_offsets[b], p.exclude_length);
    exclude_end = clamp_offset(p.exclude_offsets[b + 1], p.exclude_length);
  }
  const int64_t part = ((last - first + p.splits - 1) / p.splits + kTile - 1) / kTile * kTile;
  const int64_t begin = first + blockIdx.x * part;
  const int64_t end = begin + part < last ? begin + part : last;
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const uint64_t threshold = *buffer.threshold;
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int64_t position = tile + i * kWarps + warp;
      if (position >= end) break;
      const int64_t id = p.candidate_offsets != nullptr ? p.candidate_ids[position] : position;
      if (id < 0 || id >= p.num_items) continue;
      float score = dot<Item, kVector>(query, static_cast<const Item*>(p.items) + id * p.item_stride, p.width, lane);
      if (p.scales != nullptr) score = __fmul_rn(score, p.scales[id]);
      if (p.bias != nullptr) score = __fadd_rn(score, p.bias[id]);
      // Written so that NaN and -inf fail.
      if (!(score > -kInfinity)) continue;
      const uint64_t key = make_key(score, id);
      if (key <= threshold || listed(p.exclude_ids, exclude_begin, exclude_end, id, lane)) continue;
      if (lane == 0) buffer.append(key);
    }
    buffer.cut_if_full();
  }
  buffer.cut();
  uint64_t* out = p.partial + (b * p.splits + blockIdx.x) * p.k;
  for (int i = threadIdx.x; i < p.k; i += kThreads) out[i] = buffer.keys[i];
}

__global__ void __launch_bounds__(kThreads) merge_kernel(Params p) {
  const int64_t b = blockIdx.x;
  Buffer buffer = make_buffer(p);
  const int64_t length = static_cast<int64_t>(p.splits) * p.k;
  const uint64_t* partial = p.partial + b * length;
  for (int64_t tile = 0; tile < length; tile += kTile) {
    const int64_t i = tile + threadIdx.x;
    if (threadIdx.x < kTile && i < length && partial[i] > *buffer.threshold) buffer.append(partial[i]);
    buffer.cut_if_full();
  }
  buffer.cut();
  for (int i = threadIdx.x; i < p.k; i += kThreads) {
    const uint64_t key = buffer.keys[i];
    p.scores[b * p.k + i] = key == 0 ? -kInfinity : key_score(key);
    p.ids[b * p.k + i] = key == 0 ? -1 : key_id(key);
  }
}

template <typename Query, typename Item>
void launch(const Params& p, int64_t num_queries, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(Item);
  const bool aligned = p.width % kVector == 0 && p.item_stride % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(p.items) % 16 == 0;
  const auto scan = aligned ? scan_kernel<Query, Item, kVector> : scan_kernel<Query, Item, 1>;
  const size_t keys = static_cast<size_t>(p.capacity) * sizeof(uint64_t);
  const dim3 grid(static_cast<unsigned>(p.splits), static_cast<unsigned>(num_queries));
  scan<<<grid, kThreads, keys + static_cast<size_t>(p.width) * sizeof(float), stream>>>(p);
  merge_kernel<<<static_cast<unsigned>(num_queries), kThreads, keys, stream>>>(p);
  MMREC_CUDA_CHECK(cudaGetLastError());
}

template <typename Query>
void launch_for(ScalarType items, const Params& p, int64_t num_queries, cudaStream_t stream) {
  if (items == ScalarType::Char) return launch<Query, int8_t>(p, num_queries, stream);
  return launch<Query, Query>(p, num_queries, stream);
}

Tensor rows_contiguous(const Tensor& matrix) {
  const bool rows_lie = matrix.size(1) <= 1 || matrix.stride(1) == 1;
  return rows_lie ? matrix : torch::stable::contiguous(matrix);
}

std::tuple<Tensor, Tensor> topk_stream(const Tensor& query_any, const Tensor& items_any, int64_t k,
                                       const std::optional<Tensor>& item_scales, const std::optional<Tensor>& bias_any,
                                       const std::optional<Tensor>& exclude_offsets,
                                       const std::optional<Tensor>& exclude_ids,
                                       const std::optional<Tensor>& candidate_offsets,
                                       const std::optional<Tensor>& candidate_ids, bool) {
  const Tensor query = rows_contiguous(query_any);
  const Tensor items = rows_contiguous(items_any);
  const int64_t num_queries = query.size(0), num_items = items.size(0), width = query.size(1);
  MMREC_CHECK(k <= kMaxK, "k must be at most ", kMaxK, " for the CUDA C++ kernel, got ", k);
  MMREC_CHECK(num_items < (int64_t{1} << 32), "items must have fewer than 2**32 rows, got ", num_items);
  MMREC_CHECK(num_queries <= 65535, "query must have at most 65535 rows for the CUDA C++ kernel, got ", num_queries);
  MMREC_CHECK(width <= 2048, "query must have at most 2048 columns for the CUDA C++ kernel, got ", width);
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  Tensor scores = torch::stable::new_empty(query, {num_queries, k}, ScalarType::Float);
  Tensor ids = torch::stable::new_empty(query, {num_queries, k}, ScalarType::Long);
  if (num_queries == 0) return {scores, ids};

  Params p{};
  const auto optional = [](const std::optional<Tensor>& t) {
    return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
  };
  const auto scales = optional(item_scales), bias = optional(bias_any), eo = optional(exclude_offsets),
             ei = optional(exclude_ids), co = optional(candidate_offsets), ci = optional(candidate_ids);
  p.query = query.const_data_ptr();
  p.items = items.const_data_ptr();
  p.scales = scales ? scales->const_data_ptr<float>() : nullptr;
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.exclude_offsets = eo ? eo->const_data_ptr<int64_t>() : nullptr;
  p.exclude_ids = ei ? ei->const_data_ptr<int64_t>() : nullptr;
  p.exclude_length = ei ? ei->size(0) : 0;
  p.candidate_offsets = co ? co->const_data_ptr<int64_t>() : nullptr;
  p.candidate_ids = ci ? ci->const_data_ptr<int64_t>() : nullptr;
  p.candidate_length = ci ? ci->size(0) : 0;
  p.num_items = num_items;
  p.width = width;
  p.query_stride = query.stride(0);
  p.item_stride = items.stride(0);
  p.k = static_cast<int>(k);
  p.capacity = 512;
  while (p.capacity < k + kTile) p.capacity *= 2;
  // A few blocks per multiprocessor share the catalogue; more splits than tiles would idle.
  constexpr int64_t kBlocks = 528;
  p.splits = static_cast<int>(std::clamp<int64_t>(kBlocks / num_queries, 1, std::max<int64_t>(num_items / 1024, 1)));
  Tensor partial = torch::stable::new_empty(query, {num_queries, p.splits, k}, ScalarType::Long);
  p.partial = static_cast<uint64_t*>(partial.mutable_data_ptr());
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  p.ids = static_cast<int64_t*>(ids.mutable_data_ptr());

  const cudaStream_t stream = current_stream(query.get_device_index());
  switch (query.scalar_type()) {
    case ScalarType::Float:
      launch_for<float>(items.scalar_type(), p, num_queries, stream);
      break;
    case ScalarType::BFloat16:
      launch_for<__nv_bfloat16>(items.scalar_type(), p, num_queries, stream);
      break;
    case ScalarType::Half:
      launch_for<__half>(items.scalar_type(), p, num_queries, stream);
      break;
    default:
      MMREC_CHECK(false, "query must be float32, bfloat16 or float16 for the CUDA C++ kernel");
  }
  return {scores, ids};
}

}  // namespace
}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CUDA, m) { m.impl("_retrieval_topk_stream", TORCH_BOX(&mmrec::topk_stream)); }
