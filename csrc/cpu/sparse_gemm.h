// Many rows of x: W is decoded a tile at a time into a first-level cache's worth of floats, or of
// pairs of bf16, and multiplied there as a matrix.
//
// Both are words of 32 bits: one column in fp32, or two neighbouring columns in bf16, which one
// vdpbf16ps multiplies and adds. x is packed once: [words / kDepth][panels][kDepth][kPanelTokens],
// tokens side by side, so that one broadcast word of W meets whole vectors of tokens. A tile of
// kTileRows x kDepth words stays row major, as the decoder writes it. Accumulators are vectors of
// tokens; every output is one chain of fused multiply-adds over the words, whatever the number of
// threads.
//
// With NEON pairs of bf16 are multiplied in blocks (pairs_neon.h) of two rows by two tokens by two
// words: two rows of a tile lie together, two words of one and two of the other, and so do tokens
// in a panel, [words / 2][kPanelTokens][2].
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"
#include "huge_pages.h"
#if defined(PYPRUNE_NEON)
#include "cpu/pairs_neon.h"
#endif

namespace pyprune {
namespace PYPRUNE_ISA {

// Accumulators that leave room in the register file for a broadcast and the token vectors:
// 24 of 32, 12 of 16; a Vec of NEON takes two registers, as does a portable one.
#if defined(__AVX512F__)
constexpr int kSums = 24;
#elif defined(__AVX2__) || defined(PYPRUNE_NEON)
constexpr int kSums = 12;
#else
constexpr int kSums = 6;
#endif
constexpr int kPanelVectors = 3;
constexpr int kPanelTokens = kPanelVectors * Vec::kLanes;

// Words of a tile's row: a panel of x is then 24 KB (AVX-512), three quarters of the smallest
// first-level cache.
constexpr int64_t kDepth = 128;
constexpr int64_t kTileRows = 48;
static_assert(kTileRows % kSums == 0, "whole strips, whatever the number of token vectors");
// Rows of a tile would otherwise start in the same few cache sets.
constexpr int64_t kTileStride = kDepth + 16;

// Rows of x that one sweep over W serves; bounds the packed copy of x and a tile's sums.
constexpr int64_t kMaxTokens = 576;
static_assert(kMaxTokens % kPanelTokens == 0, "whole panels");

inline int64_t panels_of(int64_t tokens) { return (tokens + kPanelTokens - 1) / kPanelTokens; }

// How a tile lies: where row r of it begins. kStep words are multiplied at a time.
struct RowsApart {
  static constexpr bool kBlocks = false;
  static constexpr int64_t kStep = 1;
  static float* row(float* tile, int64_t r) { return tile + r * kTileStride; }
};

// Weights and activations as floats, a column a word.
template <class T>
struct AsFloats : RowsApart {
  using Value = T;
  static constexpr bool kExpands = true;       // compressed rows too
  static constexpr int64_t kColumns = kDepth;  // of a tile
  static Vec product(Vec w, Vec x, Vec sum) { return Vec::fma(w, x, sum); }
  static Vec product(const float* w, Vec x, Vec sum) { return Vec::fma(Vec::set1(*w), x, sum); }
  static constexpr bool kPairs = false;  // neighbouring columns in a word
  // Columns [c0, c1) of token t.
  template <class X>
  static void pack(const X* x, int64_t c0, int64_t c1, int64_t t, float* panel) {
    for (int64_t c = c0; c < c1; ++c) panel[column_place<T>(c) * kPanelTokens + t] = to_float(x[c]);
  }
  static void widen(const T* v, int64_t columns, float* row) { widen_columns(v, columns, row); }
  static const T* expand(const T* v, const T* end, const uint64_t* words, int64_t n, float* row) {
    return expand_columns(v, end, words, n, row);
  }
};

#if defined(__AVX512F__)

// bf16 weights and activations, two columns a word, for processors with AVX512_BF16 (assembly
// because this file is compiled for the common subset).
struct AsPairs : RowsApart {
  using Value = bf16;
  static constexpr bool kExpands = true;
  static constexpr int64_t kColumns = 2 * kDepth;
  static Vec product(Vec w, Vec x, Vec sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(w.v), "v"(x.v));
    return sum;
  }
  // Broadcast by the product itself: a broadcast of its own takes another pipe, 1.34 cycles instead
  // of 1.0 a product on Zen 4.
  static Vec product(const float* w, Vec x, Vec sum) {
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum.v) : "v"(x.v), "m"(*w));
    return sum;
  }
  static constexpr bool kPairs = true;
  static void widen(const bf16* v, int64_t columns, float* row) {
    for (int64_t c = 0; c < mask_words(columns) * kMaskColumns; c += 32) {
      const int64_t left = columns - c;
      const uint32_t valid = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
      _mm512_storeu_si512(row + c / 2, _mm512_maskz_loadu_epi16(valid, v + c));
    }
  }
  static const bf16* expand(const bf16* v, const bf16*, const uint64_t* words, int64_t n,
                            float* row) {
    for (int64_t i = 0; i < 2 * n; ++i) {
      const uint32_t keep = static_cast<uint32_t>(words[i / 2] >> (32 * (i & 1)));
      _mm512_storeu_si512(row + 16 * i, expand_words(keep, v));
      v += popcount(keep);
    }
    return v;
  }
};

