// The upper triangular U with (H + diag(shift))^-1 = U^T U.
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct ObsFactorArgs {
  TensorView h;      // f32 [C, C], symmetric, unit stride along the last dimension
  TensorView shift;  // f32 [C], contiguous
  TensorView u;      // f32 [C, C], contiguous, zeroed: the upper triangle is written
  bool* definite;    // false if a pivot was not positive; u is then unspecified
  int threads;
};

PYPRUNE_CPU_KERNEL(obs_factor, ObsFactorArgs)

}  // namespace pyprune
