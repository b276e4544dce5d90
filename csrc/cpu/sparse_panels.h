// Many rows of x without the zeros of W, with AVX2, which multiplies fp32 only: the kept columns of
// a row are a list of weights and places, and each weight meets a panel of rows of x, side by
// side in vectors of tokens.
//
// A dense row's tile (sparse_gemm.h) loads a vector of tokens once for several rows of W; here each
// product loads its own, so a kept column costs as much as the loads: for four vectors of tokens
// these, a broadcast weight and its place, where a core loads two or three a cycle and multiplies
// two. So it gains where some three columns in ten are gone, once rows of x pay for the lists
// (lists_pay()). Lists are made once for a sweep over W, in the first- and second-level caches, a
// piece of columns at a time; the rows of a block go by the length of their lists, four of like
// length filled up with weights of zero that meet a row of zeros.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"
#include "huge_pages.h"

#if defined(__AVX2__) && !defined(__AVX512F__)

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int kListVectors = 4;  // of tokens, in a panel at most
constexpr int kListTokens = kListVectors * Vec::kLanes;
// A panel's piece is 16 KB, half of the smallest first-level cache.
constexpr int64_t kListedColumns = 16 * 1024 / (4 * kListTokens);
constexpr int64_t kListedWords = kListedColumns / kMaskColumns;
constexpr int64_t kPanelFloats = (kListedColumns + 1) * kListTokens;  // and a row of zeros
constexpr int kZeroOffset = kListedColumns * kListTokens;
static_assert(kListedColumns % kMaskColumns == 0 && kZeroOffset < 1 << 16);

constexpr int kListSide = 4;        // rows whose lists have one length
constexpr int64_t kListBlock = 64;  // rows of W whose lists are made together, at most
constexpr int64_t kListStep = 32;   // weights that are widened at a time
constexpr int64_t kListSlots = kListedColumns + 16;  // of a list; eight past its last are written
static_assert(kListedColumns % kListStep == 0, "no step goes past a full list");
constexpr int64_t kSumFloats = kListBlock * kListTokens;  // of a panel
constexpr int64_t kMostListTokens = 512;                  // bounds the packed copy of x

// Where the kept columns of eight begin in a panel, in floats, moved together.
struct OffsetTable {
  uint16_t offsets[256][8];
  constexpr OffsetTable() : offsets() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int c = 0; c < 8; ++c)
        if (mask >> c & 1) offsets[mask][count++] = static_cast<uint16_t>(c * kListTokens);
    }
  }
};
alignas(64) constexpr OffsetTable kOffsets;

// `count` values as floats, of which `left` are there before the matrix ends: nothing past that is
// read. By whole steps, up to a step more: where a loop ends can hardly be foreseen, and each time
// that it is not costs more than some values widened in vain.
template <class T>
inline void widen_list(const T* v, int64_t left, int64_t count, float* out) {
  const int64_t padded = (count + kListStep - 1) / kListStep * kListStep;
  if (padded > left) {
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(v[i]);
    return;
  }
  for (int64_t i = 0; i < padded; i += kListStep)
#pragma GCC unroll 4
    for (int64_t k = i; k < i + kListStep; k += Vec::kLanes) load8(v + k).store(out + k);
}

// Fills a list up from `count` to `longest` weights.
inline void fill_list(float* values, uint16_t* offsets, int64_t count, int64_t longest) {
  do {
    Vec::zero().store(values + count);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(offsets + count), _mm_set1_epi16(kZeroOffset));
    count += Vec::kLanes;
  } while (count < longest);
}

// The offsets of the columns that `n` words keep.
inline void list_offsets(const uint64_t* words, int64_t n, uint16_t* out) {
  const auto* masks = reinterpret_cast<const uint8_t*>(words);
  __m128i base = _mm_setzero_si128();
  for (int64_t i = 0; i < 8 * n; ++i) {
    const auto* entry = reinterpret_cast<const __m128i*>(kOffsets.offsets[masks[i]]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_add_epi16(_mm_load_si128(entry), base));
    base = _mm_add_epi16(base, _mm_set1_epi16(8 * kListTokens));
    out += __builtin_popcount(masks[i]);
  }
}