#elif defined(PYPRUNE_NEON)

// bf16 activations and weights that are bf16 numbers, for processors with BF16.
template <class T>
struct AsBlocks {
  using Value = T;
  static constexpr bool kExpands = true;
  static constexpr int64_t kColumns = 2 * kDepth;
  static constexpr bool kBlocks = true, kPairs = false;
  static constexpr int64_t kStep = 2;
  static float* row(float* tile, int64_t r) { return tile + (r - r % 2) * kTileStride + r % 2 * 2; }
  static void clear(float* row, int64_t columns) {
    for (int64_t c = 0; c < columns; c += 8) EightPairs{vdupq_n_u16(0)}.store(row + c);
  }
  static void pack(const bf16* x, int64_t c0, int64_t c1, int64_t t, float* panel) {
    for (int64_t c = c0; c < c1; c += 4)
      std::memcpy(panel + c / 2 * kPanelTokens + 2 * t, x + c,
                  static_cast<size_t>(std::min<int64_t>(4, c1 - c)) * sizeof(bf16));
  }
  static void widen(const T* v, int64_t columns, float* row) {
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8) EightPairs::load(v + c).store(row + c);
    for (; c < mask_words(columns) * kMaskColumns; c += 8)
      spread_columns<EightPairs>(v + c, columns - c, 0xff).store(row + c);
  }
  static const T* expand(const T* v, const T* end, const uint64_t* words, int64_t n, float* row) {
    return expand_columns<EightPairs>(v, end, words, n, row);
  }
  template <int kRows, int kVectors>
  static void rows_to_blocks(Vec (&sums)[kRows][kVectors]) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) PYPRUNE_ISA::rows_to_blocks(sums[r][v], sums[r + 1][v]);
  }
  template <int kRows, int kVectors>
  static void blocks_to_rows(Vec (&sums)[kRows][kVectors]) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) PYPRUNE_ISA::blocks_to_rows(sums[r][v], sums[r + 1][v]);
  }
  template <int kRows, int kVectors>
  static void multiply(const float* w, const float* tokens, Vec (&sums)[kRows][kVectors]) {
    const auto block = [](const float* p) { return vreinterpretq_u16_f32(vld1q_f32(p)); };
    uint16x8_t rows[kRows / 2];
#pragma GCC unroll 12
    for (int r = 0; r < kRows / 2; ++r) rows[r] = block(w + 2 * r * kTileStride);
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) {
      const float* x = tokens + 16 * v;
      const uint16x8_t x0 = block(x), x1 = block(x + 4), x2 = block(x + 8), x3 = block(x + 12);
#pragma GCC unroll 12
      for (int r = 0; r < kRows / 2; ++r) {
        Vec &p = sums[2 * r][v], &q = sums[2 * r + 1][v];
        p = {multiply_block(rows[r], x0, p.a), multiply_block(rows[r], x1, p.b)};
        q = {multiply_block(rows[r], x2, q.a), multiply_block(rows[r], x3, q.b)};
      }
    }
  }
};

#endif

template <class As>
int64_t depths_of(int64_t cols) {
  return (cols + As::kColumns - 1) / As::kColumns;
}

// Words of a tile's row that hold `columns` of them: whole lines, as the decoders write them.
template <class As>
int64_t tile_depth(int64_t columns) {
  return mask_words(columns) * kMaskColumns * kDepth / As::kColumns;
}

