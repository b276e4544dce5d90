// The tiles of sparse_gemm.h and the packed x that they meet: their sizes, what their words hold,
// how W is decoded and x packed into them.
//
// Words have 32 bits: one column in fp32, or two neighbouring columns in bf16. x is packed once:
// [words / kDepth][panels][kDepth][kPanelTokens], tokens side by side, so that one broadcast word
// of W meets whole vectors of tokens. A tile of kTileRows x kDepth words stays row major, as the
// decoder writes it.
//
// With NEON pairs of bf16 are multiplied in blocks (pairs_neon.h) of two rows by two tokens by two
// words: two rows of a tile lie together, two words of one and two of the other, and so do tokens
// in a panel, [words / 2][kPanelTokens][2].
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"
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
// The same for AMX, whose tiles have 16 rows, where kTileRows is too much; half as many otherwise.
constexpr int64_t kNarrowRows = kTileRows / 2, kNarrowAmxRows = 32;
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
  static constexpr bool kBf16 = false;   // words are pairs of bf16
  static constexpr bool kPairs = false;  // of neighbouring columns
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
  static constexpr bool kBf16 = true, kPairs = true;
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

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
