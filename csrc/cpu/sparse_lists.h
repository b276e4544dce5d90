// Compressed rows without shuffles or gathers in the instruction set: the kept columns of a row are
// walked one by one, and each weight meets all rows of x, side by side in vectors. Zeros cost
// nothing, so a row takes as long as it keeps columns.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// sums[L] += words [i0, i1) of a row, whose values move on, times x [C, L]. Two chains: a sum alone
// would wait for itself.
template <class T, int L>
inline void multiply_lists(Cursor<T>& row, int64_t i0, int64_t i1, const float* x, float* sums) {
  float acc[2][L] = {};
  const T* v = row.v;
  const auto product = [&](float w, uint64_t word, const float* at, float* to) {
    at += __builtin_ctzll(word) * int64_t{L};
    for (int l = 0; l < L; ++l) to[l] += w * at[l];
  };
  for (int64_t i = i0; i < i1; ++i) {
    const float* at = x + i * kMaskColumns * L;
    uint64_t left = row.words[i];
    for (uint64_t next = left & (left - 1); left && next; next = left & (left - 1)) {
      product(to_float(v[0]), left, at, acc[0]);
      product(to_float(v[1]), next, at, acc[1]);
      left = next & (next - 1);
      v += 2;
    }
    if (left) product(to_float(*v++), left, at, acc[0]);
  }
  row.v = v;
  for (int l = 0; l < L; ++l) sums[l] += acc[0][l] + acc[1][l];
}

template <class T>
struct ColumnLists {
  using Value = T;
  static constexpr bool kDense = false;
  static constexpr int kChunk = 8;
  static constexpr int64_t kSums = kMostFewRows * kChunk;
  static constexpr int lanes(int m) { return m <= 2 ? m : m <= 4 ? 4 : 8; }
  static constexpr int side(int) { return 1; }

  // x as [C, lanes], zeros past C and m.
  template <class X>
  static void pack(const X* x, int64_t stride, int64_t m, int64_t cols, float* out) {
    const int64_t width = lanes(static_cast<int>(m)), padded = mask_words(cols) * kMaskColumns;
    std::fill(out, out + padded * width, 0.0f);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = 0; c < cols; ++c) out[c * width + i] = to_float(x[i * stride + c]);
  }
  template <int M>
  [[gnu::noinline]] static void multiply(const Weights& w, Cursor<T>* cursors, int64_t count,
                                         const float* x, int64_t, FetchAhead&, float* sums) {
    constexpr int L = lanes(M);
    const int64_t n = mask_words(w.cols), piece = M <= 2 ? n : piece_words(L);
    std::fill(sums, sums + count * L, 0.0f);
    for (int64_t i0 = 0; i0 < n; i0 += piece)
      for (int64_t r = 0; r < count; ++r)
        multiply_lists<T, L>(cursors[r], i0, std::min(n, i0 + piece), x, sums + r * L);
  }
  template <class X>
  static void store(const float* sums, int64_t count, int64_t m, const float* scales,
                    const float* bias, X* y, int64_t y_stride) {
    store_transposed(sums, lanes(static_cast<int>(m)), count, m, scales, bias, y, y_stride);
  }
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
