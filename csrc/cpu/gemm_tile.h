// The register tile that gram, fisher_accumulate and the trailing updates of the OBS solves share:
// products of packed panels, C[M, N] += A^T B, with A and B packed alike.
//
// A panel holds kPanel columns of an operand for up to kDepth words of the contracted index k,
// k-major: word (k, c) at panel[k * kPanel + c], columns past the operand's edge zero. A word is a
// number in fp32, or two neighbouring ones along k in bf16, of which one instruction adds up both
// products (FloatWords, PairWords).
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
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/simd.h"
#include "cpu/strip.h"
#if defined(PYPRUNE_NEON)
#include "cpu/pairs_neon.h"
#endif

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
inline int64_t round_chunks(int64_t panels, int64_t words) {
  const int64_t cached = (int64_t{1} << 18) / (panels * kPanelFloats);
  return std::min(std::max<int64_t>(cached, 1), (words + kDepth - 1) / kDepth);
}

// Words that hold `count` numbers along the contracted index.
template <class Words>
int64_t words_of(int64_t count) {
  return (count + Words::kNumbers - 1) / Words::kNumbers;
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

  int64_t number(int64_t k) const { return rows ? rows[k] : k; }
  const T* row(int64_t k) const { return data + number(k) * row_stride; }
  // Columns of the panel that starts at c0; and whether that of ones is in it.
  int64_t width(int64_t c0) const { return std::clamp<int64_t>(columns - c0, 0, kPanel); }
  bool has_ones(int64_t c0) const { return ones_column && c0 <= columns && columns < c0 + kPanel; }
};

// Packs columns [c0, c0 + kPanel) of rows k0 .. k0 + depth - 1 of the source's row list.
template <class T>
inline void pack_panel(const RowSource<T>& src, int64_t k0, int64_t depth, int64_t c0,
                       float* panel) {
  const int width = static_cast<int>(src.width(c0));
  for (int64_t k = 0; k < depth; ++k, panel += kPanel) {
    const T* row = src.row(k0 + k) + c0;
    // Rows lie too far apart for the processor to see the pattern. Past the end is harmless.
    for (int c = 0; c < kPanel; c += 64 / sizeof(T))
      __builtin_prefetch(row + kAhead * src.row_stride + c);
    const float s = src.scale ? src.scale[src.number(k0 + k)] : 1.0f;
    if (width == kPanel) {
      for (int v = 0; v < kPanelVecs; ++v) {
        const Vec x = Vec::load(row + v * Vec::kLanes);
        (src.scale ? x * Vec::set1(s) : x).store(panel + v * Vec::kLanes);
      }
      continue;
    }
    for (int c = 0; c < width; ++c) panel[c] = to_float(row[c]) * s;
    for (int c = width; c < kPanel; ++c) panel[c] = 0.0f;
    if (src.has_ones(c0)) panel[width] = s;
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

// Numbers as fp32, one a word. A Scope is what a thread that multiplies holds.
struct FloatWords {
  struct Scope {};
  static constexpr int64_t kNumbers = 1;
  static constexpr int kStep = 1;         // words of a column that lie together
  static constexpr bool kOneForm = true;  // of A's panels and B's
  static Vec product(Vec a, Vec b, Vec sum) { return Vec::fma(a, b, sum); }
  template <class T>
  static void pack(const RowSource<T>& src, int64_t k0, int64_t count, int64_t c0, float* panel) {
    pack_panel(src, k0, count, c0, panel);
  }
};

#if defined(__AVX512F__)

// bf16 as it is, two rows a word: twice the products an instruction, for processors with
// AVX512_BF16 (assembly because this file is compiled for the common subset). Their products are
// exact in fp32; subnormal numbers (below 1.2e-38) are taken for zero.
struct PairWords {
  struct Scope {};
  static constexpr int64_t kNumbers = 2;
  static constexpr int kStep = 1;
  static constexpr bool kOneForm = true;
  static Vec product(Vec a, Vec b, Vec sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.v) : "v"(a.v), "v"(b.v));
    return sum;
  }
  static void pack(const RowSource<bf16>& src, int64_t k0, int64_t count, int64_t c0,
                   float* panel) {
    const int64_t width = src.width(c0);
    const bool ones = src.has_ones(c0);
    const auto row = [&](int64_t k) { return src.row(k0 + k) + c0; };
    for (int64_t k = 0; k < count; k += 2, panel += kPanel) {
      const bool second = k + 1 < count;
      const bf16 *even = row(k), *odd = second ? row(k + 1) : even;
      for (int c = 0; c < kPanel; c += 32) {
        __builtin_prefetch(even + kAhead * src.row_stride + c);
        __builtin_prefetch(odd + kAhead * src.row_stride + c);
      }
      for (int v = 0; v < kPanelVecs; ++v) {
        const int64_t left = std::clamp<int64_t>(width - 16 * v, 0, 16);
        const auto columns = static_cast<__mmask16>((1u << left) - 1);
        const auto take = [&](const bf16* p, bool there) {
          const __mmask16 lanes = there ? columns : __mmask16{0};
          return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p + 16 * v));
        };
        const __m512i high = _mm512_slli_epi32(take(odd, second), 16);
        _mm512_store_si512(panel + 16 * v, _mm512_or_si512(take(even, true), high));
      }
      if (ones) {
        constexpr uint32_t kOne = 0x3f80;
        const uint32_t word = second ? kOne << 16 | kOne : kOne;
        std::memcpy(panel + src.columns - c0, &word, 4);
      }
    }
  }
};

