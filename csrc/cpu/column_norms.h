// acc[j] += sum_t weight[t] * x[t, j]^2
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct ColumnNormsArgs {
  TensorView acc;            // f32 [C], contiguous
  TensorView x;              // f32 | bf16 | f16 [T, C], unit stride along C
  const TensorView* weight;  // f32 [T], contiguous, or null
  int threads;
};

PYPRUNE_CPU_KERNEL(column_norms, ColumnNormsArgs)

}  // namespace pyprune
