// 2:4 packing and unpacking on the GPU; see pyprune/ops/pack.py for the layout.
#pragma once

#include <cuda_runtime_api.h>

#include "tensor_view.h"

namespace pyprune {

// Elements are moved as bits: f32 | bf16 | f16. Every address and row stride is a multiple of 16
// bytes (of 8 for the mask, any for meta); 8 divides C.
struct Pack24Cuda {
  TensorView values;    // [R, C/2], contiguous
  TensorView meta;      // u8 [R, C/8], contiguous
  TensorView w;         // [R, C], unit stride along C; contiguous where it is written
  TensorView mask;      // bool [R, C], contiguous, or no data
  TensorView overfull;  // i64 [1]: the first group that keeps more than two, or -1
};

// Asynchronous on `stream`; return the launch status. Unpacking takes no mask and no overfull.
cudaError_t launch_pack_24(const Pack24Cuda& args, cudaStream_t stream);
cudaError_t launch_unpack_24(const Pack24Cuda& args, cudaStream_t stream);

}  // namespace pyprune
