// Compressed int8 weights with few rows of x through vdpbf16ps: pairs of bf16 products, summed in
// fp32. Kernels of sparse_int8.cpp, which says what those have. Loops over rows are all unrolled,
// or the compiler stores every sum at every step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/int8_sums.h"
#include "cpu/sparse_bf16.h"
#include "cpu/widen_int8.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Where a kernel stands in one row: the next value, and the row's mask words (or, where a kernel
// reads that itself, its 2:4 metadata).
struct ByteCursor {
  const int8_t* v;
  const uint8_t* meta;
};

#if defined(__AVX512F__)

// How the kernels read x. Apart from them, as what is compiled for more instructions than its
// caller is never inlined.
template <int P>
struct PickInt8Layout {
  using T = bf16;
  static constexpr int kParts = P, kMost = P == 1 ? 1 : kSplitRows;
  static constexpr bool kRuns = true;
  static int64_t place(int64_t c) { return c; }
  template <class X>
  static void part(X x, bf16* parts) {
    split(x, parts);
  }
};
struct SpreadInt8Layout {
  using T = bf16;
  static constexpr int kParts = 1, kMost = 8;
  static constexpr bool kRuns = true;
  static int64_t place(int64_t c) { return widen64_place(c); }
  static void part(bf16 x, bf16* parts) { parts[0] = x; }
};

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512vbmi2,avx512vpopcntdq")

// 2:4, picking the activations from both registers of a word of columns; fp32 x comes as three bf16
// parts (see sparse_bf16.h). With more rows of bf16 x sparse_gather_int8.h is faster. Two words of
// columns at a time: their 64 values fill a register.
template <int P>
struct PickInt8 : PickInt8Layout<P> {
  static constexpr int side(int) { return 4; }
  static const uint8_t* meta(const Weights& w, int64_t r, uint64_t*) {
    return w.meta + r * w.meta_stride;
  }

  template <int M, int R>
  static void rows(int64_t cols, const int8_t*, ByteCursor* cursors, int64_t i0, int64_t i1,
                   const bf16* x, int64_t ahead, float* sums) {
    const Widen64 widen;
    // Eight bytes of the first word, eight of the second, and so on, as Widen64 takes them apart.
    const __m512i both = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    Vec acc[R][M];
    load_sums(sums, acc);
    const int8_t* v[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) v[r] = cursors[r].v;
    // kTail: the words that the matrix ends in, `left` of their columns.
    const auto step = [&](int64_t i, auto tail, int64_t left) __attribute__((always_inline)) {
      constexpr bool kTail = decltype(tail)::value;
      __m512bh w[R][2];
      __m512i picks[R][2];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        uint64_t words[2] = {};
        std::memcpy(words, cursors[r].meta + 8 * i, kTail ? static_cast<size_t>(left / 8) : 16);
        const __mmask64 valid = kTail ? (uint64_t{1} << (left / 2)) - 1 : ~uint64_t{0};
        widen(_mm512_permutexvar_epi64(both, _mm512_maskz_loadu_epi8(valid, v[r])), w[r]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) picks[r][h] = kept_of(words[h]);
        v[r] += kMaskColumns;
        _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
      }
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 3
          for (int p = 0; p < P; ++p) {
            const bf16* xp = x + (((i + h) * M + m) * P + p) * kMaskColumns;
            const __m512i x0 = _mm512_load_si512(xp), x1 = _mm512_load_si512(xp + 32);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
              acc[r][m].v =
                  _mm512_dpbf16_ps(acc[r][m].v, w[r][h], words_of(pick(x0, x1, picks[r][h])));
          }
    };
    int64_t i = i0;
    for (const int64_t whole = std::min(i1, cols / kMaskColumns); i + 2 <= whole; i += 2)
      step(i, std::false_type(), 0);
    if (i < i1) step(i, std::true_type(), cols - i * kMaskColumns);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) cursors[r].v = v[r];
    store_sums(acc, sums);
  }
};

// Bitmaps, spread over their columns.
struct SpreadInt8 : SpreadInt8Layout {
  static constexpr int side(int m) { return m <= 4 ? 4 : 2; }
  static const uint8_t* meta(const Weights& w, int64_t r, uint64_t* words) {
    return bitmap_row(w, r, words);
  }

  template <int M, int R>
  static void rows(int64_t, const int8_t*, ByteCursor* cursors, int64_t i0, int64_t i1,
                   const bf16* x, int64_t ahead, float* sums) {
    const Widen64 widen;
    Vec acc[R][M];
    load_sums(sums, acc);
    const int8_t* v[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) v[r] = cursors[r].v;
    for (int64_t i = i0; i < i1; ++i) {
      __m512bh w[R][2];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        uint64_t word;
        std::memcpy(&word, cursors[r].meta + 8 * i, 8);
        widen(expand_bytes(word, v[r]), w[r]);
        v[r] += popcount(word);
        _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
      }
      add_pairs(w, x + i * M * kMaskColumns, acc);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) cursors[r].v = v[r];
    store_sums(acc, sums);
  }
};

#pragma GCC pop_options

#endif

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
