// Per row, exactly `pruned` lowest scores are removed.
#pragma once

#include "cpu/dispatch.h"
#include "score_terms.h"

namespace pyprune {

struct MaskTopkArgs {
  TensorView mask;  // bool [R, C], contiguous
  TensorView w;     // f32 | bf16 | f16 [R, C], unit stride along C
  ScoreTerms terms;
  int64_t pruned;  // 0 <= pruned <= C
  int threads;
};

PYPRUNE_CPU_KERNEL(mask_topk, MaskTopkArgs)

}  // namespace pyprune
