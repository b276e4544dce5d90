// Few rows of x: every row of W is read once, decoded in registers and multiplied with all of them.
#pragma once

#include <algorithm>

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
// of a core's bandwidth) and their sums independent chains. While they are multiplied, what lies
// `ahead` bytes further is fetched into the second level: a row is too short for the hardware to
// learn its stream in time. `sums` holds R x M vectors of partial sums.
template <class T, bool kDense, int M, int R>
inline void decode_rows(const Weights& w, Cursor<T>* cursors, int64_t i0, int64_t i1,
                        const float* x, int64_t ahead, float* sums) {
  __m512 acc[R][M];
  const T* v[R];
  for (int r = 0; r < R; ++r) {
    v[r] = cursors[r].v;
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_load_ps(sums + (r * M + m) * 16);
  }
  const auto step = [&](int64_t i, int half, uint32_t valid) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const uint32_t keep =
          kDense ? valid : static_cast<uint32_t>(cursors[r].words[i] >> (32 * half));
      const auto c = kDense ? Columns32<T>::load(v[r], keep) : Columns32<T>::expand(v[r], keep);
      v[r] += kDense ? 32 : popcount(keep);
      if (kDense || sizeof(T) == 4 || half)
        _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float* xm = x + ((2 * i + half) * M + m) * 32;
        acc[r][m] = _mm512_fmadd_ps(c.a, _mm512_loadu_ps(xm), acc[r][m]);
        acc[r][m] = _mm512_fmadd_ps(c.b, _mm512_loadu_ps(xm + 16), acc[r][m]);
      }
    }
  };
  const int64_t whole = kDense ? std::min(i1, w.cols / kMaskColumns) : i1;
  for (int64_t i = i0; i < whole; ++i) {
    step(i, 0, ~0u);
    step(i, 1, ~0u);
  }
  if (whole < i1) {
    const uint64_t tail = (uint64_t{1} << (w.cols % kMaskColumns)) - 1;
    step(whole, 0, static_cast<uint32_t>(tail));
    step(whole, 1, static_cast<uint32_t>(tail >> 32));
  }
  for (int r = 0; r < R; ++r) {
    cursors[r].v = v[r];
    for (int m = 0; m < M; ++m) _mm512_store_ps(sums + (r * M + m) * 16, acc[r][m]);
  }
}

#else

template <class T, bool kDense, int M, int R>
inline void decode_rows(const Weights& w, Cursor<T>* cursors, int64_t i0, int64_t i1,
                        const float* x, int64_t, float* sums) {
  const T* end = static_cast<const T*>(w.values) + w.nnz;
  for (int r = 0; r < R; ++r) {
    Vec acc[M];
    for (int m = 0; m < M; ++m) acc[m] = Vec::load(sums + (r * M + m) * Vec::kLanes);
    const T* v = cursors[r].v;
    for (int64_t i = i0; i < i1; ++i) {
      float row[kMaskColumns];
      if (kDense) {
        widen_columns(v, std::min(kMaskColumns, w.cols - i * kMaskColumns), row);
        v += kMaskColumns;
      } else {
        v = expand_columns(v, end, cursors[r].words + i, 1, row);
      }
      for (int64_t c = 0; c < kMaskColumns; c += Vec::kLanes) {
        const Vec a = Vec::load(row + c);
        const float* xc = x + (2 * i + c / 32) * M * 32 + c % 32;
        for (int m = 0; m < M; ++m) acc[m] = Vec::fma(a, Vec::load(xc + 32 * m), acc[m]);
      }
    }
    cursors[r].v = v;
    for (int m = 0; m < M; ++m) acc[m].store(sums + (r * M + m) * Vec::kLanes);
  }
}

#endif

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
