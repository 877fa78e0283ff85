// What the rows of an op's matrices hold.
#pragma once

namespace mmrec {

// kBFloat16Pairs: bfloat16 where the ISA multiplies pairs of them (avx512_bf16 only).
enum class Element : int { kFloat32, kBFloat16, kBFloat16Pairs, kFloat64 };

}  // namespace mmrec
