// The two micro-kernels of the OBS sweep, on tiles of a strip (see strip.h).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/strip.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Register block of kMaxVecs x kCols accumulators: 24 of 32 registers with AVX-512, 12 of 16 with
// AVX2; one vector of rows where Vec is emulated.
#if defined(__AVX512F__)
constexpr int kCols = 8, kMaxVecs = 3;
#elif defined(__AVX2__)
constexpr int kCols = 4, kMaxVecs = 3;
#else
constexpr int kCols = 4, kMaxVecs = 1;
#endif

// acc -= e[k] u[k] over k < depth; e is [depth][V vectors], u is [depth][kCols].
template <int V, int W>
inline void accumulate(Vec (&acc)[W][V], const float* e, const float* u, int64_t depth) {
  constexpr int L = Vec::kLanes;
  for (int64_t k = 0; k < depth; ++k) {
    Vec err[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) err[v] = Vec::load(e + k * V * L + v * L);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      const Vec b = Vec::set1(u[k * kCols + w]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[w][v] = Vec::fnma(err[v], b, acc[w][v]);
    }
  }
}

// W columns of a strip, all tiles of one panel column: tile -= e u.
template <int V, int W>
void update_tile(float* tile, const float* e, const float* u, int64_t depth) {
  constexpr int L = Vec::kLanes;
  Vec acc[W][V];
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[w][v] = Vec::load(tile + (w * V + v) * L);
  accumulate<V, W>(acc, e, u, depth);
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[w][v].store(tile + (w * V + v) * L);
}

// Brings the tile up to date like update_tile, then visits its columns: `kept` gets the new
// weights, `tile` the errors, `loss` their halved squares. `diag` is the panel at the tile's rows.
template <int V, int W>
void solve_tile(float* tile, const float* e, const float* u, int64_t depth, const float* inv_diag,
                const int32_t* pruned, float* kept, double* loss) {
  constexpr int L = Vec::kLanes;
  Vec acc[W][V], squares[V];
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[w][v] = Vec::load(tile + (w * V + v) * L);
  accumulate<V, W>(acc, e, u, depth);
  const float* diag = u + depth * kCols;
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) squares[v] = Vec::zero();
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w) {
    const Vec inv = Vec::set1(inv_diag[w]);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const int32_t* mask = pruned + (w * V + v) * L;
      where_not(mask, acc[w][v]).store(kept + (w * V + v) * L);
      const Vec err = where(mask, acc[w][v] * inv);
      err.store(tile + (w * V + v) * L);
      squares[v] = Vec::fma(err, err, squares[v]);
#pragma GCC unroll 8
      for (int x = w + 1; x < W; ++x)
        acc[x][v] = Vec::fnma(err, Vec::set1(diag[w * kCols + x]), acc[x][v]);
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    float sum[L];
    squares[v].store(sum);
    for (int i = 0; i < L; ++i) loss[v * L + i] += 0.5 * sum[i];
  }
}

// Calls f with the tile width 1 <= w <= kCols as a compile-time constant.
template <int W = kCols, class F>
inline void with_width(int64_t w, F&& f) {
  if constexpr (W >= 1) {
    if (w == W) return f(std::integral_constant<int, W>());
    with_width<W - 1>(w, f);
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