// Panel p of columns [k0, k0 + As::kColumns), zeros outside x.
template <class As, class X>
void pack_tokens(const X* x, int64_t stride, int64_t tokens, int64_t cols, int64_t k0, int64_t p,
                 float* panel) {
  const int64_t t0 = p * kPanelTokens, width = std::min<int64_t>(kPanelTokens, tokens - t0);
  const int64_t depth = std::min(As::kColumns, cols - k0), words = tile_depth<As>(depth);
  const X* first = x + t0 * stride + k0;
  if constexpr (As::kPairs) {
    pack_pairs(first, stride, width, depth, words, kPanelTokens, panel);
  } else {
    if (depth < As::kColumns || width < kPanelTokens)
      std::fill(panel, panel + words * kPanelTokens, 0.0f);
    // Sixteen columns of every token in turn: both sides then stay within few cache lines.
    for (int64_t c0 = 0; c0 < depth; c0 += 16)
      for (int64_t t = 0; t < width; ++t)
        As::pack(first + t * stride, c0, std::min<int64_t>(depth, c0 + 16), t, panel);
  }
}

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

// Rows of a tile, a whole number of strips; of a bitmap half as many where it would be too wide.
template <class As>
int64_t tile_rows(const Weights& w) {
  constexpr int64_t kBytes = sizeof(typename As::Value);
  const bool wide = kTileRows * w.nnz * kBytes / w.rows > kStreamedBytes;
  return streams<As>(w) && wide ? kTileRows / 2 : kTileRows;
}
static_assert(kTileRows / 2 % kSums == 0, "whole strips of half a tile too");

struct TileScratch {
  float* tile;      // [kTileRows][kTileStride]
  float* sums;      // [kTileRows][tokens, rounded up to panels]
  uint64_t* words;  // [kTileRows][mask_words]
};

// What is fetched while a tile is multiplied, of which the next has `rows` rows from row r on; the
// first `tokens` of x, a panel's, decide how many steps that takes.
template <class As>
void plan_fetching(const Weights& w, int64_t r, int64_t rows, int64_t tokens, NextTile& next) {
  constexpr int64_t kBytes = sizeof(typename As::Value);
  const int64_t depths = depths_of<As>(w.cols);
  if (streams<As>(w)) {
    const auto row_at = [&](int64_t i) {
      return static_cast<const char*>(w.values) + kBytes * w.begin_within(std::min(i, w.rows));
    };
    const int64_t strip_rows = kSums / ((tokens + Vec::kLanes - 1) / Vec::kLanes);
    next.lines = 0;
    next.stream.plan(row_at(r), row_at(r + rows),
                     depths * (rows / strip_rows) * (kDepth / As::kStep));
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
  if (!kDense && !block_masks(w, r0, count, s.words, broken)) return false;
  Cursor<T> cursors[kTileRows];
  for (int64_t r = 0; r < count; ++r) cursors[r] = Cursor<T>::at(w, r0 + r, s.words + r * n);
  prefetch_meta(w, r0 + rows, rows);
  std::fill(s.sums, s.sums + rows * stride, 0.0f);
  const int64_t depths = depths_of<As>(w.cols);
  plan_fetching<As>(w, r0 + rows, rows, std::min<int64_t>(tokens, kPanelTokens), next);
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
    multiply_tile<As>(s.tile, packed + d * kDepth * stride, rows,
                      tile_depth<As>((i1 - i0) * kMaskColumns), tokens, next, s.sums);
  }
  for (int64_t r = 0; r < count; ++r)
    if (!cursors[r].complete()) return broken->store(r0 + r, std::memory_order_relaxed), false;
  return true;
}

template <class As, bool kDense, class X>
void multiply(const SparseLinearArgs& a, const Weights& w, int64_t t0, int64_t tokens,
              float* packed, float* scratch, std::atomic<int64_t>* broken) {
  const int64_t panels = panels_of(tokens), depths = depths_of<As>(w.cols);
  const int64_t n = mask_words(w.cols);
  const int64_t tile_floats = kTileRows * kTileStride;
  const int64_t sum_floats = kTileRows * panels * kPanelTokens;
  const int64_t floats = tile_floats + sum_floats + kTileRows * n * 2;
  const int64_t rows = tile_rows<As>(w), tiles = (w.rows + rows - 1) / rows;
  const X* x = a.x.ptr<const X>() + t0 * a.x.stride[0];
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < depths * panels; ++i)
      pack_tokens<As>(x, a.x.stride[0], tokens, w.cols, i / panels * As::kColumns, i % panels,
                      packed + i * kDepth * kPanelTokens);
    float* mine = scratch + omp_get_thread_num() * floats;
    const TileScratch s{mine, mine + tile_floats,
                        reinterpret_cast<uint64_t*>(mine + tile_floats + sum_floats)};
    NextTile next;
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
