// Many rows of x, but for compressed W with AVX2 (sparse_panels.h): W is decoded a tile at a time
// into a first-level cache's worth of floats, or of pairs of bf16, and multiplied there as a matrix
// (tile_words.h has what both hold). Accumulators are vectors of tokens; every output is one chain
// of fused multiply-adds over the words, whatever the number of threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "cpu/amx.h"
#include "cpu/sparse_run.h"
#include "cpu/tile_words.h"
#include "huge_pages.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// The second level answers within some 15 cycles, one step of the loop takes 12: eight steps ahead
// hides that and leaves room for its queue. The next strip's weights are fetched a strip ahead.
constexpr int64_t kAhead = 8;
constexpr int64_t kLineFloats = 16;

// What is fetched into the second level while a tile is multiplied: all at once, while the next is
// decoded, it would queue. Either the rows of the next tile, so many lines of each; or, without
// lines, what a stream is planned for: the next rows of W in the order in which they are stored. A
// tile of a bitmap has few and uneven lines a row: with 16 and 32 rows of x, 8192 x 4096 at 50 %,
// the stream takes 0.8 and 0.85 of the time (one Zen 4 core, busy).
struct NextTile {
  const char* row[kTileRows];
  int64_t lines;
  FetchAhead stream;
};

// sums[strip rows][kVectors] += `depth` words of tile rows times one panel's first kVectors vectors
// of tokens.
template <class As, int kVectors>
inline void strip(const float* tile, const float* panel, int64_t depth, const char* const* next,
                  int64_t lines, FetchAhead* stream, float* sums, int64_t sums_stride) {
  constexpr int kRows = kSums / kVectors;
  Vec acc[kRows][kVectors];
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = Vec::load(sums + r * sums_stride + v * Vec::kLanes);
  if constexpr (As::kBlocks) As::rows_to_blocks(acc);
  for (int64_t k0 = 0; k0 < depth; k0 += kLineFloats) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(tile + (kRows + r) * kTileStride + k0);
    for (int64_t line = k0 / kLineFloats; line < lines; line += depth / kLineFloats)
      for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + 64 * line, 0, 2);
    for (int64_t k = k0; k < k0 + kLineFloats; k += As::kStep) {
      if (stream) stream->step();
      const float* tokens = panel + k * kPanelTokens;
      if constexpr (As::kBlocks) {
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v)
          __builtin_prefetch(tokens + kAhead * kPanelTokens + 2 * v * Vec::kLanes);
        As::multiply(tile + 2 * k, tokens, acc);
      } else {
        Vec t[kVectors];
#pragma GCC unroll 3
        for (int v = 0; v < kVectors; ++v) {
          __builtin_prefetch(tokens + kAhead * kPanelTokens + v * Vec::kLanes);
          t[v] = Vec::load(tokens + v * Vec::kLanes);
        }
#pragma GCC unroll 24
        for (int r = 0; r < kRows; ++r) {
          const float* w = tile + r * kTileStride + k;
          if constexpr (kVectors == 1) {
            acc[r][0] = As::product(w, t[0], acc[r][0]);
          } else {
            const Vec all = Vec::set1(*w);
#pragma GCC unroll 3
            for (int v = 0; v < kVectors; ++v) acc[r][v] = As::product(all, t[v], acc[r][v]);
          }
        }
      }
    }
  }
  if constexpr (As::kBlocks) As::blocks_to_rows(acc);
#pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) acc[r][v].store(sums + r * sums_stride + v * Vec::kLanes);
}

template <class As, int kVectors>
void strips(const float* tile, const float* panel, int64_t rows, int64_t depth, NextTile& next,
            bool first, float* sums, int64_t sums_stride) {
  constexpr int kRows = kSums / kVectors;
  FetchAhead* stream = first && !next.lines ? &next.stream : nullptr;
  for (int64_t r = 0; r < rows; r += kRows)
    strip<As, kVectors>(tile + r * kTileStride, panel, depth, next.row + r, first ? next.lines : 0,
                        stream, sums + r * sums_stride, sums_stride);
}