// The lists of a block's rows over one piece of columns, shortest first.
struct Lists {
  alignas(64) float values[kListBlock][kListSlots];
  alignas(64) uint16_t offsets[kListBlock][kListSlots];
  int counts[kListBlock];      // of the list in each slot, filled up
  uint16_t order[kListBlock];  // the row in each slot
};

// Lists words [i0, i1) of rows [r0, r0 + count), whose cursors move on. The first slots, as many as
// make the rows a multiple of kListSide, get lists of zeros, of a row after the last.
template <class T>
void make_lists(const Weights& w, int64_t r0, int64_t count, Cursor<T>* cursors, int64_t i0,
                int64_t i1, Lists& lists) {
  const T* end = static_cast<const T*>(w.values) + w.nnz;
  int kept[kListBlock], starts[kListedColumns + 2] = {};
  for (int64_t r = 0; r < count; ++r) {
    kept[r] = 0;
    for (int64_t i = i0; i < i1; ++i) kept[r] += popcount(cursors[r].words[i]);
    ++starts[kept[r] + 1];
  }
  for (int64_t k = 0; k <= kListedColumns; ++k) starts[k + 1] += starts[k];
  const int64_t padding = (kListSide - count % kListSide) % kListSide;
  for (int64_t s = 0; s < padding; ++s)
    lists.order[s] = static_cast<uint16_t>(count), lists.counts[s] = 0;
  for (int64_t r = 0; r < count; ++r) {
    const int64_t s = padding + starts[kept[r]]++;
    T const*& v = cursors[r].v;
    widen_list(v, end - v, kept[r], lists.values[s]);
    list_offsets(cursors[r].words + i0, i1 - i0, lists.offsets[s]);
    v += kept[r];
    lists.order[s] = static_cast<uint16_t>(r);
    lists.counts[s] = kept[r];
    // What is listed next, of this row or, after its last piece, of the row as far down the next
    // block: the memory has the products with this piece to bring it.
    const T* next = v;
    if (i1 == mask_words(w.cols))
      next = static_cast<const T*>(w.values) + w.begin_within(std::min(r0 + count + r, w.rows - 1));
    for (int64_t b = 0; b <= kept[r] * static_cast<int64_t>(sizeof(T)); b += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(next) + b, 0, 2);
  }
  for (int64_t s = 0; s < padding + count; s += kListSide) {
    const int longest = lists.counts[s + kListSide - 1];
    for (int64_t k = s; k < s + kListSide; ++k) {
      fill_list(lists.values[k], lists.offsets[k], lists.counts[k], longest);
      lists.counts[k] = longest;
    }
  }
}

