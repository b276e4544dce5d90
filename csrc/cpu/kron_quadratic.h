// out[i] = sum_jk W[i, j] H[j, k] W[i, k] for symmetric H
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct KronQuadraticArgs {
  TensorView out;  // f32 [R], contiguous
  TensorView w;    // f32 [R, C], unit stride along either dimension
  TensorView h;    // f32 [C, C], unit stride along the last; blocks from the diagonal up are read
  int threads;
};

PYPRUNE_CPU_KERNEL(kron_quadratic, KronQuadraticArgs)

}  // namespace pyprune
