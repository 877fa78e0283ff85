// csrc/nf4/small_linear.cuh on the host, one block, and one warp or thread, after the other. Numbers come in the order of
// SmallLinearParams' fields.
#include "../../csrc/nf4/small_linear.cuh"

namespace {

using namespace mmrec;

template <typename Kernel, typename Phase>
void by_threads(Kernel make, Phase phase) {
  for (int thread = 0; thread < kSmallLinearThreads; ++thread) {
    auto one = make(thread);
    (one.*phase)();
  }
}

template <typename Body>
void by_warps(Body body) {
  for (int w = 0; w < kSmallLinearWarps; ++w) {
    warp::Emulator::here().run([&] { body(32 * w + warp::lane()); });
  }
}

template <typename Shared>
Shared& poisoned() {
  static Shared shared;
  std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
  return shared;
}

template <typename T>
void low_rank(const SmallLinearParams& p) {
  using LowRank = SmallLowRank<T>;
  for (int rank = 0; rank < p.rank; ++rank) {
    for (int first = 0; first < p.tokens; first += LowRank::kTokens) {
      auto& shared = poisoned<typename LowRank::Shared>();
      const auto at = [&](int thread) { return LowRank{p, shared, rank, first, thread}; };
      by_warps([&](int thread) { at(thread).multiply(); });
      by_threads(at, &LowRank::finish);
    }
  }
}

template <typename T, int kR, int kT>
void linear(const SmallLinearParams& p) {
  using Linear = SmallLinear<T, kR, kT>;
  static float acc[kSmallLinearThreads][kR][kT][4];
  for (int first = 0; first < p.rows; first += Linear::kRows) {
    auto& shared = poisoned<typename Linear::Shared>();
    std::memset(acc, 0, sizeof(acc));
    const auto at = [&](int thread) { return Linear{p, shared, first, thread}; };
    by_threads(at, &Linear::fill);
    by_warps([&](int thread) { at(thread).multiply(acc[thread]); });
    std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
    for (int thread = 0; thread < kSmallLinearThreads; ++thread) at(thread).keep(acc[thread]);
    by_threads(at, &Linear::finish);
  }
}

template <typename T, int kR>
void linear(const SmallLinearParams& p) {
  if (p.tokens <= 8) return linear<T, kR, 1>(p);
  if (p.tokens <= 16) return linear<T, kR, 2>(p);
  if (p.tokens <= 32) return linear<T, kR, 4>(p);
  linear<T, kR, 8>(p);
}

template <typename T>
void run(const SmallLinearParams& p, int rows_of_block) {
  if (p.low != nullptr) low_rank<T>(p);
  rows_of_block == 16 ? linear<T, 1>(p) : linear<T, 2>(p);
}

}  // namespace

extern "C" void emulated_linear(int half, int rows_of_block, float scaling, const int64_t* numbers) {
  SmallLinearParams p{};
  const auto pointer = [&](auto*& to) { to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(*numbers++); };
  const auto number = [&](int& to) { to = static_cast<int>(*numbers++); };
  pointer(p.x), pointer(p.packed), pointer(p.absmax), pointer(p.nested_absmax), pointer(p.nested_code), pointer(p.offset);
  pointer(p.bias), pointer(p.a), pointer(p.b), pointer(p.scalings), pointer(p.ids), pointer(p.low), pointer(p.y);
  number(p.tokens), number(p.width), number(p.rows), number(p.rank), number(p.adapters), number(p.block_shift);
  number(p.bias_wide), number(p.adapters_wide), number(p.rank_aligned);
  p.scaling = scaling;
  half != 0 ? run<warp::Float16>(p, rows_of_block) : run<warp::BFloat16>(p, rows_of_block);
}
