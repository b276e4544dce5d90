// The sums of int8 products with few rows of x: R x M vectors for R rows of W and M of x, which a
// kernel loads, adds to and stores. Loops over them are unrolled and functions inlined, or the
// compiler keeps the sums in memory and stores each at every step.
#pragma once

#include "cpu/sparse_bf16.h"

namespace pyprune {
namespace PYPRUNE_ISA {

template <int R, int M>
[[gnu::always_inline]] inline void load_sums(const float* sums, Vec (&acc)[R][M]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m] = Vec::load(sums + (r * M + m) * Vec::kLanes);
}

template <int R, int M>
[[gnu::always_inline]] inline void store_sums(const Vec (&acc)[R][M], float* sums) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[r][m].store(sums + (r * M + m) * Vec::kLanes);
}

#if defined(__AVX512F__)

inline void hold(__m512i& a, __m512i& b) { asm volatile("" : "+v"(a), "+v"(b)); }

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512vbmi2,avx512vpopcntdq")

// A word of columns of R rows of W, as Widen64 gives it, times that word of M rows of x.
template <int R, int M>
[[gnu::always_inline]] inline void add_pairs(const __m512bh (&w)[R][2], const bf16* x,
                                             Vec (&acc)[R][M]) {
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    const bf16* xm = x + m * kMaskColumns;
    __m512i x0 = _mm512_load_si512(xm), x1 = _mm512_load_si512(xm + 32);
    hold(x0, x1);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      acc[r][m].v = _mm512_dpbf16_ps(acc[r][m].v, w[r][0], words_of(x0));
      acc[r][m].v = _mm512_dpbf16_ps(acc[r][m].v, w[r][1], words_of(x1));
    }
  }
}

#pragma GCC pop_options

#endif

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
