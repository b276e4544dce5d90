// y = x W^T for bitmap compressed W and few rows of x, on tensor cores.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_view.h"

namespace pyprune {

struct LinearBitmap {
  TensorView y;            // x's dtype [M, R], contiguous
  TensorView x;            // bf16 | f16 | f32 [M, C], contiguous, 32 divides C
  TensorView values;       // x's dtype, bf16 for f32 [nnz], contiguous, nnz < 2^31
  TensorView bitmap;       // u8 [R, C/8], contiguous
  TensorView row_offsets;  // i64 [R + 1], contiguous
  TensorView bias;         // f32 [R] or no data
};

// The most rows of x that launch_linear_bitmap() takes: 64 of 16-bit numbers, 5 of fp32 ones, which
// are three rows of bf16 parts each.
int64_t linear_bitmap_rows(DType x);

// Asynchronous on `stream`; returns the launch status.
cudaError_t launch_linear_bitmap(const LinearBitmap& args, cudaStream_t stream);

}  // namespace pyprune
