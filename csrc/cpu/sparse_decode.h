// Few rows of x: every row of W is read once, decoded in registers and multiplied with all of them.
#pragma once

#include "cpu/sparse_rows.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// x as the decode kernels read it: [C / 32][M][32] floats, in the order of expand_columns(), zeros
// past C. One stream, whatever M is.
template <class T, class X>
void pack_decode(const X* x, int64_t stride, int64_t m, int64_t cols, float* out) {
  const int64_t padded = mask_words(cols) * kMaskColumns;
  for (int64_t c = 0; c < padded; c += 32) {
    for (int64_t i = 0; i < m; ++i, out += 32) {
      const X* row = x + i * stride + c;
      if (c + 32 <= cols) {
        if constexpr (kEvenOdd<T>) {
          for (int j = 0; j < 16; ++j) out[j] = to_float(row[2 * j]);
          for (int j = 0; j < 16; ++j) out[16 + j] = to_float(row[2 * j + 1]);
        } else {
          for (int j = 0; j < 32; ++j) out[j] = to_float(row[j]);
        }
      } else {
        for (int j = 0; j < 32; ++j)
          out[column_place<T>(j)] = c + j < cols ? to_float(row[j]) : 0.0f;
      }
    }
  }
}

#if defined(__AVX512F__)

// R rows of W at once: their loads are independent streams (one stream alone reaches three quarters
// of a core's bandwidth) and their sums independent chains.
template <class T, bool kDense, int M, int R>
inline void decode_rows(const Weights& w, int64_t r0, const uint64_t* words, const float* x,
                        float* sums) {
  const int64_t n = mask_words(w.cols);
  __m512 acc[R][M];
  const T* v[R];
  for (int r = 0; r < R; ++r) {
    v[r] = static_cast<const T*>(w.values) + w.begin(r0 + r);
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
  }
  const auto step = [&](int64_t i, int half, uint32_t valid) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint32_t keep =
          kDense ? valid : static_cast<uint32_t>(words[r * n + i] >> (32 * half));
      const auto c = kDense ? Columns32<T>::load(v[r], keep) : Columns32<T>::expand(v[r], keep);
      v[r] += kDense ? 32 : popcount(keep);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float* xm = x + ((2 * i + half) * M + m) * 32;
        acc[r][m] = _mm512_fmadd_ps(c.a, _mm512_loadu_ps(xm), acc[r][m]);
        acc[r][m] = _mm512_fmadd_ps(c.b, _mm512_loadu_ps(xm + 16), acc[r][m]);
      }
    }
  };
  const int64_t whole = kDense ? w.cols / kMaskColumns : n;
  for (int64_t i = 0; i < whole; ++i) {
    step(i, 0, ~0u);
    step(i, 1, ~0u);
  }
  if (whole < n) {
    const uint64_t tail = (uint64_t{1} << (w.cols % kMaskColumns)) - 1;
    step(whole, 0, static_cast<uint32_t>(tail));
    step(whole, 1, static_cast<uint32_t>(tail >> 32));
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) sums[r * M + m] = _mm512_reduce_add_ps(acc[r][m]);
}

#else

template <class T, bool kDense, int M, int R>
inline void decode_rows(const Weights& w, int64_t r0, const uint64_t* words, const float* x,
                        float* sums) {
  const int64_t n = mask_words(w.cols);
  const T* values = static_cast<const T*>(w.values);
  for (int r = 0; r < R; ++r) {
    const T* v = values + w.begin(r0 + r);
    Vec acc[M];
    for (int m = 0; m < M; ++m) acc[m] = Vec::zero();
    for (int64_t i = 0; i < n; ++i) {
      float row[kMaskColumns];
      if (kDense)
        widen_columns(v + i * kMaskColumns, std::min(kMaskColumns, w.cols - i * kMaskColumns), row);
      else
        v = expand_columns(v, values + w.nnz, words + r * n + i, 1, row);
      for (int64_t c = 0; c < kMaskColumns; c += Vec::kLanes) {
        const Vec a = Vec::load(row + c);
        const float* xc = x + (2 * i + c / 32) * M * 32 + c % 32;
        for (int m = 0; m < M; ++m) acc[m] = Vec::fma(a, Vec::load(xc + 32 * m), acc[m]);
      }
    }
    for (int m = 0; m < M; ++m) sums[r * M + m] = acc[m].sum();
  }
}

#endif

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
