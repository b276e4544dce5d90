// Many rows of x: W is decoded a tile at a time into a first-level cache's worth of floats and
// multiplied there as a matrix.
//
// x is packed once: [C / kDepth][panels][kDepth][kPanelTokens], tokens side by side, so that one
// broadcast weight meets whole vectors of tokens. A tile of kTileRows x kDepth weights stays row
// major, as the decoder writes it. Accumulators are vectors of tokens; every output is one chain of
// fused multiply-adds over the columns, whatever the number of threads.
#pragma once

#include <algorithm>

#include "cpu/sparse_rows.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Accumulators that leave room in the register file for a broadcast and the token vectors:
// 24 of 32, 12 of 16; a portable Vec takes two registers.
#if defined(__AVX512F__)
constexpr int kSums = 24;
#elif defined(__AVX2__)
constexpr int kSums = 12;
#else
constexpr int kSums = 6;
#endif
constexpr int kPanelVectors = 3;
constexpr int kPanelTokens = kPanelVectors * Vec::kLanes;

// Columns of a tile: a panel of x is then 24 KB (AVX-512), half of the first-level cache.
constexpr int64_t kDepth = 128;
constexpr int64_t kDepthWords = kDepth / kMaskColumns;
constexpr int64_t kTileRows = 48;
static_assert(kTileRows % kSums == 0, "whole strips, whatever the number of token vectors");
// Rows of a tile would otherwise start in the same few cache sets.
constexpr int64_t kTileStride = kDepth + 16;

// Rows of x that one sweep over W serves; bounds the packed copy of x and a tile's sums.
constexpr int64_t kMaxTokens = 480;
static_assert(kMaxTokens % kPanelTokens == 0, "whole panels");

inline int64_t panels_of(int64_t tokens) { return (tokens + kPanelTokens - 1) / kPanelTokens; }
inline int64_t depths_of(int64_t cols) { return (cols + kDepth - 1) / kDepth; }

// Panel p of columns [k0, k0 + kDepth), zeros outside x.
template <class T, class X>
void pack_tokens(const X* x, int64_t stride, int64_t tokens, int64_t cols, int64_t k0, int64_t p,
                 float* panel) {
  const int64_t t0 = p * kPanelTokens, width = std::min<int64_t>(kPanelTokens, tokens - t0);
  const int64_t depth = std::min(kDepth, cols - k0);
  if (depth < kDepth || width < kPanelTokens) std::fill(panel, panel + kDepth * kPanelTokens, 0.0f);
  // Sixteen columns of every token in turn: both sides then stay within few cache lines.
  for (int64_t c0 = 0; c0 < depth; c0 += 16) {
    const int64_t c1 = std::min<int64_t>(depth, c0 + 16);
    for (int64_t t = 0; t < width; ++t) {
      const X* row = x + (t0 + t) * stride + k0;
      for (int64_t c = c0; c < c1; ++c)
        panel[column_place<T>(c) * kPanelTokens + t] = to_float(row[c]);
    }
  }
}

// The second level answers within some 15 cycles, one step of the loop takes 12: eight steps ahead
// hides that and leaves room for its queue. The next strip's weights are fetched a strip ahead.
constexpr int64_t kAhead = 8;
constexpr int64_t kLineFloats = 16;

// sums[strip rows][kVectors] += tile rows times one panel's first kVectors vectors of tokens.
template <int kVectors>
inline void strip(const float* tile, const float* panel, float* sums, int64_t sums_stride) {
  constexpr int kRows = kSums / kVectors;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = Vec::load(sums + r * sums_stride + v * Vec::kLanes);
  for (int64_t k0 = 0; k0 < kDepth; k0 += kLineFloats) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(tile + (kRows + r) * kTileStride + k0);
    for (int64_t k = k0; k < k0 + kLineFloats; ++k) {
      const float* tokens = panel + k * kPanelTokens;
      Vec t[kVectors];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) {
        __builtin_prefetch(tokens + kAhead * kPanelTokens + v * Vec::kLanes);
        t[v] = Vec::load(tokens + v * Vec::kLanes);
      }
#pragma GCC unroll 24
      for (int r = 0; r < kRows; ++r) {
        const Vec w = Vec::set1(tile[r * kTileStride + k]);
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec::fma(w, t[v], acc[r][v]);
      }
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[r][v].store(sums + r * sums_stride + v * Vec::kLanes);
}

template <int kVectors>
void strips(const float* tile, const float* panel, float* sums, int64_t sums_stride) {
  constexpr int kRows = kSums / kVectors;
  for (int64_t r = 0; r < kTileRows; r += kRows)
    strip<kVectors>(tile + r * kTileStride, panel, sums + r * sums_stride, sums_stride);
}

// One tile of decoded weights times every token.
inline void multiply_tile(const float* tile, const float* packed, int64_t tokens, float* sums) {
  const int64_t panels = panels_of(tokens), stride = panels * kPanelTokens;
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = packed + p * kDepth * kPanelTokens;
    float* out = sums + p * kPanelTokens;
    const int64_t left = tokens - p * kPanelTokens;
    if (left > 2 * Vec::kLanes)
      strips<3>(tile, panel, out, stride);
    else if (left > Vec::kLanes)
      strips<2>(tile, panel, out, stride);
    else
      strips<1>(tile, panel, out, stride);
  }
}

// Columns [i0, i1) (in words) of `count` rows from their cursors into a tile; rows past `count` and
// columns past i1 are zero. What lies `ahead` bytes further, the same columns of the next tile of
// rows, is fetched into the second level: the pieces are too short for the hardware to foresee.
template <class T, bool kDense>
void decode_tile(const Weights& w, Cursor<T>* cursors, int64_t count, int64_t i0, int64_t i1,
                 int64_t ahead, float* tile) {
  const T* end = static_cast<const T*>(w.values) + w.nnz;
  for (int64_t r = 0; r < kTileRows; ++r) {
    float* row = tile + r * kTileStride;
    int64_t filled = 0;
    if (r < count) {
      const char* before = reinterpret_cast<const char*>(cursors[r].v);
      filled = (i1 - i0) * kMaskColumns;
      if (kDense) {
        widen_columns(cursors[r].v, std::min(filled, w.cols - i0 * kMaskColumns), row);
        cursors[r].v += filled;
      } else {
        cursors[r].v = expand_columns(cursors[r].v, end, cursors[r].words + i0, i1 - i0, row);
      }
      for (; before < reinterpret_cast<const char*>(cursors[r].v); before += 64)
        __builtin_prefetch(before + ahead, 0, 2);
    }
    std::fill(row + filled, row + kDepth, 0.0f);
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
