// Exact reconstruction: for every row the kept weights that minimise (x - w) H (x - w)^T.
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

constexpr int kReconstructRank = 32;

struct ObsReconstructArgs {
  TensorView x;           // f32 [R, C]: in a start, zero where pruned; out the solution
  TensorView residual;    // f32 [R, C]: ((w - x) H) where kept
  TensorView mask;        // bool [R, C], true = kept
  TensorView h;           // f32 [C, C], symmetric positive definite
  TensorView low;         // f32 [K, C], diag(diagonal) + low^T low is about h; K a multiple of 8
                          // and at most kReconstructRank
  TensorView diagonal;    // f32 [C], positive
  TensorView loss;        // f64 [R]: (x - w) H (x - w)^T, in for the start, out for the solution
  TensorView noise;       // f64 [R]: the loss below which fp32 cannot tell apart
  TensorView gap;         // f64 [R], out: bound on how far the loss is above the least one
  TensorView iterations;  // i32 [R], out
  double least;           // no more than the least eigenvalue of h over diag(diagonal) + low^T low
  double tolerance;       // a row is done when gap <= tolerance * (loss + noise)
  int64_t max_iterations;
  int threads;
};

PYPRUNE_CPU_KERNEL(obs_reconstruct, ObsReconstructArgs)

}  // namespace pyprune
