// 32 columns of a compressed row as floats, with AVX2: spread values over their columns by byte
// shuffles, eight columns at a time, and widen them. Included by sparse_rows.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// For each mask of eight columns, the bytes of the next eight values (two bytes each) that its
// columns take; 0x80, which gives zero, for a column that is not kept.
struct SpreadTable {
  uint8_t pick[256][16];
  constexpr SpreadTable() : pick() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int j = 0; j < 8; ++j) {
        const bool kept = (mask >> j) & 1;
        pick[mask][2 * j] = static_cast<uint8_t>(kept ? 2 * next : 0x80);
        pick[mask][2 * j + 1] = static_cast<uint8_t>(kept ? 2 * next + 1 : 0x80);
        next += kept;
      }
    }
  }
};
alignas(16) constexpr SpreadTable kSpread;

// The same of values of one byte, or of vectors of eight: which of the next eight a column takes.
struct PickTable {
  int8_t pick[256][8];
  constexpr PickTable() : pick() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int j = 0; j < 8; ++j) {
        const bool kept = (mask >> j) & 1;
        pick[mask][j] = static_cast<int8_t>(kept ? next : -128);
        next += kept;
      }
    }
  }
};
constexpr PickTable kPicks;

inline __m128i picks_of(uint32_t keep) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPicks.pick[keep & 0xff]));
}

// The next eight columns as 16-bit values, the lowest bits of `keep` of them stored from `v` on,
// which goes on to the next.
inline __m128i spread8(const uint16_t*& v, uint32_t keep) {
  const auto* pick = reinterpret_cast<const __m128i*>(kSpread.pick[keep & 0xff]);
  const __m128i out =
      _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v)), _mm_load_si128(pick));
  v += __builtin_popcount(keep & 0xff);
  return out;
}

// 32 consecutive columns as four vectors. bf16 comes as even columns and then odd ones (a shift and
// a mask widen it in place), the other types in order; pack_decode() orders x alike.
//
//   load(p)           of a dense row
//   expand(p, keep)   `keep` of them stored from p on; reads 32 values, whatever `keep` is
template <class T>
struct Columns32;

template <>
struct Columns32<bf16> {
  static constexpr bool kEvenOdd = true;
  __m256 v[4];
  Columns32(__m256i low, __m256i high) {
    const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    v[0] = _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
    v[1] = _mm256_castsi256_ps(_mm256_slli_epi32(high, 16));
    v[2] = _mm256_castsi256_ps(_mm256_and_si256(low, odd));
    v[3] = _mm256_castsi256_ps(_mm256_and_si256(high, odd));
  }
  static Columns32 load(const bf16* p) {
    const auto* words = reinterpret_cast<const __m256i*>(p);
    return {_mm256_loadu_si256(words), _mm256_loadu_si256(words + 1)};
  }
  static Columns32 expand(const bf16* p, uint32_t keep) {
    const auto* v = reinterpret_cast<const uint16_t*>(p);
    const __m128i a = spread8(v, keep), b = spread8(v, keep >> 8);
    const __m128i c = spread8(v, keep >> 16), d = spread8(v, keep >> 24);
    return {_mm256_set_m128i(b, a), _mm256_set_m128i(d, c)};
  }
};

template <>
struct Columns32<f16> {
  static constexpr bool kEvenOdd = false;
  __m256 v[4];
  static Columns32 load(const f16* p) {
    Columns32 out;
    for (int k = 0; k < 4; ++k) out.v[k] = Vec::load(p + 8 * k).v;
    return out;
  }
  static Columns32 expand(const f16* p, uint32_t keep) {
    const auto* v = reinterpret_cast<const uint16_t*>(p);
    Columns32 out;
    for (int k = 0; k < 4; ++k) out.v[k] = _mm256_cvtph_ps(spread8(v, keep >> (8 * k)));
    return out;
  }
};

template <>
struct Columns32<float> {
  static constexpr bool kEvenOdd = false;
  __m256 v[4];
  static Columns32 load(const float* p) {
    Columns32 out;
    for (int k = 0; k < 4; ++k) out.v[k] = _mm256_loadu_ps(p + 8 * k);
    return out;
  }
  static Columns32 expand(const float* p, uint32_t keep) {
    Columns32 out;
    for (int k = 0; k < 4; ++k, keep >>= 8) {
      const __m256i pick = _mm256_cvtepi8_epi32(picks_of(keep));  // the lowest three bits; the sign
      const __m256 next = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), pick);
      out.v[k] = _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(pick, 31)), next);
      p += __builtin_popcount(keep & 0xff);
    }
    return out;
  }
};

