// bf16 weights through vdpbf16ps: 32 products of bf16 pairs an instruction, summed in fp32.
//
// 2:4 gathers x instead of spreading W: 64 columns of x are two registers, the metadata of those
// columns is one machine word, and one two-register permute picks the 32 activations that meet the
// 32 stored weights (for fp32 activations; bf16 ones have sparse_gather.h). A bitmap row is spread
// over its columns (vpexpandw) as bf16.
//
// fp32 activations are split into three bf16 parts of eight bits each, which together are the fp32
// number exactly; each part is multiplied and all are summed in one fp32 accumulator. The
// instruction takes subnormal bf16 numbers for zero, which is the only difference in range.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"

#if defined(__AVX512F__)

namespace pyprune {
namespace PYPRUNE_ISA {

// Rows of x that one pass over a block of W serves; longer x goes over the block chunk by chunk.
// With 16 a pass has registers for the sums of one row of W alone, and x is loaded as often as it
// is multiplied: slower, though a bitmap would be spread over its columns once and not twice.
constexpr int kChunkRows = 8;
constexpr int kDotBlockRows = kMostFewRows;  // of W, at most; they stay in the second level

// The bf16 parts of an activation, most significant first; kParts of them add up to it exactly.
template <class X>
constexpr int kParts = sizeof(X) == 2 ? 1 : 3;

inline void split(bf16 x, bf16* parts) { parts[0] = x; }
inline void split(float x, bf16* parts) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7f800000u) == 0x7f800000u) {
    // What is left of an infinity or a NaN is no number; a NaN must not lose its last bit.
    parts[0] = {static_cast<uint16_t>((u >> 16) | (u & 0xffffu ? 0x40u : 0u))};
    parts[1] = parts[2] = {0};
    return;
  }
  for (int p = 0; p < 3; ++p) {
    parts[p] = {static_cast<uint16_t>(u >> 16)};
    x -= to_float(parts[p]);  // exact: the low bits of x
    std::memcpy(&u, &x, 4);
  }
}

// `m` rows of x as the kernels read them: [C / 64][m][parts][64], zeros past C.
template <class X>
void pack_dot(const X* x, int64_t stride, int64_t m, int64_t cols, bf16* out) {
  constexpr int P = kParts<X>;
  for (int64_t c = 0; c < cols; c += kMaskColumns)
    for (int64_t i = 0; i < m; ++i, out += P * kMaskColumns) {
      const X* row = x + i * stride + c;
      const int64_t width = std::min(kMaskColumns, cols - c);
      if (width < kMaskColumns) std::memset(out, 0, P * kMaskColumns * sizeof(bf16));
      for (int64_t j = 0; j < width; ++j) {
        bf16 parts[P];
        split(row[j], parts);
        for (int p = 0; p < P; ++p) out[p * kMaskColumns + j] = parts[p];
      }
    }
}

// Where a kernel stands in one row of W.
struct DotCursor {
  const bf16* v;        // the next value
  const uint8_t* meta;  // 2:4: the row's metadata; bitmap: its mask, padded to whole words
};

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512vbmi2,avx512vpopcntdq")

// Like row_mask() for a bitmap, eight words at a time; where the row's mask is whole words it stays
// where it is. Null when the row is inconsistent.
inline const uint8_t* bitmap_row(const Weights& w, int64_t r, uint64_t* words) {
  const int64_t n = mask_words(w.cols), tail = w.cols % kMaskColumns;
  const uint8_t* const row = w.meta + r * w.meta_stride;
  __m512i counts = _mm512_setzero_si512();
  uint64_t stray = 0;
  // Counted as it is read: a vector that spans two of memcpy's stores would have to wait for both.
  for (int64_t i = 0; i < n; i += 8) {
    const int64_t left = w.meta_stride - 8 * i;
    const __mmask64 bytes = left >= 64 ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
    const __m512i mask = _mm512_maskz_loadu_epi8(bytes, row + 8 * i);
    counts = _mm512_add_epi64(counts, _mm512_popcnt_epi64(mask));
    if (tail)
      _mm512_mask_storeu_epi64(words + i,
                               static_cast<__mmask8>(n - i >= 8 ? 0xff : (1 << (n - i)) - 1), mask);
  }
  if (tail) stray = words[n - 1] >> tail;
  if (stray || !w.encloses(r, _mm512_reduce_add_epi64(counts))) return nullptr;
  return tail ? reinterpret_cast<const uint8_t*>(words) : row;
}

inline __m512bh words_of(__m512i v) { return reinterpret_cast<__m512bh>(v); }

