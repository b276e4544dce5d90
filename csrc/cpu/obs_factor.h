// The upper triangular U with (H + damping * mean(diag H) * I)^-1 = U^T U, dead inputs' diagonal
// entries counting as 1.
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct ObsFactorArgs {
  TensorView h;     // f32 [C, C], symmetric, unit stride along the last dimension
  TensorView u;     // f32 [C, C], contiguous, written whole
  TensorView dead;  // bool [C], contiguous: inputs that were always zero, H_jj = 0
  double damping;
  bool* good;  // false if H is not finite, or a pivot not positive by more than its rounding error:
               // u is then unspecified
  int threads;
};

PYPRUNE_CPU_KERNEL(obs_factor, ObsFactorArgs)

}  // namespace pyprune
