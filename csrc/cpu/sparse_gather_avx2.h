// 2:4 with a few rows of x on AVX2: x is gathered instead of W being spread. A group of four
// columns of x is half of a register, and two bits of metadata are the index that a shuffle within
// that half takes (vpermilps reads the lowest two bits of each lane), so eight stored values meet
// the eight activations they belong to after two shuffles and a blend.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int64_t kPieceColumns = 32;  // four bytes of metadata, 16 values, four vectors of x

// Rows of x up to which gathering for each costs less than spreading W (which int8 makes dearer).
template <class T>
constexpr int kMostGatherRows = sizeof(T) == 1 ? 3 : 2;

// Where column c of 16 goes: groups 0 and 2, then groups 1 and 3, so that the values of a pair of
// groups come from the same half of two vectors.
inline int64_t gather_place(int64_t c) { return (c & 3) + ((c & 8) >> 1) + ((c & 4) << 1); }

// x as [C / 32][M][32] floats, zeros past C.
template <class X>
void pack_gather(const X* x, int64_t stride, int64_t m, int64_t cols, float* out) {
  for (int64_t c = 0; c < cols; c += kPieceColumns)
    for (int64_t i = 0; i < m; ++i, out += kPieceColumns) {
      const X* row = x + i * stride + c;
      if (c + kPieceColumns <= cols) {
        for (int64_t j = 0; j < kPieceColumns; j += 16) {
          const __m256 a = Vec::load(row + j).v, b = Vec::load(row + j + 8).v;
          _mm256_store_ps(out + j, _mm256_permute2f128_ps(a, b, 0x20));
          _mm256_store_ps(out + j + 8, _mm256_permute2f128_ps(a, b, 0x31));
        }
      } else {
        for (int64_t j = 0; j < kPieceColumns; ++j)
          out[(j & 16) + gather_place(j & 15)] = c + j < cols ? to_float(row[j]) : 0.0f;
      }
    }
}

// Rows of W side by side: as many as their sums leave registers for.
constexpr int gather_side(int m) { return m <= 2 ? 4 : 2; }

// sums[R][M] += pieces [p0, p1) of R rows, whose values and metadata begin there, times M rows of
// x.
template <class T, int M, int R>
inline void gather_pieces(const T* const* values, const uint8_t* const* meta, int64_t p0,
                          int64_t p1, const float* x, int64_t ahead, __m256 (&sums)[R][M]) {
  const __m256i low = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256i high = _mm256_add_epi32(low, _mm256_set1_epi32(16));
  // Copies: `sums` are in memory, where each product would wait for the store of the one before.
  __m256 acc[R][M];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) acc[r][m] = sums[r][m];
#pragma GCC unroll 1
  for (int64_t p = p0; p < p1; ++p)
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      __m256 even[M], odd[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        const float* at = x + (p * M + m) * kPieceColumns + 16 * h;
        even[m] = _mm256_load_ps(at), odd[m] = _mm256_load_ps(at + 8);
      }
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const T* v = values[r] + 16 * (p - p0) + 8 * h;
        int32_t codes;
        std::memcpy(&codes, meta[r] + 4 * (p - p0), 4);
        const __m256i kept = _mm256_srlv_epi32(_mm256_set1_epi32(codes), h ? high : low);
        const __m256 w = load8(v).v;
        if (h || sizeof(T) == 4)
          _mm_prefetch(reinterpret_cast<const char*>(v) + ahead, _MM_HINT_T1);
#pragma GCC unroll 4
        for (int m = 0; m < M; ++m) {
          const __m256 picked = _mm256_blend_ps(_mm256_permutevar_ps(even[m], kept),
                                                _mm256_permutevar_ps(odd[m], kept), 0b11001100);
          acc[r][m] = _mm256_fmadd_ps(w, picked, acc[r][m]);
        }
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) sums[r][m] = acc[r][m];
}

// Rows [r0, r0 + R) of the output. `ahead`: bytes from a value to one that is fetched meanwhile.
template <class T, int M, int R, class X>
void gather_rows(const SparseLinearArgs& a, const Weights& w, int64_t r0, const float* x,
                 int64_t ahead) {
  const T* values[R];
  const uint8_t* meta[R];
  for (int r = 0; r < R; ++r) {
    values[r] = static_cast<const T*>(w.values) + w.begin(r0 + r);
    meta[r] = w.meta + (r0 + r) * w.meta_stride;
  }
  __m256 acc[R][M];
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) acc[r][m] = _mm256_setzero_ps();
  const int64_t whole = w.cols / kPieceColumns, left = w.cols % kPieceColumns;
  gather_pieces<T, M, R>(values, meta, 0, whole, x, ahead, acc);
  if (left) {  // copied, so that nothing past the matrix is read
    T last[R][16] = {};
    uint8_t codes[R][4] = {};
    for (int r = 0; r < R; ++r) {
      std::copy_n(values[r] + 16 * whole, left / 2, last[r]);
      std::copy_n(meta[r] + 4 * whole, left / 8, codes[r]);
      values[r] = last[r], meta[r] = codes[r];
    }
    gather_pieces<T, M, R>(values, meta, whole, whole + 1, x, 0, acc);
  }
  const float* bias = a.bias ? a.bias->ptr<const float>() : nullptr;
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m)
      store(a.y.ptr<X>() + m * w.rows + r0 + r,
            Vec{acc[r][m]}.sum() * (a.scales ? a.scales[r0 + r] : 1.0f) +
                (bias ? bias[r0 + r] : 0.0f));
}

// T: bf16, f16, fp32, or int8 with scales.
template <class T, class X>
void run_gather_avx2(const SparseLinearArgs& a, const Weights& w) {
  const int64_t rows = a.x.shape[0];
  Scratch scratch(rows * mask_words(w.cols) * kMaskColumns * 4);
  float* x = scratch.as<float>();
  pack_gather(a.x.ptr<const X>(), a.x.stride[0], rows, w.cols, x);
  with_rows<kMostGatherRows<T>>(rows, [&](auto count) {
    constexpr int M = decltype(count)::value, R = gather_side(M);
    // Some rows share x in the first-level cache; what the next ones hold is fetched meanwhile.
    const int64_t ahead = R * (w.cols / 2) * static_cast<int64_t>(sizeof(T));
    const int64_t turns = w.rows / R;
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t g = 0; g < turns; ++g) {
      prefetch_meta(w, (g + 1) * R, R);
      gather_rows<T, M, R, X>(a, w, g * R, x, ahead);
    }
    for (int64_t r = turns * R; r < w.rows; ++r) gather_rows<T, M, 1, X>(a, w, r, x, 0);
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