// Which of 64 columns each of 32 stored values of a 2:4 row belongs to. Value j has bits 2j and
// 2j + 1 of `meta`; a permute reads six bits of each word.
inline __m512i kept_of(uint64_t meta) {
  const __m512i shifts = _mm512_set_epi64(
      0x003e003c003a0038, 0x0036003400320030, 0x002e002c002a0028, 0x0026002400220020,
      0x001e001c001a0018, 0x0016001400120010, 0x000e000c000a0008, 0x0006000400020000);
  const __m512i groups = _mm512_set_epi64(
      0x003c003c00380038, 0x0034003400300030, 0x002c002c00280028, 0x0024002400200020,
      0x001c001c00180018, 0x0014001400100010, 0x000c000c00080008, 0x0004000400000000);
  const __m512i codes =
      _mm512_multishift_epi64_epi8(shifts, _mm512_set1_epi64(static_cast<int64_t>(meta)));
  // (codes & 3) | groups
  return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(3), groups, 0xea);
}

// The words of (x0, x1) that `columns` names. Assembly because the compiler prefers the form that
// overwrites x0, and then loads x anew for every row of W.
inline __m512i pick(__m512i x0, __m512i x1, __m512i columns) {
  asm("vpermi2w %2, %1, %0" : "+v"(columns) : "v"(x0), "v"(x1));
  return columns;
}

// R rows of a dense or 2:4 matrix, words of columns [i0, i1), times M rows of x in P parts; `sums`
// holds R x M vectors.
template <WeightFormat kFormat, int P, int M, int R>
inline void dot_rows(const Weights& w, DotCursor* cursors, int64_t i0, int64_t i1, const bf16* x,
                     FetchAhead& fetch, float* sums) {
  constexpr bool k24 = kFormat == WeightFormat::sparse24;
  static_assert(k24 || kFormat == WeightFormat::dense, "bitmaps have bitmap_rows()");
  const int64_t ahead = fetch.distance();
  __m512 acc[R][M];
  const bf16* v[R];
  for (int r = 0; r < R; ++r) {
    v[r] = cursors[r].v;
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_load_ps(sums + (r * M + m) * 16);
  }
  // kTail: the word that the matrix ends in, `left` of its columns.
  const auto step = [&](int64_t i, auto tail, int64_t left) __attribute__((always_inline)) {
    constexpr bool kTail = decltype(tail)::value;
    __m512i a[R], b[R];  // 2:4: values and their columns; dense: the columns' two halves
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint64_t valid = kTail ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
      if (k24) {
        uint64_t word = 0;
        std::memcpy(&word, cursors[r].meta + 8 * i, kTail ? static_cast<size_t>(left / 8) : 8);
        const __mmask32 k = kTail ? static_cast<__mmask32>((uint64_t{1} << (left / 2)) - 1) : ~0u;
        a[r] = kTail ? _mm512_maskz_loadu_epi16(k, v[r]) : _mm512_loadu_si512(v[r]);
        b[r] = kept_of(word);
        v[r] += 32;
      } else {
        a[r] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(valid), v[r]);
        b[r] = _mm512_maskz_loadu_epi16(static_cast<__mmask32>(valid >> 32), v[r] + 32);
        v[r] += 64;
        // A dense row is long enough for the hardware to help: a stream a row is faster here.
        _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead + 64, _MM_HINT_T1);
      }
    }
    if (k24) fetch.step();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int p = 0; p < P; ++p) {
        const bf16* xp = x + ((i * M + m) * P + p) * kMaskColumns;
        const __m512i x0 = _mm512_load_si512(xp), x1 = _mm512_load_si512(xp + 32);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          if (k24) {
            const __m512i picked = pick(x0, x1, b[r]);
            acc[r][m] = _mm512_dpbf16_ps(acc[r][m], words_of(a[r]), words_of(picked));
          } else {
            acc[r][m] = _mm512_dpbf16_ps(acc[r][m], words_of(a[r]), words_of(x0));
            acc[r][m] = _mm512_dpbf16_ps(acc[r][m], words_of(b[r]), words_of(x1));
          }
        }
      }
  };
  const int64_t whole = std::min(i1, w.cols / kMaskColumns);
  for (int64_t i = i0; i < whole; ++i) step(i, std::false_type(), 0);
  if (whole < i1) step(whole, std::true_type(), w.cols % kMaskColumns);
  for (int r = 0; r < R; ++r) {
    cursors[r].v = v[r];
    for (int m = 0; m < M; ++m) _mm512_store_ps(sums + (r * M + m) * 16, acc[r][m]);
  }
}