// Adds the products of kRows slots' lists from `slot` on with kVectors vectors of tokens to their
// rows' sums.
template <int kVectors, int kRows>
inline void multiply_slots(const Lists& lists, int64_t slot, const float* panel, float* sums) {
  Vec acc[kRows][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = Vec::load(sums + lists.order[slot + r] * kListTokens + v * Vec::kLanes);
  const int64_t count = lists.counts[slot];
#pragma GCC unroll 1
  for (int64_t i = 0; i < count; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec w = Vec::set1(lists.values[slot + r][i]);
      const float* x = panel + lists.offsets[slot + r][i];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        acc[r][v] = Vec::fma(w, Vec::load(x + v * Vec::kLanes), acc[r][v]);
    }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      acc[r][v].store(sums + lists.order[slot + r] * kListTokens + v * Vec::kLanes);
}

// A panel whose turn is next, to be fetched into the second level meanwhile: lists touch it in no
// order that the hardware foresees.
struct NextPanel {
  const float* data;
  int64_t floats;  // of each column
};

// `slots` lists times a panel.
template <int kVectors>
void multiply_panel(const Lists& lists, int64_t slots, const float* panel, NextPanel next,
                    float* sums) {
  // So many chains of sums as keep the multipliers busy.
  constexpr int kRows = kVectors > 2 ? 2 : 4;
  const int64_t share = kListedColumns * kRows / slots + 1;  // columns fetched at a time
  int64_t fetched = 0;
  for (int64_t s = 0; s < slots; s += kRows) {
    for (const int64_t end = std::min(kListedColumns, fetched + share); fetched < end; ++fetched)
      for (int64_t v = 0; v < next.floats; v += 16)
        __builtin_prefetch(next.data + fetched * kListTokens + v, 0, 2);
    multiply_slots<kVectors, kRows>(lists, s, panel, sums);
  }
}

// A panel's piece of columns [0, cols) of `tokens` rows of x: [kListedColumns + 1][kListTokens],
// zeros outside.
template <class X>
void pack_panel(const X* x, int64_t stride, int64_t tokens, int64_t cols, float* out) {
  std::fill(out, out + kPanelFloats, 0.0f);
  // Sixteen columns of every token in turn: both sides then stay within few cache lines.
  for (int64_t c0 = 0; c0 < cols; c0 += 16)
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t c = c0; c < std::min(cols, c0 + 16); ++c)
        out[c * kListTokens + t] = to_float(x[t * stride + c]);
}

// Whether lists of W serve m rows of x best. Two threads of a Zen 3 core, 50 %, of the tiles' time:
// 0.85 at 32 rows from memory (8192 x 4096), 0.7 in the cache (576 x 576), 0.5-0.65 from 64 on; at
// 24, where tiles need not be made, level; at 0.7 kept 0.75-1.0, above level or behind.
inline bool lists_pay(const Weights& w, int64_t m) {
  constexpr double kMostKept = 0.7;
  const double size = static_cast<double>(w.rows) * static_cast<double>(w.cols);
  return w.format != WeightFormat::dense && m > kMaxDecodeRows &&
         static_cast<double>(w.nnz) <= kMostKept * size;
}

// One thread's buffers.
struct ListScratch {
  Lists* lists;
  float* sums;      // [panels][kListBlock][kListTokens]
  uint64_t* words;  // [kListBlock][mask_words]
};

// Rows [r0, r0 + count) of W times all panels of x; false when a row is inconsistent.
template <class T>
bool listed_rows(const Weights& w, int64_t r0, int64_t count, const Chunks& panels,
                 const float* packed, const ListScratch& s, std::atomic<int64_t>* broken) {
  const int64_t n = mask_words(w.cols), slots = (count + kListSide - 1) / kListSide * kListSide;
  Cursor<T> cursors[kListBlock];
  if (!begin_rows(w, r0, count, s.words, cursors, broken)) return false;
  prefetch_meta(w, r0 + count, count);
  std::fill(s.sums, s.sums + panels.count * kSumFloats, 0.0f);
  const float* panel = packed;
  for (int64_t i0 = 0; i0 < n; i0 += kListedWords) {
    make_lists(w, r0, count, cursors, i0, std::min(n, i0 + kListedWords), *s.lists);
    for (int64_t p = 0; p < panels.count; ++p, panel += kPanelFloats) {
      const bool last = p + 1 == panels.count;  // then the next block begins with the first
      const NextPanel next{last && i0 + kListedWords >= n ? packed : panel + kPanelFloats,
                           panels.rows(last ? 0 : p + 1) * Vec::kLanes};
      with_rows<kListVectors>(panels.rows(p), [&](auto vectors) {
        multiply_panel<decltype(vectors)::value>(*s.lists, slots, panel, next,
                                                 s.sums + p * kSumFloats);
      });
    }
  }
  return end_rows(cursors, r0, count, broken);
}

inline int64_t vectors_of(int64_t tokens) { return (tokens + Vec::kLanes - 1) / Vec::kLanes; }

