// Independent tasks over torch's threads, and memory for them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mmrec {

// Asks for large pages under memory that is about to be written for the first time: one fault for 2 MiB instead of 512 of
// 4 KiB each. Nothing happens where the memory is small or the system has none.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) & ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

// Zeros, into memory that is nowhere if it is empty: memset wants an address even then.
inline void clear(void* memory, int64_t bytes) {
  if (bytes > 0) std::memset(memory, 0, static_cast<size_t>(bytes));
}

// Results from this size on are written past the caches, where their rows are whole lines.
constexpr int64_t kStreamedBytes = int64_t{8} << 20;
inline bool is_whole_lines(const void* rows, int64_t row_bytes) {
  return row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(rows) % 64 == 0;
}

// Uninitialised memory, aligned to a cache line.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : data_(count == 0 ? nullptr : static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(count), kAlign))) {
    prefer_large_pages(data_, count * static_cast<int64_t>(sizeof(T)));
  }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) ::operator delete(data_, kAlign);
  }
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  T* data_;
};

// Calls body(task, state) for every task in [0, count), each once, on whichever thread is free; `make_state` makes what a
// thread keeps from task to task.
template <typename MakeState, typename Body>
void for_each_task(int64_t count, const MakeState& make_state, const Body& body) {
  if (count <= 0) return;
  const int64_t threads = torch::stable::get_num_threads(), workers = threads < count ? threads : count;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      auto state = make_state();
      for (int64_t task = next++; task < count; task = next++) body(task, state);
    }
  });
}

template <typename Body>
void for_each_task(int64_t count, const Body& body) {
  for_each_task(count, [] { return 0; }, [&](int64_t task, int) { body(task); });
}

// The same over [0, count) in ranges of `grain`.
template <typename Body>
void for_each_range(int64_t count, int64_t grain, const Body& body) {
  for_each_task((count + grain - 1) / grain, [&](int64_t task) {
    const int64_t begin = task * grain;
    body(begin, begin + grain < count ? begin + grain : count);
  });
}

}  // namespace mmrec
