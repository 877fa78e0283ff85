// csrc/routing/small_route.cuh on the host, one block, and one warp or thread, after the other. Numbers come in the order of
// SmallRouteParams' fields.
#include "../../csrc/routing/small_route.cuh"

namespace {

using namespace mmrec;
using elements::Float32;
using elements::Narrow;

template <typename X, typename G, int kE>
void route(const SmallRouteParams& p) {
  using Route = SmallRoute<X, G, kE>;
  static typename Route::Shared shared;
  const auto for_each_thread = [&](int block, auto phase) {
    for (int thread = 0; thread < Route::kThreads; ++thread) {
      Route one{p, shared, block, thread};
      (one.*phase)();
    }
  };
  // In another order than that of the blocks: which comes last changes nothing.
  for (int n = 0; n < p.blocks; ++n) {
    const int block = (n + p.blocks / 2) % p.blocks;
    std::memset(static_cast<void*>(&shared), 0xff, sizeof(shared));
    for (int w = 0; w < Route::kWarps; ++w) {
      warp::Emulator::here().run([&] { Route{p, shared, block, 32 * w + warp::lane()}.route_tokens(); });
    }
    for_each_thread(block, &Route::add_tokens);
    for_each_thread(block, &Route::rank_slots);
    if (++*p.arrived != static_cast<unsigned>(p.blocks)) continue;
    for_each_thread(block, &Route::add_blocks);
    for_each_thread(block, &Route::finish);
    for_each_thread(block, &Route::place);
  }
}

template <typename X, typename G>
void route(const SmallRouteParams& p) {
  if (p.num_experts <= 8) return route<X, G, 8>(p);
  if (p.num_experts <= 16) return route<X, G, 16>(p);
  if (p.num_experts <= 32) return route<X, G, 32>(p);
  route<X, G, 64>(p);
}

}  // namespace

// Kinds of elements: 0 float32, 1 bfloat16, 2 float16.
extern "C" void emulated_route(int kind, int gate_kind, const int64_t* numbers) {
  SmallRouteParams p{};
  const auto pointer = [&](auto*& to) { to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(*numbers++); };
  const auto number = [&](auto& to) { to = static_cast<std::remove_reference_t<decltype(to)>>(*numbers++); };
  pointer(p.x), pointer(p.gate), pointer(p.modality), pointer(p.valid), pointer(p.allowed), pointer(p.bias);
  pointer(p.weights), pointer(p.experts), pointer(p.stats), pointer(p.losses), pointer(p.starts), pointer(p.pair_tokens);
  pointer(p.pair_of), pointer(p.sums), pointer(p.totals), pointer(p.counts), pointer(p.ranks), pointer(p.arrived);
  number(p.x_row), number(p.tokens), number(p.width), number(p.num_experts), number(p.modalities), number(p.k);
  number(p.blocks), number(p.x_aligned), number(p.gate_aligned), number(p.divides), number(p.score);
  if (kind == 0) return route<Float32, Float32>(p);
  if (kind == 1 && gate_kind == 0) return route<Narrow<warp::BFloat16>, Float32>(p);
  if (kind == 1) return route<Narrow<warp::BFloat16>, Narrow<warp::BFloat16>>(p);
  if (gate_kind == 0) return route<Narrow<warp::Float16>, Float32>(p);
  route<Narrow<warp::Float16>, Narrow<warp::Float16>>(p);
}