// The same for AMX. B's panels are as above, up to a multiple of 16 words; A's go 16 words at a
// time, column by column: [words / 16][kPanel][16].
struct AmxWords {
  struct Scope {
    AmxTiles tiles{true};
  };
  static constexpr int64_t kNumbers = PairWords::kNumbers;
  static constexpr bool kOneForm = false;
  static constexpr int64_t kStepNumbers = kAmxWords * kNumbers;
  static_assert(kPanel == 3 * kAmxWords && kDepth % kAmxWords == 0);

  static int64_t padded(int64_t words) { return (words + kAmxWords - 1) / kAmxWords * kAmxWords; }
  static void pack(const RowSource<bf16>& src, int64_t k0, int64_t count, int64_t c0,
                   float* panel) {
    const int64_t words = (count + kNumbers - 1) / kNumbers;
    PairWords::pack(src, k0, count, c0, panel);
    std::fill(panel + words * kPanel, panel + padded(words) * kPanel, 0.0f);
  }
  static void pack_left(const RowSource<bf16>& src, int64_t k0, int64_t count, int64_t c0,
                        float* panel) {
    alignas(64) float step[kAmxWords * kPanel];
    for (int64_t k = 0; k < count; k += kStepNumbers, panel += kAmxWords * kPanel) {
      pack(src, k0 + k, std::min(kStepNumbers, count - k), c0, step);
      for (int c = 0; c < kPanel; c += kAmxWords)
        transpose_tile(step + c, kPanel, panel + c * kAmxWords, kAmxWords);
    }
  }
};

#elif defined(PYPRUNE_NEON)

// bf16 as it is, for processors with BF16 (pairs_neon.h): two words of a column lie together, so
// that two columns are a block, [words / 2][kPanel][2].
struct BlockWords {
  struct Scope {};
  static constexpr int64_t kNumbers = 2;
  static constexpr int kStep = 2;
  static constexpr bool kOneForm = true;
  static constexpr int64_t kStepNumbers = kStep * kNumbers;

  static void pack(const RowSource<bf16>& src, int64_t k0, int64_t count, int64_t c0,
                   float* panel) {
    const int64_t width = src.width(c0);
    const bool ones = src.has_ones(c0);
    const auto row = [&](int64_t k) { return src.row(k0 + k) + c0; };
    auto* out = reinterpret_cast<bf16*>(panel);
    for (int64_t k = 0; k < count; k += kStepNumbers, out += kStepNumbers * kPanel) {
      const int64_t there = std::min(kStepNumbers, count - k);
      if (there == kStepNumbers && width == kPanel) {
        const bf16 *r0 = row(k), *r1 = row(k + 1), *r2 = row(k + 2), *r3 = row(k + 3);
        const auto eight = [](const bf16* p) { return vld1q_u16(&p->bits); };
        for (int c = 0; c < kPanel; c += 8)
          vst4q_u16(&out[kStepNumbers * c].bits,
                    {{eight(r0 + c), eight(r1 + c), eight(r2 + c), eight(r3 + c)}});
        continue;
      }
      std::fill(out, out + kStepNumbers * kPanel, bf16{0});
      for (int64_t i = 0; i < there; ++i) {
        for (int64_t c = 0; c < width; ++c) out[kStepNumbers * c + i] = row(k + i)[c];
        if (ones) out[kStepNumbers * width + i] = {0x3f80};
      }
    }
  }
};

#endif

// One strip: kStrip rows of A^T times kVecs vectors of B's panel. On the way the strip fetches its
// share of `next`, the panel of A that usually follows, into the second-level cache.
template <class Words, int kVecs>
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
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Words::product(av, bv[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) sum[i][v] = acc[i][v];
}

#if defined(PYPRUNE_NEON)