// One tile of decoded weights, `depth` words wide, times every token.
template <class As>
void multiply_tile(const float* tile, const float* packed, int64_t rows, int64_t depth,
                   int64_t tokens, NextTile& next, float* sums) {
  const int64_t panels = panels_of(tokens), stride = panels * kPanelTokens;
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = packed + p * kDepth * kPanelTokens;
    float* out = sums + p * kPanelTokens;
    const int64_t left = tokens - p * kPanelTokens;
    if (left > 2 * Vec::kLanes)
      strips<As, 3>(tile, panel, rows, depth, next, p == 0, out, stride);
    else if (left > Vec::kLanes)
      strips<As, 2>(tile, panel, rows, depth, next, p == 0, out, stride);
    else
      strips<As, 1>(tile, panel, rows, depth, next, p == 0, out, stride);
  }
}

// Steps of a strip, over which fetching is spread, that the tile's rows take with one panel.
template <class As>
int64_t steps_of_panel(int64_t rows, int64_t tokens, int64_t depth) {
  const int64_t strip_rows =
      kSums / ((std::min<int64_t>(tokens, kPanelTokens) + Vec::kLanes - 1) / Vec::kLanes);
  return rows / strip_rows * (depth / As::kStep);
}

#if defined(__AVX512F__)

// multiply_tile() of bf16 pairs by AMX; `rows` are 32 or 48.
inline void multiply_tile_amx(const float* tile, const float* packed, int64_t rows, int64_t depth,
                              int64_t tokens, NextTile& next, float* sums) {
  static_assert(kTileRows == 3 * kAmxRows && kPanelTokens == 3 * kAmxWords);
  const int64_t panels = panels_of(tokens), stride = panels * kPanelTokens;
  const int64_t parts = depth / kAmxWords;
  // The first block of the first panel fetches all that is to be fetched, part by part.
  const int64_t steps = next.lines ? 0 : steps_of_panel<AsPairs>(rows, tokens, depth) / parts;
  int64_t part = 0;
  const auto fetch = [&] {
    if (part == parts) return;
    for (int64_t line = part; line < next.lines; line += parts)
      for (int64_t r = 0; r < rows; ++r) __builtin_prefetch(next.row[r] + 64 * line, 0, 2);
    for (int64_t i = 0; i < steps; ++i) next.stream.step();
    ++part;
  };
  const auto block = [&](auto r, auto v, const float* x, float* out) {
    amx_block<decltype(r)::value, decltype(v)::value>(tile, kTileStride, kAmxWords, x, kPanelTokens,
                                                      depth, out, stride, fetch);
  };
  const auto blocks = [&](auto v, const float* x, float* out) {
    if (rows == 3 * kAmxRows)
      block(std::integral_constant<int, 3>(), v, x, out);
    else
      block(std::integral_constant<int, 2>(), v, x, out);
  };
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  for (int64_t p = 0; p < panels; ++p) {
    const float* panel = packed + p * kDepth * kPanelTokens;
    float* out = sums + p * kPanelTokens;
    const int64_t left = tokens - p * kPanelTokens;
    if (left <= kAmxWords) {
      blocks(kOne, panel, out);
      continue;
    }
    blocks(kTwo, panel, out);
    if (left > 2 * kAmxWords) blocks(kOne, panel + 2 * kAmxWords, out + 2 * kAmxWords);
  }
}

#endif

// Columns [i0, i1) (in words) of `count` rows from their cursors into a tile of `rows`; those past
// `count` are zero. What lies `ahead` bytes further, the same columns of the next tile of
// rows, is fetched into the second level: the pieces are too short for the hardware to foresee.
template <class As, bool kDense>
void decode_tile(const Weights& w, Cursor<typename As::Value>* cursors, int64_t count, int64_t rows,
                 int64_t i0, int64_t i1, float* tile) {
  using T = typename As::Value;
  const T* end = static_cast<const T*>(w.values) + w.nnz;
  for (int64_t r = 0; r < rows; ++r) {
    float* row = As::row(tile, r);
    const int64_t columns = (i1 - i0) * kMaskColumns;
    if (r >= count) {
      if constexpr (As::kBlocks)
        As::clear(row, columns);
      else
        std::fill(row, row + tile_depth<As>(columns), 0.0f);
    } else if constexpr (kDense) {
      As::widen(cursors[r].take(columns), std::min(columns, w.cols - i0 * kMaskColumns), row);
    } else {
      cursors[r].v = As::expand(cursors[r].v, end, cursors[r].words + i0, i1 - i0, row);
    }
  }
}

