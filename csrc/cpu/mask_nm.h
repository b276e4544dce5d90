// mask[i, g*m + j]: the n highest scores of every m consecutive columns are kept.
#pragma once

#include "cpu/dispatch.h"
#include "score_terms.h"

namespace pyprune {

struct MaskNmArgs {
  TensorView mask;  // bool [R, C], contiguous
  TensorView w;     // f32 | bf16 | f16 [R, C], unit stride along C
  ScoreTerms terms;
  int64_t n, m;  // m divides C
  int threads;
};

PYPRUNE_CPU_KERNEL(mask_nm, MaskNmArgs)

}  // namespace pyprune
