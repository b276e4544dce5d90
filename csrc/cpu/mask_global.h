// Exactly `pruned` lowest scores of several matrices together are removed.
#pragma once

#include "cpu/dispatch.h"
#include "score_terms.h"

namespace pyprune {

struct GlobalTensor {
  TensorView mask;  // bool [R, C], contiguous
  TensorView w;     // f32 | bf16 | f16 [R, C], unit stride along C
  ScoreTerms terms;
};

struct MaskGlobalArgs {
  const GlobalTensor* tensors;  // all of one dtype
  int64_t count;
  int64_t pruned;  // 0 <= pruned <= total number of elements
  int threads;
};

PYPRUNE_CPU_KERNEL(mask_global, MaskGlobalArgs)

}  // namespace pyprune