// The same of blocks.
template <int kVecs>
inline void strip_product_blocks(const float* __restrict a, const float* __restrict b,
                                 const float* next, int64_t depth, Vec (&sum)[kStrip][kVecs]) {
  static_assert(kStrip == 4 && Vec::kLanes == 8);
  const auto block = [](const float* p) { return vreinterpretq_u16_f32(vld1q_f32(p)); };
  constexpr int64_t kNext = BlockWords::kStep * kPanel;
  Vec acc[kStrip][kVecs];
#pragma GCC unroll 4
  for (int i = 0; i < kStrip; ++i)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) acc[i][v] = Vec::zero();
  for (int64_t k = 0; k < depth;
       k += BlockWords::kStep, a += kNext, b += kNext, next += 2 * kStrip) {
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(a + kAhead * kPanel);
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) __builtin_prefetch(b + kAhead * kPanel + 16 * v);
    const uint16x8_t first = block(a), second = block(a + 4);
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      const uint16x8_t x0 = block(b + 16 * v), x1 = block(b + 16 * v + 4);
      const uint16x8_t x2 = block(b + 16 * v + 8), x3 = block(b + 16 * v + 12);
      Vec &p = acc[0][v], &q = acc[1][v], &r = acc[2][v], &s = acc[3][v];
      p = {multiply_block(first, x0, p.a), multiply_block(first, x1, p.b)};
      q = {multiply_block(first, x2, q.a), multiply_block(first, x3, q.b)};
      r = {multiply_block(second, x0, r.a), multiply_block(second, x1, r.b)};
      s = {multiply_block(second, x2, s.a), multiply_block(second, x3, s.b)};
    }
  }
#pragma GCC unroll 2
  for (int i = 0; i < kStrip; i += 2)
#pragma GCC unroll 3
    for (int v = 0; v < kVecs; ++v) {
      blocks_to_rows(acc[i][v], acc[i + 1][v]);
      sum[i][v] = acc[i][v], sum[i + 1][v] = acc[i + 1][v];
    }
}

#endif

// Rows [row, row + kStrip) of a block and the kVecs vectors of columns that start at `column`; what
// lies outside `m` x `n` is zero and must not be written.
// Not inlined: the compiler then gives the loop all registers whatever surrounds the call.
template <class Words, int kVecs, class Store>
[[gnu::noinline]] void strip_block(const float* a, const float* b, int64_t depth, int row,
                                   int column, int m, int n, const Store& store) {
  Vec sum[kStrip][kVecs];
  for (int i = 0; i < std::min(kStrip, m - row); ++i) store.prefetch(row + i, column);
  const float* next = a + kPanelFloats + row * depth;
#if defined(PYPRUNE_NEON)
  if constexpr (Words::kStep > 1)
    strip_product_blocks<kVecs>(a + Words::kStep * row, b + Words::kStep * column, next, depth,
                                sum);
  else
#endif
    strip_product<Words, kVecs>(a + row, b + column, next, depth, sum);
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

// panel_product() strip by strip.
template <class Words, class Store>
inline void panel_by_strips(const float* a, const float* b, int64_t depth, int m, int n, bool upper,
                            const Store& store) {
  const int last = (n + Vec::kLanes - 1) / Vec::kLanes;  // vectors that hold any column
  for (int row = 0; row < m; row += kStrip) {
    const int first = upper ? row / Vec::kLanes : 0, column = first * Vec::kLanes;
    if (last - first >= 3)
      strip_block<Words, 3>(a, b, depth, row, column, m, n, store);
    else if (last - first == 2)
      strip_block<Words, 2>(a, b, depth, row, column, m, n, store);
    else if (last - first == 1)
      strip_block<Words, 1>(a, b, depth, row, column, m, n, store);
  }
}

#if defined(__AVX512F__)

// panel_product() by AMX, which has a form of its own for A's panels.
template <class Store>
inline void panel_by_amx(const float* a, const float* b, int64_t depth, int m, int n, bool upper,
                         const Store& store) {
  alignas(64) float sums[kPanel * kPanel] = {};
  const int64_t words = AmxWords::padded(depth);
  const auto block = [&](auto vectors, int column) {
    amx_block<3, decltype(vectors)::value>(a, kAmxWords, kAmxWords * kPanel, b + column, kPanel,
                                           words, sums + column, kPanel, [] {});
  };
  for (int row = 0; row < m; ++row) store.prefetch(row, 0);
  if (n > kAmxWords)
    block(std::integral_constant<int, 2>(), 0);
  else
    block(std::integral_constant<int, 1>(), 0);
  if (n > 2 * kAmxWords) block(std::integral_constant<int, 1>(), 2 * kAmxWords);
  for (int row = 0; row < m; ++row)
    for (int column = upper ? row / Vec::kLanes * Vec::kLanes : 0; column < n;
         column += Vec::kLanes)
      store(row, column, std::min(Vec::kLanes, n - column),
            Vec::load(sums + row * kPanel + column));
}

#endif

// The m x n block A^T B of two packed panels. `upper`: only what the upper triangle needs (row <=
// column), plus the part of a vector or strip that crosses the diagonal.
//   store(int row, int column, int lanes, Vec value): value's first `lanes` belong to the block at
//   (row, column ..).
template <class Words, class Store>
inline void panel_product(const float* a, const float* b, int64_t depth, int m, int n, bool upper,
                          const Store& store) {
  if constexpr (Words::kOneForm) panel_by_strips<Words>(a, b, depth, m, n, upper, store);
#if defined(__AVX512F__)
  if constexpr (!Words::kOneForm) panel_by_amx(a, b, depth, m, n, upper, store);
#endif
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