// R rows of a bitmap, spread over their columns one step before they are used: a core issues its
// oldest instructions first, so a spreading that follows the products of the step before would wait
// for all of them.
template <int P, int M, int R>
inline void bitmap_rows(DotCursor* cursors, int64_t i0, int64_t i1, const bf16* x,
                        FetchAhead& fetch, float* sums) {
  __m512 acc[R][M];
  const bf16* v[R];
  for (int r = 0; r < R; ++r) {
    v[r] = cursors[r].v;
    for (int m = 0; m < M; ++m) acc[r][m] = _mm512_load_ps(sums + (r * M + m) * 16);
  }
  // Four rows hide more by being four, and with as many of x leave no registers for a step ahead.
  constexpr bool kAhead = R < 4;
  __m512i low[R], high[R];  // the two halves of a word of columns
  const auto spread = [&](int64_t i, __m512i* to_low,
                          __m512i* to_high) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint64_t word;
      std::memcpy(&word, cursors[r].meta + 8 * std::min(i, i1 - 1), 8);
      if (i == i1) word = 0;  // nothing more to spread, nothing read
      const uint32_t first = static_cast<uint32_t>(word);
      to_low[r] = expand_words(first, v[r]);
      to_high[r] = expand_words(static_cast<uint32_t>(word >> 32), v[r] + popcount(first));
      v[r] += popcount(word);
    }
  };
  if (kAhead) spread(i0, low, high);
#pragma GCC unroll 1
  for (int64_t i = i0; i < i1; ++i) {
    __m512i next_low[R], next_high[R];
    if (kAhead)
      spread(i + 1, next_low, next_high);
    else
      spread(i, low, high);
    fetch.step();
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
      for (int p = 0; p < P; ++p) {
        const bf16* xp = x + ((i * M + m) * P + p) * kMaskColumns;
        const __m512i x0 = _mm512_load_si512(xp), x1 = _mm512_load_si512(xp + 32);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          acc[r][m] = _mm512_dpbf16_ps(acc[r][m], words_of(low[r]), words_of(x0));
          acc[r][m] = _mm512_dpbf16_ps(acc[r][m], words_of(high[r]), words_of(x1));
        }
      }
    if (kAhead)
      for (int r = 0; r < R; ++r) low[r] = next_low[r], high[r] = next_high[r];
  }
  for (int r = 0; r < R; ++r) {
    cursors[r].v = v[r];
    for (int m = 0; m < M; ++m) _mm512_store_ps(sums + (r * M + m) * 16, acc[r][m]);
  }
}

// Rows of W that one step multiplies with M rows of x: as many as their sums leave registers for.
constexpr int dot_side(int64_t m) { return m <= 4 ? 4 : 2; }

// `count` rows of W from their cursors (left as they are) times one chunk of M rows of x.
template <WeightFormat kFormat, int P, int M>
void dot_block(const Weights& w, const DotCursor* rows, int64_t count, const bf16* x,
               FetchAhead& fetch, float* sums) {
  constexpr int kSide = dot_side(M);
  const int64_t n = mask_words(w.cols);
  // A piece of x for the first-level cache; for one or two rows of x all of it is.
  const int64_t piece = M <= 2 ? n : std::max<int64_t>(1, 16 * 1024 / (kMaskColumns * 2 * P * M));
  DotCursor cursors[kDotBlockRows];
  std::copy(rows, rows + count, cursors);
  std::fill(sums, sums + count * M * Vec::kLanes, 0.0f);
  for (int64_t i0 = 0; i0 < n; i0 += piece) {
    const int64_t i1 = std::min(n, i0 + piece);
    const auto multiply = [&](auto side, int64_t r) {
      float* to = sums + r * M * Vec::kLanes;
      if constexpr (kFormat == WeightFormat::bitmap)
        bitmap_rows<P, M, decltype(side)::value>(cursors + r, i0, i1, x, fetch, to);
      else
        dot_rows<kFormat, P, M, decltype(side)::value>(w, cursors + r, i0, i1, x, fetch, to);
    };
    int64_t r = 0;
    for (; r + kSide <= count; r += kSide) multiply(std::integral_constant<int, kSide>(), r);
    for (; r < count; ++r) multiply(std::integral_constant<int, 1>(), r);
  }
}

#pragma GCC pop_options

