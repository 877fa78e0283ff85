// csrc/attention/warp_forward.cuh on the host, one warp after the other. Numbers come in the order of WarpParams' fields.
#include "../../csrc/attention/warp_forward.cuh"

namespace {

struct Reader {
  const int64_t* at;

  int64_t number() { return *at++; }
  template <typename T>
  T* pointer() { return reinterpret_cast<T*>(number()); }
};

mmrec::WarpPerSegment per_segment(Reader& from) {
  mmrec::WarpPerSegment made{};
  made.data = from.pointer<const float>();
  made.batch = from.number();
  made.head = from.number();
  made.segment = from.number();
  return made;
}

template <typename T, int D>
void attend(const mmrec::WarpParams& p) {
  for (int64_t unit = 0; unit < p.batch * p.kv_heads; ++unit) {
    mmrec::warp::Emulator::here().run([&] { mmrec::WarpForward<T, D>(p, unit).run(); });
  }
}

template <typename T>
void attend(const mmrec::WarpParams& p, int width) {
  if (width == 16) attend<T, 16>(p);
  if (width == 32) attend<T, 32>(p);
  if (width == 64) attend<T, 64>(p);
  if (width == 128) attend<T, 128>(p);
}

}  // namespace

extern "C" void emulated_forward(int half, int width, float scale, float norm_eps, const int64_t* numbers) {
  Reader from{numbers};
  mmrec::WarpParams p{};
  p.query = from.pointer<const char>();
  p.query_offsets = from.pointer<const int64_t>();
  p.offsets = from.pointer<const int64_t>();
  p.sink = from.pointer<const float>();
  p.query_norm = from.pointer<const float>();
  p.key_norm = from.pointer<const float>();
  p.out = from.pointer<char>();
  p.lse = from.pointer<double>();
  p.mass = from.pointer<float>();
  p.log_bias = per_segment(from);
  p.value_gate = per_segment(from);
  p.query_row = from.number();
  p.query_head = from.number();
  p.batch = from.number();
  p.query_rows = from.number();
  p.kv_heads = static_cast<int>(from.number());
  p.group = static_cast<int>(from.number());
  p.segments = static_cast<int>(from.number());
  p.causal = static_cast<int>(from.number());
  p.scale = scale;
  p.norm_eps = norm_eps;
  for (int m = 0; m < p.segments; ++m) {
    mmrec::WarpSegment& segment = p.segment[m];
    segment.key = from.pointer<const char>();
    segment.value = from.pointer<const char>();
    segment.index = from.pointer<const int64_t>();
    segment.key_row = from.number();
    segment.key_head = from.number();
    segment.value_row = from.number();
    segment.value_head = from.number();
    segment.rows = from.number();
    segment.entries = from.number();
  }
  if (half) {
    attend<mmrec::warp::Float16>(p, width);
  } else {
    attend<mmrec::warp::BFloat16>(p, width);
  }
}
