// The register tile that gram, fisher_accumulate and the trailing updates of the OBS solves share:
// products of packed panels, C[M, N] += A^T B, with A and B packed alike.
//
// A panel holds kPanel columns of an operand for up to kDepth values of the contracted index k,
// k-major: element (k, c) at panel[k * kPanel + c], columns past the operand's edge zero.
//
//        b panel   kPanel = 3 vectors wide            panel_product(a, b, depth, m, n, store)
//        +-----------------+                          computes the m x n block, m, n <= kPanel,
//   a    | strip 0: kStrip |  kStrip x 3 vectors      a strip of kStrip rows at a time:
//   panel| strip 1         |  accumulate in           store(row, column vectors, values) gets each
//        | ...             |  registers over depth    finished strip and adds it where it belongs.
//        +-----------------+
//
// AVX-512: 8 x 48 = 24 accumulators, and 11 loads for 24 multiply-adds, so the two multipliers and
// not the two load ports set the pace. AVX2: 4 x 24 in 12 of 16 registers, NEON: in 24 of 32.
// Both operands use one packed form (kStrip divides kPanel), so a Gram matrix packs its input once.
//
// Every element is one fixed chain of fused multiply-adds over k, in order: which thread computes
// it, and with how many, changes nothing.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int kPanelVecs = 3;
constexpr int kPanel = kPanelVecs * Vec::kLanes;
#if defined(__AVX2__) || defined(PYPRUNE_NEON)
constexpr int kStrip = Vec::kLanes / 2;
#else
constexpr int kStrip = 2;  // a baseline x86-64 has 16 registers of 4 lanes: 12 hold the tile
#endif
static_assert(kPanel % kStrip == 0, "a strip of A never straddles two panels");

// Length of a packed chunk: how many products a strip sums in registers before it goes to memory.
// The panels then stream from the second-level cache (16 bytes a cycle), which costs less than
// passing over C more often: 512 took 10 % less time than 128 at 2048 columns.
constexpr int64_t kDepth = 512;
constexpr int64_t kPanelFloats = kPanel * kDepth;

// How many k ahead the tile's operands are prefetched: some 100 cycles, a second-level hit's time
// twice over. The load ports have room for it.
constexpr int kAhead = 8;

// Chunks of `panels` packed panels each that are held at a time, a round: 1 MB, so that a core's
// second-level cache keeps them; for many panels one chunk.
inline int64_t round_chunks(int64_t panels, int64_t tokens) {
  const int64_t cached = (int64_t{1} << 18) / (panels * kPanelFloats);
  return std::min(std::max<int64_t>(cached, 1), (tokens + kDepth - 1) / kDepth);
}

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

// Uninitialised floats on a cache line boundary.
struct AlignedFree {
  void operator()(float* p) const { std::free(p); }
};
using FloatBuffer = std::unique_ptr<float[], AlignedFree>;

inline FloatBuffer float_buffer(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  auto* p = static_cast<float*>(std::aligned_alloc(64, bytes ? bytes : 64));
  if (p == nullptr) throw std::bad_alloc();
  return FloatBuffer(p);
}

// Where the operand's rows (values of k) lie.
template <class T>
struct RowSource {
  const T* data;
  int64_t row_stride;             // elements; unit stride along the columns
  const int64_t* rows = nullptr;  // gather these rows; null: rows 0, 1, 2, ...
  const float* scale = nullptr;   // multiply row r by scale[r]; null: by one
  int64_t columns = 0;
  bool ones_column = false;  // a virtual column of ones (times the scale) follows the last
};

// Packs columns [c0, c0 + kPanel) of rows k0 .. k0 + depth - 1 of the source's row list.
template <class T>
inline void pack_panel(const RowSource<T>& src, int64_t k0, int64_t depth, int64_t c0,
                       float* panel) {
  const int width = static_cast<int>(std::clamp<int64_t>(src.columns - c0, 0, kPanel));
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const int64_t r = src.rows ? src.rows[k0 + k] : k0 + k;
    const T* row = src.data + r * src.row_stride + c0;
    // Rows lie too far apart for the processor to see the pattern. Past the end is harmless.
    for (int c = 0; c < kPanel; c += 64 / sizeof(T))
      __builtin_prefetch(row + kAhead * src.row_stride + c);
    const float s = src.scale ? src.scale[r] : 1.0f;
    if (width == kPanel) {
      for (int v = 0; v < kPanelVecs; ++v) {
        const Vec x = Vec::load(row + v * Vec::kLanes);
        (src.scale ? x * Vec::set1(s) : x).store(panel + v * Vec::kLanes);
      }
      continue;
    }
    for (int c = 0; c < width; ++c) panel[c] = to_float(row[c]) * s;
    for (int c = width; c < kPanel; ++c) panel[c] = 0.0f;
    if (src.ones_column && c0 + width == src.columns) panel[width] = s;
  }
}

