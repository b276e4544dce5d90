// Masks that prune exactly so many of several matrices together, on the GPU.
#pragma once

#include <cuda_runtime_api.h>

#include <vector>

#include "score_terms.h"

namespace pyprune {

struct GlobalMaskCuda {
  TensorView mask;  // bool [R, C], contiguous
  TensorView w;     // f32 | bf16 | f16 [R, C], unit stride along C; all of one dtype, none empty
  ScoreTerms terms;
};

// Words of 64 bits that a launch needs for itself, on the device; they need not be zero.
int64_t mask_global_workspace(const std::vector<GlobalMaskCuda>& matrices);

// 1 <= pruned <= all elements. Asynchronous on `stream`; returns the launch status.
cudaError_t launch_mask_global(const std::vector<GlobalMaskCuda>& matrices, int64_t pruned,
                               uint64_t* workspace, cudaStream_t stream);

}  // namespace pyprune