// Two tiles' rows of W, those multiplied and those fetched, stay in a second level of 1 MiB, beside
// x and the sums.
constexpr int64_t kStreamedBytes = 384 * 1024;

// Whether W is fetched as a stream: a bitmap of which half a tile's rows fit.
template <class As>
bool streams(const Weights& w) {
  constexpr int64_t kBytes = sizeof(typename As::Value);
  return (As::kPairs || As::kBlocks) && w.format == WeightFormat::bitmap &&
         kTileRows / 2 * w.nnz * kBytes / w.rows <= kStreamedBytes;
}

// Rows of a tile, a whole number of strips; of a bitmap fewer where it would be too wide.
template <class As>
int64_t tile_rows(const Weights& w, bool amx) {
  constexpr int64_t kBytes = sizeof(typename As::Value);
  const bool wide = kTileRows * w.nnz * kBytes / w.rows > kStreamedBytes;
  return !streams<As>(w) || !wide ? kTileRows : amx ? kNarrowAmxRows : kNarrowRows;
}
static_assert(kNarrowRows % kSums == 0, "whole strips of a narrow tile too");

struct TileScratch {
  float* tile;      // [kTileRows][kTileStride]
  float* sums;      // [kTileRows][tokens, rounded up to panels]
  uint64_t* words;  // [kTileRows][mask_words]
  bool amx;         // whether it multiplies
};

// What is fetched while a tile is multiplied, of which the next has `rows` rows from row r on; the
// tokens of the first panel decide how many steps that takes.
template <class As>
void plan_fetching(const Weights& w, int64_t r, int64_t rows, int64_t tokens, NextTile& next) {
  constexpr int64_t kBytes = sizeof(typename As::Value);
  const int64_t depths = depths_of<As>(w.cols);
  if (streams<As>(w)) {
    const auto row_at = [&](int64_t i) {
      return static_cast<const char*>(w.values) + kBytes * w.begin_within(std::min(i, w.rows));
    };
    next.lines = 0;
    next.stream.plan(row_at(r), row_at(r + rows),
                     depths * steps_of_panel<As>(rows, tokens, kDepth));
  } else {
    // Rows of a bitmap differ in length: the mean and a line more.
    next.lines = w.nnz * kBytes / (w.rows * depths * 64) + 2;
  }
}

// Rows [r0, r0 + count) of W, of a tile of `rows`, times all tokens of the packed x; false when a
// row is inconsistent.
template <class As, bool kDense>
bool multiply_rows(const Weights& w, int64_t r0, int64_t count, int64_t rows, const float* packed,
                   int64_t tokens, NextTile& next, const TileScratch& s,
                   std::atomic<int64_t>* broken) {
  using T = typename As::Value;
  constexpr int64_t kWords = As::kColumns / kMaskColumns;
  const int64_t n = mask_words(w.cols), stride = panels_of(tokens) * kPanelTokens;
  Cursor<T> cursors[kTileRows];
  if constexpr (kDense) {
    for (int64_t r = 0; r < count; ++r) cursors[r] = Cursor<T>::at(w, r0 + r, nullptr);
  } else {
    if (!begin_rows(w, r0, count, s.words, cursors, broken)) return false;
  }
  prefetch_meta(w, r0 + rows, rows);
  std::fill(s.sums, s.sums + rows * stride, 0.0f);
  const int64_t depths = depths_of<As>(w.cols);
  plan_fetching<As>(w, r0 + rows, rows, tokens, next);
  for (int64_t d = 0; d < depths; ++d) {
    const int64_t i0 = d * kWords, i1 = std::min(n, i0 + kWords);
    decode_tile<As, kDense>(w, cursors, count, rows, i0, i1, s.tile);
    // The same rows further on, or the first columns of the next ones.
    for (int64_t r = 0; next.lines && r < rows; ++r) {
      const T* first =
          static_cast<const T*>(w.values) + w.begin_within(std::min(r0 + rows + r, w.rows - 1));
      next.row[r] =
          reinterpret_cast<const char*>(d + 1 < depths && r < count ? cursors[r].v : first);
    }
    const float* x = packed + d * kDepth * stride;
    const int64_t depth = tile_depth<As>((i1 - i0) * kMaskColumns);
#if defined(__AVX512F__)
    if (As::kBf16 && s.amx) {
      multiply_tile_amx(s.tile, x, rows, depth, tokens, next, s.sums);
      continue;
    }
#endif
    multiply_tile<As>(s.tile, x, rows, depth, tokens, next, s.sums);
  }
  return end_rows(cursors, r0, count, broken);
}