// The same panel from an operand stored the other way round: a[c, k] with unit stride along k,
// `columns` rows of it.
inline void pack_panel_transposed(const float* a, int64_t stride, int64_t columns, int64_t depth,
                                  float* panel) {
  for (int c = 0; c < kPanel; ++c) {
    const float* row = a + c * stride;
    if (c < columns)
      for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + c] = row[k];
    else
      for (int64_t k = 0; k < depth; ++k) panel[k * kPanel + c] = 0.0f;
  }
}

// One strip: kStrip rows of A^T times kVecs vectors of B's panel. On the way the strip fetches its
// share of `next`, the panel of A that usually follows, into the second-level cache.
template <int kVecs>
inline void strip_product(const float* __restrict a, const float* __restrict b, const float* next,
                          int64_t depth, Vec (&sum)[kStrip][kVecs]) {
  // Not in `sum` itself: callers may address it, and GCC then stores vectors of two registers
  // (NEON) at every step.
  Vec acc[kStrip][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec::zero();
  for (int64_t k = 0; k < depth; ++k, a += kPanel, b += kPanel, next += kStrip) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(a + kAhead * kPanel);
    Vec bv[kVecs];
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) __builtin_prefetch(b + kAhead * kPanel + v * Vec::kLanes);
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) bv[v] = Vec::load(b + v * Vec::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i) {
      const Vec av = Vec::set1(a[i]);
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec::fma(av, bv[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) sum[i][v] = acc[i][v];
}

// Rows [row, row + kStrip) of a block and the kVecs vectors of columns that start at `column`; what
// lies outside `m` x `n` is zero and must not be written.
// Not inlined: the compiler then gives the loop all registers whatever surrounds the call.
template <int kVecs, class Store>
[[gnu::noinline]] void strip_block(const float* a, const float* b, int64_t depth, int row,
                                   int column, int m, int n, const Store& store) {
  Vec sum[kStrip][kVecs];
  for (int i = 0; i < std::min(kStrip, m - row); ++i) store.prefetch(row + i, column);
  strip_product<kVecs>(a + row, b + column, a + kPanelFloats + row * depth, depth, sum);
  if (row + kStrip <= m && column + kVecs * Vec::kLanes <= n) {
#pragma GCC unroll 8
    for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < kVecs; ++v)
        store(row + i, column + v * Vec::kLanes, Vec::kLanes, sum[i][v]);
    return;
  }
  for (int i = 0; i < std::min(kStrip, m - row); ++i)
    for (int v = 0; v < kVecs; ++v) {
      const int c = column + v * Vec::kLanes;
      if (c < n) store(row + i, c, std::min(Vec::kLanes, n - c), sum[i][v]);
    }
}

// The m x n block A^T B of two packed panels. `upper`: only what the upper triangle needs (row <=
// column), plus the part of a vector or strip that crosses the diagonal.
//   store(int row, int column, int lanes, Vec value): value's first `lanes` belong to the block at
//   (row, column ..).
template <class Store>
inline void panel_product(const float* a, const float* b, int64_t depth, int m, int n, bool upper,
                          const Store& store) {
  const int last = (n + Vec::kLanes - 1) / Vec::kLanes;  // vectors that hold any column
  for (int row = 0; row < m; row += kStrip) {
    const int first = upper ? row / Vec::kLanes : 0, column = first * Vec::kLanes;
    if (last - first >= 3)
      strip_block<3>(a, b, depth, row, column, m, n, store);
    else if (last - first == 2)
      strip_block<2>(a, b, depth, row, column, m, n, store);
    else if (last - first == 1)
      strip_block<1>(a, b, depth, row, column, m, n, store);
  }
}

// The lines of one row of a block, fetched for writing while its strip is being computed.
inline void prefetch_row(const float* p) {
  for (int j = 0; j < kPanel; j += 16) __builtin_prefetch(p + j, 1);
  __builtin_prefetch(p + kPanel - 1, 1);
}

// c[row, column ..] += value and -= value, for panel_product.
struct AddTo {
  float* c;
  int64_t ldc;
  void prefetch(int row, int column) const { prefetch_row(c + row * ldc + column); }
  void operator()(int row, int column, int lanes, Vec value) const {
    float* p = c + row * ldc + column;
    if (lanes == Vec::kLanes) return (Vec::load(p) + value).store(p);
    float tail[Vec::kLanes];
    value.store(tail);
    for (int j = 0; j < lanes; ++j) p[j] += tail[j];
  }
};

struct SubtractFrom {
  float* c;
  int64_t ldc;
  void prefetch(int row, int column) const { prefetch_row(c + row * ldc + column); }
  void operator()(int row, int column, int lanes, Vec value) const {
    float* p = c + row * ldc + column;
    if (lanes == Vec::kLanes) return (Vec::load(p) - value).store(p);
    float tail[Vec::kLanes];
    value.store(tail);
    for (int j = 0; j < lanes; ++j) p[j] -= tail[j];
  }
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
