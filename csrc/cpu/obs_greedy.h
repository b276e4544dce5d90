// Greedy optimal brain surgeon: per problem, the weight with the least x^2 / diag goes, again and
// again, each choice from the exact inverse of what is left.
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct ObsGreedyArgs {
  TensorView order;    // i64 [P, K], out: the index that went in each step, -1 if none was left
  TensorView loss;     // f32 [P, K], out: what the step added
  TensorView w;        // f32 [P, C]
  TensorView inverse;  // f32 [1 or P, C, C], symmetric positive definite
  TensorView first;    // bool [P, C]: go before all others; no data: none
  int64_t n, m;        // of every m consecutive weights n stay; m = 0: no groups
  int threads;
};

PYPRUNE_CPU_KERNEL(obs_greedy, ObsGreedyArgs)

}  // namespace pyprune