// Cursors at rows [r0, r0 + count) of W; false, and the row noted, when one is inconsistent.
template <WeightFormat kFormat>
bool dot_cursors(const Weights& w, int64_t r0, int64_t count, uint64_t* words, DotCursor* cursors,
                 std::atomic<int64_t>* broken) {
  const int64_t n = mask_words(w.cols);
  for (int64_t r = 0; r < count; ++r) {
    const bf16* v = static_cast<const bf16*>(w.values) + w.begin(r0 + r);
    if (kFormat != WeightFormat::bitmap) {
      cursors[r] = {v, w.meta + (r0 + r) * w.meta_stride};
    } else if (const uint8_t* mask = bitmap_row(w, r0 + r, words + r * n)) {
      cursors[r] = {v, mask};
    } else {
      broken->store(r0 + r, std::memory_order_relaxed);
      return false;
    }
  }
  return true;
}

// Rows [r0, r0 + count) of the output.
template <WeightFormat kFormat, class X>
void dot_outputs(const SparseLinearArgs& a, const Weights& w, int64_t r0, int64_t count,
                 const DotCursor* cursors, const bf16* packed, FetchAhead* fetch, float* sums) {
  const int64_t total = a.x.shape[0], width = mask_words(w.cols) * kMaskColumns * kParts<X>;
  const int64_t chunks = (total + kChunkRows - 1) / kChunkRows;
  const int64_t side = dot_side(std::min<int64_t>(total, kChunkRows));
  const int64_t steps = count / side + count % side;
  const auto row_at = [&](int64_t r) {
    return static_cast<const char*>(w.values) + 2 * w.begin_within(std::min(r, w.rows));
  };
  fetch->plan(row_at(r0 + count), row_at(r0 + 2 * count), steps * mask_words(w.cols) * chunks);
  const float* bias = a.bias ? a.bias->ptr<const float>() : nullptr;
  for (int64_t m0 = 0; m0 < total; m0 += kChunkRows) {
    const int64_t chunk = std::min<int64_t>(kChunkRows, total - m0);
    with_rows<kParts<X> == 1 ? kChunkRows : static_cast<int>(kSplitRows)>(chunk, [&](auto rows) {
      constexpr int M = decltype(rows)::value;
      dot_block<kFormat, kParts<X>, M>(w, cursors, count, packed + m0 * width, *fetch, sums);
    });
    store_outputs(sums, count, chunk, a.scales ? a.scales + r0 : nullptr,
                  bias ? bias + r0 : nullptr, a.y.ptr<X>() + m0 * w.rows + r0, w.rows);
  }
}

template <WeightFormat kFormat, class X>
void run_dot(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int64_t m = a.x.shape[0], n = mask_words(w.cols),
                chunks = (m + kChunkRows - 1) / kChunkRows;
  const int64_t block = m <= 2    ? few_rows_block(w.rows, w.cols, a.threads)
                        : m <= 16 ? 16
                                  : kDotBlockRows,
                width = n * kMaskColumns * kParts<X>;
  const int64_t blocks = (w.rows + block - 1) / block;
  const int64_t sum_floats = kDotBlockRows * kChunkRows * Vec::kLanes;
  Scratch scratch(a.threads * (sum_floats * 4 + kDotBlockRows * n * 8) + m * width * 2);
  float* sums = scratch.as<float>();
  bf16* packed = reinterpret_cast<bf16*>(sums + a.threads * sum_floats);
  uint64_t* words = reinterpret_cast<uint64_t*>(packed + m * width);
  const X* x = a.x.ptr<const X>();
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c)
      pack_dot(x + c * kChunkRows * a.x.stride[0], a.x.stride[0],
               std::min<int64_t>(kChunkRows, m - c * kChunkRows), w.cols,
               packed + c * kChunkRows * width);
    float* mine = sums + omp_get_thread_num() * sum_floats;
    uint64_t* masks = words + omp_get_thread_num() * kDotBlockRows * n;
    FetchAhead fetch;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < blocks; ++g) {
      const int64_t r0 = g * block, count = std::min(block, w.rows - r0);
      DotCursor cursors[kDotBlockRows];
      if (kFormat != WeightFormat::dense) prefetch_meta(w, r0 + block, block);
      if (dot_cursors<kFormat>(w, r0, count, masks, cursors, broken))
        dot_outputs<kFormat, X>(a, w, r0, count, cursors, packed, &fetch, mine);
    }
  }
}

template <class X>
void run_dot(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  switch (a.format) {
    case WeightFormat::dense:
      return run_dot<WeightFormat::dense, X>(a, w, broken);
    case WeightFormat::sparse24:  // bf16 activations are gathered
      if constexpr (kParts<X> > 1) run_dot<WeightFormat::sparse24, X>(a, w, broken);
      return;
    case WeightFormat::bitmap:
      return run_dot<WeightFormat::bitmap, X>(a, w, broken);
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
