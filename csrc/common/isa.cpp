#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "check.h"

// libstdc++ reads this flag of glibc 2.32 to skip atomics in single-threaded programs. A hidden definition keeps the
// library loadable on older glibc; false means "use atomics".
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace mmrec {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16"};
constexpr int kCount = 4;

bool supported(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kBase:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
  }
  return false;
#else
  return isa == Isa::kBase;
#endif
}

Isa choose() {
  Isa best = Isa::kBase;
  for (int i = 0; i < kCount; ++i) {
    if (supported(static_cast<Isa>(i))) best = static_cast<Isa>(i);
  }
  const char* wanted = std::getenv("MMREC_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int i = 0; i < kCount; ++i) {
    if (std::strcmp(wanted, kNames[i]) != 0) continue;
    MMREC_CHECK(supported(static_cast<Isa>(i)), "MMREC_CPU_ISA must name an instruction set of this CPU (up to ",
                kNames[static_cast<int>(best)], "), got ", wanted);
    return static_cast<Isa>(i);
  }
  MMREC_CHECK(false, "MMREC_CPU_ISA must be base, avx2, avx512 or avx512_bf16, got ", wanted);
  return best;
}

int64_t cpu_isa_op(const torch::stable::Tensor&) { return static_cast<int64_t>(cpu_isa()); }

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace mmrec

STABLE_TORCH_LIBRARY_IMPL(mmrec, CPU, m) { m.impl("_cpu_isa", TORCH_BOX(&mmrec::cpu_isa_op)); }
