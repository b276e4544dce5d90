// Few rows of x: every row of W is read once from memory, decoded in registers and multiplied with
// all of them.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"
#if !defined(__AVX512F__) && !defined(PYPRUNE_SHUFFLES)
#include "cpu/sparse_lists.h"
#endif

namespace pyprune {
namespace PYPRUNE_ISA {

// Columns of x whose even ones precede their odd ones, as rows of T are decoded; 0: all in order.
template <class T, bool kDense>
constexpr int64_t decode_run() {
#if defined(PYPRUNE_SHUFFLES)
  return kDense && kDenseEvenOdd<T> ? 16 : 0;
#else
  return kEvenOdd<T> ? 32 : 0;
#endif
}

// `m` rows of x as the decode kernels read them: [C / 32][m][32] floats, zeros past C. One stream,
// whatever m is.
template <class T, bool kDense, class X>
void pack_decode(const X* x, int64_t stride, int64_t m, int64_t cols, float* out) {
  constexpr int64_t kRun = decode_run<T, kDense>();
  const int64_t padded = mask_words(cols) * kMaskColumns;
  for (int64_t c = 0; c < padded; c += 32)
    for (int64_t i = 0; i < m; ++i, out += 32) {
      const X* row = x + i * stride + c;
      X last[32] = {};
      if (c + 32 > cols) {
        std::copy_n(row, std::max<int64_t>(cols - c, 0), last);
        row = last;
      }
      if constexpr (kRun == 0) {
        for (int64_t j = 0; j < 32; ++j) out[j] = to_float(row[j]);
      } else {
        for (int64_t g = 0; g < 32; g += kRun)
          for (int64_t j = 0; j < kRun / 2; ++j) {
            out[g + j] = to_float(row[g + 2 * j]);
            out[g + kRun / 2 + j] = to_float(row[g + 2 * j + 1]);
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
                        const float* x, int64_t ahead, FetchAhead& fetch, float* sums) {
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
      if (kDense) _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
    }
    if (!kDense && half) fetch.step();
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

#elif defined(PYPRUNE_SHUFFLES)

template <class T, bool kDense, int M, int R>
inline void decode_rows(const Weights& w, Cursor<T>* cursors, int64_t i0, int64_t i1,
                        const float* x, int64_t ahead, FetchAhead& fetch, float* sums) {
  RowsAt<T, R> rows = {{}, {}, static_cast<const T*>(w.values) + w.nnz, w.cols};
  for (int r = 0; r < R; ++r) rows.v[r] = cursors[r].v, rows.masks[r] = cursors[r].words;
  multiply_words<T, kDense, kDense, 32, M>(rows, i0, i1, x, ahead, &fetch, sums);
  for (int r = 0; r < R; ++r) cursors[r].v = rows.v[r];
}

constexpr int side_by_side(int m) { return rows_of_a_turn(m); }

#else

// Dense rows only: compressed ones have sparse_lists.h.
template <class T, bool kDense, int M, int R>
inline void decode_rows(const Weights& w, Cursor<T>* cursors, int64_t i0, int64_t i1,
                        const float* x, int64_t, FetchAhead&, float* sums) {
  static_assert(kDense);
  for (int r = 0; r < R; ++r) {
    Vec acc[M];
    for (int m = 0; m < M; ++m) acc[m] = Vec::load(sums + (r * M + m) * Vec::kLanes);
    for (int64_t i = i0; i < i1; ++i) {
      float row[kMaskColumns];
      widen_columns(cursors[r].take(kMaskColumns),
                    std::min(kMaskColumns, w.cols - i * kMaskColumns), row);
      for (int64_t c = 0; c < kMaskColumns; c += Vec::kLanes) {
        const Vec a = Vec::load(row + c);
        const float* xc = x + (2 * i + c / 32) * M * 32 + c % 32;
        for (int m = 0; m < M; ++m) acc[m] = Vec::fma(a, Vec::load(xc + 32 * m), acc[m]);
      }
    }
    for (int m = 0; m < M; ++m) acc[m].store(sums + (r * M + m) * Vec::kLanes);
  }
}

constexpr int side_by_side(int m) { return m <= 4 ? 4 : 2; }

#endif

// Rows of W as vectors of columns, each with a sum for every row of x.
template <class T, bool kRowsDense>
struct ColumnVectors {
  using Value = T;
  static constexpr bool kDense = kRowsDense;
#if defined(PYPRUNE_SHUFFLES)
  static constexpr int kChunk = 6;  // two rows of W then have all registers for their sums
#else
  static constexpr int kChunk = 8;
#endif
  static constexpr int64_t kSums = kMostFewRows * kChunk * Vec::kLanes;
  static constexpr int lanes(int m) { return m; }
  static constexpr int side(int m) { return side_by_side(m); }

  template <class X>
  static void pack(const X* x, int64_t stride, int64_t m, int64_t cols, float* out) {
    pack_decode<T, kDense>(x, stride, m, cols, out);
  }
  // Not inlined: it is compiled once for all dtypes of x, which only packing and storing know.
  template <int M>
  [[gnu::noinline]] static void multiply(const Weights& w, Cursor<T>* cursors, int64_t count,
                                         const float* x, int64_t ahead, FetchAhead& fetch,
                                         float* sums) {
    const int64_t n = mask_words(w.cols);
    std::fill(sums, sums + count * M * Vec::kLanes, 0.0f);
    // For one or two rows of x all of it is a piece.
    const int64_t piece = M <= 2 ? n : piece_words(M);
    for (int64_t i0 = 0; i0 < n; i0 += piece) {
      const int64_t i1 = std::min(n, i0 + piece);
      int64_t r = 0;
      for (; r + side(M) <= count; r += side(M))
        decode_rows<T, kDense, M, side(M)>(w, cursors + r, i0, i1, x, ahead, fetch,
                                           sums + r * M * Vec::kLanes);
      for (; r < count; ++r)
        decode_rows<T, kDense, M, 1>(w, cursors + r, i0, i1, x, ahead, fetch,
                                     sums + r * M * Vec::kLanes);
    }
  }
  template <class X>
  static void store(const float* sums, int64_t count, int64_t m, const float* scales,
                    const float* bias, X* y, int64_t y_stride) {
    store_outputs(sums, count, m, scales, bias, y, y_stride);
  }
};

#if defined(__AVX512F__) || defined(PYPRUNE_SHUFFLES)
template <class T>
using CompressedRows = ColumnVectors<T, false>;
#else
template <class T>
using CompressedRows = ColumnLists<T>;
#endif

// Rows [r0, r0 + count) of the output. x is `packed`, a chunk every `stride` floats.
template <class Kernel, class X>
void decode_outputs(const SparseLinearArgs& a, const Weights& w, int64_t r0, int64_t count,
                    const Chunks& chunks, const float* packed, int64_t stride, uint64_t* words,
                    FetchAhead& fetch, float* sums, std::atomic<int64_t>* broken) {
  using T = typename Kernel::Value;
  Cursor<T> begins[kMostFewRows];
  if (!begin_rows(w, r0, count, words, begins, broken)) return;
  const int64_t n = mask_words(w.cols), side = Kernel::side(static_cast<int>(chunks.rows(0)));
  const auto row_at = [&](int64_t r) {
    return static_cast<const char*>(w.values) +
           static_cast<int64_t>(sizeof(T)) * w.begin_within(std::min(r, w.rows));
  };
  const char* const end = row_at(r0 + count);
  fetch.plan(end, row_at(r0 + 2 * count), (count / side + count % side) * n * chunks.count);
  for (int64_t c = 0; c < chunks.count; ++c) {
    Cursor<T> cursors[kMostFewRows];
    std::copy_n(begins, count, cursors);
    const int64_t m0 = chunks.begin(c), m = chunks.rows(c);
    with_rows<Kernel::kChunk>(m, [&](auto rows) {
      Kernel::template multiply<decltype(rows)::value>(w, cursors, count, packed + c * stride,
                                                       c == 0 ? end - row_at(r0) : 0, fetch, sums);
    });
    if (!end_rows(cursors, r0, count, broken)) return;
    Kernel::store(sums, count, m, a.scales ? a.scales + r0 : nullptr,
                  a.bias ? a.bias->ptr<const float>() + r0 : nullptr,
                  a.y.ptr<X>() + m0 * w.rows + r0, w.rows);
  }
}

template <class Kernel, class X>
void run_rows(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int64_t m = a.x.shape[0], n = mask_words(w.cols);
  const Chunks chunks(m, Kernel::kChunk);
  const int64_t block = m <= 2              ? few_rows_block(w.rows, w.cols, a.threads)
                        : chunks.count <= 2 ? kMostFewRows / 2
                                            : kMostFewRows;
  const int64_t blocks = (w.rows + block - 1) / block;
  const int64_t stride = Kernel::lanes(static_cast<int>(chunks.rows(0))) * n * kMaskColumns;
  const int64_t x_floats = chunks.count * stride;
  Scratch scratch((x_floats + a.threads * Kernel::kSums) * 4 + a.threads * kMostFewRows * n * 8);
  float* packed = scratch.as<float>();
  float* sums = packed + x_floats;
  uint64_t* words = reinterpret_cast<uint64_t*>(sums + a.threads * Kernel::kSums);
  const X* x = a.x.ptr<const X>();
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks.count; ++c)
      Kernel::pack(x + chunks.begin(c) * a.x.stride[0], a.x.stride[0], chunks.rows(c), w.cols,
                   packed + c * stride);
    float* mine = sums + omp_get_thread_num() * Kernel::kSums;
    uint64_t* masks = words + omp_get_thread_num() * kMostFewRows * n;
    FetchAhead fetch;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < blocks; ++g) {
      const int64_t r0 = g * block, count = std::min(block, w.rows - r0);
      if (!Kernel::kDense) prefetch_meta(w, r0 + block, block);
      decode_outputs<Kernel, X>(a, w, r0, count, chunks, packed, stride, masks, fetch, mine,
                                broken);
    }
  }
}

// Rows of x that one sweep over W serves; bounds its packed copy.
constexpr int64_t kSweepRows = 512;

// T: bf16, f16, fp32. Any number of rows of x.
template <class T, class X>
void run_decode(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  for (int64_t m0 = 0; m0 < a.x.shape[0]; m0 += kSweepRows) {
    SparseLinearArgs part = a;
    part.x.data = a.x.ptr<X>() + m0 * a.x.stride[0];
    part.x.shape[0] = std::min(kSweepRows, a.x.shape[0] - m0);
    part.y.data = a.y.ptr<X>() + m0 * w.rows;
    if (w.format == WeightFormat::dense)
      run_rows<ColumnVectors<T, true>, X>(part, w, broken);
    else
      run_rows<CompressedRows<T>, X>(part, w, broken);
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
