// Second line of argument checks: the public Python functions check shapes, dtypes and flags; kernels check contents.
#pragma once

#include <torch/headeronly/util/Exception.h>

// The prefix tells library.py that the message is for the caller; it re-raises it as a ValueError.
#define MMREC_CHECK(condition, ...) STD_TORCH_CHECK(condition, "mmrec: ", __VA_ARGS__)
