// y = x W^T for 2:4 compressed W and up to 64 rows of x, on sparse tensor cores.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_view.h"

namespace pyprune {

struct Linear24 {
  TensorView y;       // bf16 | f16 [M, R], contiguous
  TensorView x;       // y's dtype [M, C], contiguous, M <= 64, 64 divides C
  TensorView values;  // y's dtype [R, C/2], contiguous
  TensorView meta;    // u8 [R, C/8], contiguous
  TensorView bias;    // f32 [R] or no data
};

// Asynchronous on `stream`; returns the launch status.
cudaError_t launch_linear_24(const Linear24& args, cudaStream_t stream);

}  // namespace pyprune
