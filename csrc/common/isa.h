// The instruction sets that every CPU kernel source is compiled for, and the one in use.
//
// A kernel source is compiled once per ISA, with MMREC_ISA naming the namespace its functions live in. Everything else
// in such a source has internal linkage: a weak symbol compiled for AVX-512 and kept by the linker would crash machines
// without it.
#pragma once

namespace mmrec {

// The order is that of ISA_NAMES in schemas.py and of the tables that MMREC_ISA_TABLE makes.
enum class Isa : int { kBase = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// Chosen once: the best that the CPU and the operating system support, or what MMREC_CPU_ISA asks for.
// Throws when MMREC_CPU_ISA names an unknown or unsupported one.
Isa cpu_isa();

#if defined(__x86_64__)
#define MMREC_FOR_EACH_ISA(X) X(base) X(avx2) X(avx512) X(avx512_bf16)
#define MMREC_ISA_TABLE(function) {base::function, avx2::function, avx512::function, avx512_bf16::function}
#else
#define MMREC_FOR_EACH_ISA(X) X(base)
#define MMREC_ISA_TABLE(function) {base::function}
#endif

}  // namespace mmrec
