// N:M masks on the GPU: the n highest scores of every M consecutive columns are kept.
#pragma once

#include <cuda_runtime_api.h>

#include "score_terms.h"

namespace pyprune {

// Whether there is a kernel for n kept of m.
constexpr bool mask_nm_takes(int64_t n, int64_t m) {
  return m == 4 || m == 8 || (n == 8 && m == 16);
}

// mask: bool [R, C], contiguous. w: f32 | bf16 | f16 [R, C], unit stride along C, m divides C,
// 1 <= n <= m, mask_nm_takes(n, m). Asynchronous on `stream`; returns the launch status.
cudaError_t launch_mask_nm(const TensorView& mask, const TensorView& w, int64_t n, int64_t m,
                           const ScoreTerms& terms, cudaStream_t stream);

}  // namespace pyprune