template <>
struct Columns32<int8_t> {
  static constexpr bool kEvenOdd = false;
  __m256 v[4];
  static Columns32 expand(const int8_t* p, uint32_t keep) {
    Columns32 out;
    for (int k = 0; k < 4; ++k, keep >>= 8) {
      const __m128i next = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      const __m128i bytes = _mm_shuffle_epi8(next, picks_of(keep));
      out.v[k] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
      p += __builtin_popcount(keep & 0xff);
    }
    return out;
  }
};

// The first `count` of 32 columns of a dense row, zeros after them.
template <class T>
inline Columns32<T> load_columns(const T* p, int64_t count) {
  if (count >= 32) return Columns32<T>::load(p);
  T row[32] = {};
  std::copy_n(p, std::max<int64_t>(count, 0), row);
  return Columns32<T>::load(row);
}

// 32 columns of which `keep` are stored from p on, which is `left` values before the matrix ends:
// nothing past that is read.
template <class T>
inline Columns32<T> spread_columns(const T* p, int64_t left, uint32_t keep) {
  if (left >= 32) return Columns32<T>::expand(p, keep);
  T last[32] = {};
  std::copy_n(p, std::max<int64_t>(left, 0), last);
  return Columns32<T>::expand(last, keep);
}

// R rows of a dense matrix or a bitmap, from `v` on, which moves on; `masks` are those of whole
// rows, 64 columns a word.
template <class T, int R>
struct RowsAt {
  const T* v[R];
  const void* masks[R];
  const T* end;  // of the matrix's values
  int64_t cols;
};

// Adds words [i0, i1) of R rows times M rows of x to `sums`, R x M vectors. x is [C /
// kRun][M][kRun] in the order of Columns32. What lies `ahead` bytes further is fetched into the
// second level. With one row of x every row of W has two sums: a sum alone would wait for itself.
// kEnds: a row's last columns, or the matrix's last values, may be among these.
template <class T, bool kDense, int64_t kRun, int M, int R, bool kEnds>
inline void multiply_words(RowsAt<T, R>& rows, int64_t i0, int64_t i1, const float* x,
                           int64_t ahead, float* sums) {
  constexpr int kChains = M == 1 ? 2 : 1;
  __m256 acc[R][M][kChains];
  const T* v[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    v[r] = rows.v[r];
    for (int m = 0; m < M; ++m) {
      acc[r][m][0] = _mm256_load_ps(sums + (r * M + m) * 8);
      if (kChains == 2) acc[r][m][kChains - 1] = _mm256_setzero_ps();
    }
  }
#pragma GCC unroll 1
  for (int64_t i = i0; i < i1; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint64_t word = 0;
      if (!kDense) std::memcpy(&word, static_cast<const char*>(rows.masks[r]) + 8 * i, 8);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const uint32_t keep = static_cast<uint32_t>(word >> (32 * half));
        const Columns32<T> columns = [&] {
          if constexpr (kDense)
            return kEnds ? load_columns(v[r], rows.cols - 64 * i - 32 * half)
                         : Columns32<T>::load(v[r]);
          else
            return kEnds ? spread_columns(v[r], rows.end - v[r], keep)
                         : Columns32<T>::expand(v[r], keep);
        }();
        v[r] += kDense ? 32 : __builtin_popcount(keep);
        if (kDense || sizeof(T) == 4 || half)
          _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            const int64_t at =
                kRun == 64 ? (i * M + m) * 64 + 32 * half : ((2 * i + half) * M + m) * 32;
            acc[r][m][k % kChains] = _mm256_fmadd_ps(columns.v[k], _mm256_load_ps(x + at + 8 * k),
                                                     acc[r][m][k % kChains]);
          }
      }
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    rows.v[r] = v[r];
    for (int m = 0; m < M; ++m) {
      __m256 sum = acc[r][m][0];
      if (kChains == 2) sum = _mm256_add_ps(sum, acc[r][m][kChains - 1]);
      _mm256_store_ps(sums + (r * M + m) * 8, sum);
    }
  }
}

template <class T, bool kDense, int64_t kRun, int M, int R>
inline void multiply_words(RowsAt<T, R>& rows, int64_t i0, int64_t i1, const float* x,
                           int64_t ahead, float* sums) {
  bool ends = kDense && i1 * 64 > rows.cols;
  // A word takes at most its 64 values, and up to 32 more are read.
  for (int r = 0; r < R; ++r) ends |= rows.end - rows.v[r] < (i1 - i0) * 64 + 32;
  if (ends)
    multiply_words<T, kDense, kRun, M, R, true>(rows, i0, i1, x, ahead, sums);
  else
    multiply_words<T, kDense, kRun, M, R, false>(rows, i0, i1, x, ahead, sums);
}

// Rows that one turn multiplies side by side: as many as their sums leave registers for.
constexpr int rows_of_a_turn(int m) { return m <= 2 ? 4 : m <= 4 ? 2 : 1; }

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
