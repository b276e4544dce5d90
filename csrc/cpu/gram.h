// out[b] += X[b]^T diag(weight[b]) X[b]
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct GramArgs {
  TensorView out;            // f32 [B, N, N], contiguous, symmetric; N = C or C + 1 (ones column)
  TensorView x;              // f32 | bf16 | f16 [B, T, C], unit stride along C
  const TensorView* weight;  // f32 [B, T], contiguous, or null
  int threads;
};

PYPRUNE_CPU_KERNEL(gram, GramArgs)

}  // namespace pyprune
