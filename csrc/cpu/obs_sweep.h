// The blockwise OBS solve (SparseGPT): every row of W left to right, masks chosen on the way.
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct ObsSweepArgs {
  TensorView w;                // f32 [B, R, C], unit stride along C
  TensorView u;                // f32 [1 | B, C, C], contiguous, upper triangular
  TensorView weight;           // f32 [B, R, C], contiguous, out
  TensorView mask;             // bool [B, R, C], contiguous, out, true = kept
  TensorView loss;             // f32 [B, R], contiguous, out
  const TensorView* counts;    // i32 [B, 1 | R, blocks], contiguous: how many each comparison
                               // group (rows x block, or row x block) prunes; or null
  const TensorView* given;     // bool [B, R, C], contiguous: the mask to sweep with; or null
  const TensorView* preserve;  // bool [B, R, C], contiguous, false = stays pruned; or null
  const TensorView* scale;     // f32 [1 | B, C], contiguous: scores are |w| scale; null: |w| / U_jj
  const TensorView* grid;      // f32 [B, 3, R], contiguous: step, low and high of the values that
                               // kept weights are rounded to; or null
  int64_t n, m;                // keep n of every m when there is neither counts nor given
  int64_t block;               // columns per block, a multiple of m
  bool all_ties;               // prune everything equal to the last pruned score as well
  int threads;
};

PYPRUNE_CPU_KERNEL(obs_sweep, ObsSweepArgs)

}  // namespace pyprune
