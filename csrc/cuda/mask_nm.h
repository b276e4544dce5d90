// 2:4 masks on the GPU: the two highest scores of every four consecutive columns are kept.
#pragma once

#include <cuda_runtime_api.h>

#include "score_terms.h"

namespace pyprune {

// mask: bool [R, C], contiguous. w: f32 | bf16 | f16 [R, C], unit stride along C, 4 divides C.
// Asynchronous on `stream`; returns the launch status.
cudaError_t launch_mask_24(const TensorView& mask, const TensorView& w, const ScoreTerms& terms,
                           cudaStream_t stream);

}  // namespace pyprune
