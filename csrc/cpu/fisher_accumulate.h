// acc += |scale * G[n]^T X[n]|^power, summed over the sequences n
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct FisherAccumulateArgs {
  TensorView acc;  // f32 [R, C], contiguous
  TensorView g;    // f32 | bf16 | f16 [N, T, R], unit stride along R
  TensorView x;    // the same type [N, T, C], unit stride along C
  int power;       // 1 | 2
  float scale;
  int threads;
};

PYPRUNE_CPU_KERNEL(fisher_accumulate, FisherAccumulateArgs)

}  // namespace pyprune
