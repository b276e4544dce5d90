// Bitmap packing and unpacking on the GPU; see pyprune/ops/pack.py for the layout.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_view.h"

namespace pyprune {

// Elements are moved as bits: f32 | bf16 | f16.
struct BitmapRowsCuda {
  TensorView bitmap;       // u8 [R, ceil(C/8)], contiguous; written
  TensorView row_offsets;  // i64 [R + 1]; written
  TensorView w;            // [R, C], unit stride along C
  TensorView mask;         // bool [R, C], contiguous, or no data
  TensorView state;        // i64 [1], zero; for the launch's own use
};

struct BitmapValuesCuda {
  TensorView w;            // [R, C], unit stride along C; contiguous where it is written
  TensorView values;       // w's dtype [nnz]
  TensorView bitmap;       // u8 [R, ceil(C/8)], contiguous
  TensorView row_offsets;  // i64 [R + 1]
  bool pack;               // w to values, else back
};

// Asynchronous on `stream`; return the launch status.
cudaError_t launch_bitmap_rows(const BitmapRowsCuda& args, cudaStream_t stream);
cudaError_t launch_bitmap_values(const BitmapValuesCuda& args, cudaStream_t stream);

}  // namespace pyprune
