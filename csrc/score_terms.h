// The optional terms of a pruning score; `data == nullptr` means absent.
//
//   score = |w[i,j] * (column_scale[j] + addend[i,j]) * row_scale[i]|
#pragma once

#include "tensor_view.h"

namespace pyprune {

struct ScoreTerms {
  TensorView column_scale;  // f32 [C], contiguous
  TensorView row_scale;     // f32 [R], contiguous
  TensorView addend;        // f32 [R, C], unit stride along C
  TensorView preserve;      // bool [R, C], unit stride along C; false: must stay pruned
};

}  // namespace pyprune