template <class As>
bool uses_amx() {
#if defined(__AVX512F__)
  return As::kBf16 && current_isa() >= Isa::avx512_amx;
#else
  return false;
#endif
}

template <class As, bool kDense, class X>
void multiply(const SparseLinearArgs& a, const Weights& w, int64_t t0, int64_t tokens,
              float* packed, float* scratch, std::atomic<int64_t>* broken) {
  const int64_t panels = panels_of(tokens), depths = depths_of<As>(w.cols);
  const int64_t n = mask_words(w.cols);
  const int64_t tile_floats = kTileRows * kTileStride;
  const int64_t sum_floats = kTileRows * panels * kPanelTokens;
  const int64_t floats = tile_floats + sum_floats + kTileRows * n * 2;
  const bool amx = uses_amx<As>();
  const int64_t rows = tile_rows<As>(w, amx), tiles = (w.rows + rows - 1) / rows;
  const X* x = a.x.ptr<const X>() + t0 * a.x.stride[0];
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < depths * panels; ++i)
      pack_tokens<As>(x, a.x.stride[0], tokens, w.cols, i / panels * As::kColumns, i % panels,
                      packed + i * kDepth * kPanelTokens);
    float* mine = scratch + omp_get_thread_num() * floats;
    const TileScratch s{mine, mine + tile_floats,
                        reinterpret_cast<uint64_t*>(mine + tile_floats + sum_floats), amx};
    NextTile next;
#if defined(__AVX512F__)
    const AmxTiles configured(amx);
#endif
#pragma omp for schedule(static)
    for (int64_t g = 0; g < tiles; ++g) {
      const int64_t r0 = g * rows, count = std::min(rows, w.rows - r0);
      if (multiply_rows<As, kDense>(w, r0, count, rows, packed, tokens, next, s, broken))
        store_transposed(s.sums, panels * kPanelTokens, count, tokens,
                         a.scales ? a.scales + r0 : nullptr,
                         a.bias ? a.bias->ptr<const float>() + r0 : nullptr,
                         a.y.ptr<X>() + t0 * w.rows + r0, w.rows);
    }
  }
}

template <class As, class X>
void run_multiply(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  prefer_huge_pages(a.y, sizeof(X));
  const int64_t m = a.x.shape[0], most = std::min(m, kMaxTokens);
  const int64_t wide = panels_of(most) * kPanelTokens;
  const int64_t packed_floats = depths_of<As>(w.cols) * kDepth * wide;
  const int64_t thread_floats = kTileRows * (kTileStride + wide + 2 * mask_words(w.cols));
  Scratch scratch((packed_floats + a.threads * thread_floats) * 4);
  float* packed = scratch.as<float>();
  for (int64_t t0 = 0; t0 < m; t0 += kMaxTokens) {
    const int64_t tokens = std::min(kMaxTokens, m - t0);
    if (w.format == WeightFormat::dense)
      multiply<As, true, X>(a, w, t0, tokens, packed, packed + packed_floats, broken);
    else if constexpr (As::kExpands)
      multiply<As, false, X>(a, w, t0, tokens, packed, packed + packed_floats, broken);
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
