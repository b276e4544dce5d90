// Masks that prune exactly so many of each row, on the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "score_terms.h"

namespace pyprune {

// The most columns: a row's keys are kept in registers.
constexpr int64_t kMaskTopkColumns = 32768;

// mask: bool [R, C], contiguous. w: f32 | bf16 | f16 [R, C], unit stride along C, at most
// kMaskTopkColumns; 1 <= pruned <= C. Asynchronous on `stream`; returns the launch status.
cudaError_t launch_mask_topk(const TensorView& mask, const TensorView& w, int64_t pruned,
                             const ScoreTerms& terms, cudaStream_t stream);

}  // namespace pyprune