// Rows of W in a block: as few as make whole rounds of blocks for the threads.
inline int64_t listed_block(int64_t rows, int threads) {
  const int64_t rounds = (rows + kListBlock * threads - 1) / (kListBlock * threads);
  const int64_t even = (rows + rounds * threads - 1) / (rounds * threads);
  return (even + kListSide - 1) / kListSide * kListSide;
}

// Rows [t0, t0 + tokens) of x, at most kMostListTokens; `own` are the threads' buffers.
template <class T, class X>
void sweep_panels(const SparseLinearArgs& a, const Weights& w, int64_t t0, int64_t tokens,
                  float* packed, char* own, int64_t own_bytes, std::atomic<int64_t>* broken) {
  const Chunks panels(vectors_of(tokens), kListVectors);
  const int64_t pieces = (w.cols + kListedColumns - 1) / kListedColumns;
  const int64_t block = listed_block(w.rows, a.threads), blocks = (w.rows + block - 1) / block;
  const auto first = [&](int64_t p) { return panels.begin(p) * Vec::kLanes; };
  const auto width = [&](int64_t p) {
    return std::min(tokens - first(p), panels.rows(p) * Vec::kLanes);
  };
  const int64_t stride = a.x.stride[0];
  const X* x = a.x.ptr<const X>() + t0 * stride;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces * panels.count; ++i) {
      const int64_t p = i % panels.count, c0 = i / panels.count * kListedColumns;
      pack_panel(x + first(p) * stride + c0, stride, width(p),
                 std::min(kListedColumns, w.cols - c0), packed + i * kPanelFloats);
    }
    char* mine = own + omp_get_thread_num() * own_bytes;
    auto* sums = reinterpret_cast<float*>(mine + sizeof(Lists));
    const ListScratch s{reinterpret_cast<Lists*>(mine), sums,
                        reinterpret_cast<uint64_t*>(sums + panels.count * kSumFloats)};
#pragma omp for schedule(static)
    for (int64_t g = 0; g < blocks; ++g) {
      const int64_t r0 = g * block, count = std::min(block, w.rows - r0);
      if (!listed_rows<T>(w, r0, count, panels, packed, s, broken)) continue;
      for (int64_t p = 0; p < panels.count; ++p)
        store_transposed(s.sums + p * kSumFloats, kListTokens, count, width(p),
                         a.scales ? a.scales + r0 : nullptr,
                         a.bias ? a.bias->ptr<const float>() + r0 : nullptr,
                         a.y.ptr<X>() + (t0 + first(p)) * w.rows + r0, w.rows);
    }
  }
}

// T: bf16, f16, fp32, int8.
template <class T, class X>
void run_panels(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  prefer_huge_pages(a.y, sizeof(X));
  const int64_t m = a.x.shape[0];
  const Chunks sweeps(vectors_of(m), kMostListTokens / Vec::kLanes);
  const int64_t panels = Chunks(sweeps.rows(0), kListVectors).count;
  const int64_t pieces = (w.cols + kListedColumns - 1) / kListedColumns;
  const int64_t packed_floats = (pieces * panels * kPanelFloats + 15) / 16 * 16;
  const int64_t own_floats =
      (panels * kSumFloats + kListBlock * mask_words(w.cols) * 2 + 15) / 16 * 16;
  const int64_t own_bytes = static_cast<int64_t>(sizeof(Lists)) + own_floats * 4;
  const Scratch scratch(packed_floats * 4 + a.threads * own_bytes);
  float* packed = scratch.as<float>();
  char* own = reinterpret_cast<char*>(packed + packed_floats);
  for (int64_t c = 0; c < sweeps.count; ++c) {
    const int64_t t0 = sweeps.begin(c) * Vec::kLanes;
    sweep_panels<T, X>(a, w, t0, std::min(m - t0, sweeps.rows(c) * Vec::kLanes), packed, own,
                       own_bytes, broken);
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
