// Few rows of x: every row of W is read once, decoded in registers and multiplied with all of them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"

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
    __m512 a[R], b[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint32_t keep =
          kDense ? valid : static_cast<uint32_t>(cursors[r].words[i] >> (32 * half));
      const auto c = kDense ? Columns32<T>::load(v[r], keep) : Columns32<T>::expand(v[r], keep);
      a[r] = c.a, b[r] = c.b;
      v[r] += kDense ? 32 : popcount(keep);
      if (kDense || sizeof(T) == 4 || half)
        _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float* xm = x + ((2 * i + half) * M + m) * 32;
      __m512 xa = _mm512_loadu_ps(xm), xb = _mm512_loadu_ps(xm + 16);
      // Into registers, once for all rows: as operands of the products these would be as many loads
      // again, and a core may have one of 64 bytes a cycle.
      if (R > 1) asm volatile("" : "+v"(xa), "+v"(xb));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        acc[r][m] = _mm512_fmadd_ps(a[r], xa, acc[r][m]);
        acc[r][m] = _mm512_fmadd_ps(b[r], xb, acc[r][m]);
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

// Rows of W that one turn of the kernel decodes side by side: as many as their M sums each leave
// registers for.
constexpr int side_by_side(int m) { return m <= 4 ? 4 : 2; }

#elif defined(__AVX2__)

template <class T, bool kDense, int M, int R>
inline void decode_rows(const Weights& w, Cursor<T>* cursors, int64_t i0, int64_t i1,
                        const float* x, int64_t ahead, float* sums) {
  RowsAt<T, R> rows = {{}, {}, static_cast<const T*>(w.values) + w.nnz, w.cols};
  for (int r = 0; r < R; ++r) rows.v[r] = cursors[r].v, rows.masks[r] = cursors[r].words;
  multiply_words<T, kDense, 32, M>(rows, i0, i1, x, ahead, sums);
  for (int r = 0; r < R; ++r) cursors[r].v = rows.v[r];
}

constexpr int side_by_side(int m) { return rows_of_a_turn(m); }

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

constexpr int side_by_side(int m) { return m <= 4 ? 4 : 2; }

#endif

// Rows of W that share a piece of x small enough for the first-level cache. For one or two rows of
// x all of it is.
constexpr int block_rows(int m) { return m <= 2 ? side_by_side(m) : 16; }
constexpr int kMaxBlockRows = 16;
constexpr int64_t kPieceBytes = 24 * 1024;

struct DecodeScratch {
  const float* x;
  uint64_t* words;  // [threads][kMaxBlockRows][mask_words]
  float* sums;      // [threads][kMaxBlockRows][kMaxDecodeRows][Vec::kLanes]
  std::atomic<int64_t>* broken;
};

// Rows [r0, r0 + count) times all M rows of x; the sums are left as vectors.
template <class T, bool kDense, int M>
void decode_block(const Weights& w, int64_t r0, int64_t count, const float* x, uint64_t* words,
                  float* sums) {
  constexpr int kSide = side_by_side(M), kBlock = block_rows(M);
  const int64_t n = mask_words(w.cols);
  Cursor<T> cursors[kBlock];
  for (int64_t r = 0; r < count; ++r)
    cursors[r] = {static_cast<const T*>(w.values) + w.begin(r0 + r), words + r * n};
  std::fill(sums, sums + count * M * Vec::kLanes, 0.0f);
  const int64_t ahead = (w.begin_within(std::min(r0 + kBlock, w.rows - 1)) - w.begin(r0)) *
                        static_cast<int64_t>(sizeof(T));
  const int64_t piece = M <= 2 ? n : std::max<int64_t>(1, kPieceBytes / (kMaskColumns * 4 * M));
  for (int64_t i0 = 0; i0 < n; i0 += piece) {
    const int64_t i1 = std::min(n, i0 + piece);
    int64_t r = 0;
    for (; r + kSide <= count; r += kSide)
      decode_rows<T, kDense, M, kSide>(w, cursors + r, i0, i1, x, ahead,
                                       sums + r * M * Vec::kLanes);
    for (; r < count; ++r)
      decode_rows<T, kDense, M, 1>(w, cursors + r, i0, i1, x, ahead, sums + r * M * Vec::kLanes);
  }
}

template <class T, bool kDense, int M, class X>
void decode(const SparseLinearArgs& a, const Weights& w, const DecodeScratch& scratch) {
  constexpr int kBlock = block_rows(M);
  const int64_t n = mask_words(w.cols), blocks = (w.rows + kBlock - 1) / kBlock;
  const float* bias = a.bias ? a.bias->ptr<const float>() : nullptr;
  X* y = a.y.ptr<X>();
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t g = 0; g < blocks; ++g) {
    const int64_t r0 = g * kBlock, count = std::min<int64_t>(kBlock, w.rows - r0);
    const int thread = omp_get_thread_num();
    uint64_t* words = scratch.words + thread * kMaxBlockRows * n;
    float* sums = scratch.sums + thread * kMaxBlockRows * kMaxDecodeRows * Vec::kLanes;
    if (!kDense) {
      prefetch_meta(w, r0 + kBlock, kBlock);
      if (!block_masks(w, r0, count, words, scratch.broken)) continue;
    }
    decode_block<T, kDense, M>(w, r0, count, scratch.x, words, sums);
    for (int64_t r = 0; r < count; ++r)
      for (int m = 0; m < M; ++m)
        store(y + m * w.rows + r0 + r, Vec::load(sums + (r * M + m) * Vec::kLanes).sum() *
                                               (a.scales ? a.scales[r0 + r] : 1.0f) +
                                           (bias ? bias[r0 + r] : 0.0f));
  }
}

template <class T, class X>
void run_decode(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int64_t m = a.x.shape[0], n = mask_words(w.cols);
  const int64_t x_floats = m * n * kMaskColumns;
  const int64_t sum_floats = a.threads * kMaxBlockRows * kMaxDecodeRows * Vec::kLanes;
  Scratch scratch((x_floats + sum_floats) * 4 + a.threads * kMaxBlockRows * n * 8);
  float* x = scratch.as<float>();
  const DecodeScratch s{x, reinterpret_cast<uint64_t*>(x + x_floats + sum_floats), x + x_floats,
                        broken};
  pack_decode<T>(a.x.ptr<const X>(), a.x.stride[0], m, w.cols, x);
  with_rows<kMaxDecodeRows>(m, [&](auto rows) {
    constexpr int M = decltype(rows)::value;
    if (w.format == WeightFormat::dense)
      decode<T, true, M, X>(a, w, s);
    else
      decode<T, false, M, X>(a, w, s);
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
