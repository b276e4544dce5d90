// Columns of a compressed row as floats, with AVX2: byte shuffles spread values over eight columns
// at a time. Included by sparse_rows.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/fetch_ahead.h"
#include "cpu/simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// For each mask of eight columns, which of the next eight values a column takes; 0x80, which makes
// a byte shuffle give zero, for a column that is not kept.
struct PickTable {
  uint8_t pick[256][8];
  constexpr PickTable() : pick() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int j = 0; j < 8; ++j) {
        const bool kept = (mask >> j) & 1;
        pick[mask][j] = static_cast<uint8_t>(kept ? next : 0x80);
        next += kept;
      }
    }
  }
};
constexpr PickTable kPicks;

// The same as bytes of values of two bytes each, which end up in the highest bytes of elements of
// kBytes: with 4, a bf16 number is widened where it lands.
template <int kBytes>
struct SpreadTable {
  uint8_t pick[256][8 * kBytes];
  constexpr SpreadTable() : pick() {
    for (int mask = 0; mask < 256; ++mask)
      for (int j = 0; j < 8; ++j)
        for (int byte = 0; byte < kBytes; ++byte) {
          const int from = kPicks.pick[mask][j], half = byte - (kBytes - 2);
          pick[mask][kBytes * j + byte] =
              static_cast<uint8_t>(from == 0x80 || half < 0 ? 0x80 : 2 * from + half);
        }
  }
};
alignas(32) constexpr SpreadTable<2> kSpread16;
alignas(32) constexpr SpreadTable<4> kSpread32;

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i picks_of(uint8_t keep) {
  return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPicks.pick[keep]));
}

// Eight consecutive columns as floats, those of `keep` stored from p on; reads eight values,
// whatever `keep` is.
inline __m256 expand8(const bf16* p, uint8_t keep) {
  // Both halves of the register see all eight values.
  const __m256i next = _mm256_broadcastsi128_si256(load16(p));
  const auto* pick = reinterpret_cast<const __m256i*>(kSpread32.pick[keep]);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(next, _mm256_load_si256(pick)));
}
inline __m256 expand8(const f16* p, uint8_t keep) {
  const auto* pick = reinterpret_cast<const __m128i*>(kSpread16.pick[keep]);
  return _mm256_cvtph_ps(_mm_shuffle_epi8(load16(p), _mm_load_si128(pick)));
}
inline __m256 expand8(const float* p, uint8_t keep) {
  const __m256i pick = _mm256_cvtepi8_epi32(picks_of(keep));  // the lowest three bits; the sign
  const __m256 next = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), pick);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(pick, 31)), next);
}
inline __m256 expand8(const int8_t* p, uint8_t keep) {
  const __m128i next = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m128i bytes = _mm_shuffle_epi8(next, picks_of(keep));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

// The first `count` of eight columns of a dense row, zeros after them.
template <class T>
inline __m256 load_columns(const T* p, int64_t count) {
  if (count >= 8) return Vec::load(p).v;
  T row[8] = {};
  std::copy_n(p, std::max<int64_t>(count, 0), row);
  return Vec::load(row).v;
}

// Dense rows come eight columns at a time in order; bf16 ones as the even, then the odd of sixteen
// columns, which a shift and a mask widen in place: a conversion in order would take one of the
// pipes that multiply.
template <class T>
constexpr bool kDenseEvenOdd = std::is_same_v<T, bf16>;

// Columns [8 * step, 8 * step + 8) of a dense row, in that order, from `p` on, which is the first
// of them; `count` columns are left before the row ends. kEnds: that may be fewer than are read.
template <bool kEnds, class T>
inline __m256 dense_columns(const T* p, int step, int64_t count) {
  constexpr int kRead = kDenseEvenOdd<T> ? 16 : 8;
  const bool odd = kDenseEvenOdd<T> && step % 2;
  if (odd) p -= 8, count += 8;
  T row[kRead] = {};
  if (kEnds && count < kRead) {
    std::copy_n(p, std::max<int64_t>(count, 0), row);
    p = row;
  }
  if constexpr (kDenseEvenOdd<T>) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    return _mm256_castsi256_ps(odd ? _mm256_and_si256(both, high) : _mm256_slli_epi32(both, 16));
  } else {
    return Vec::load(p).v;
  }
}

// Eight columns of which `keep` are stored from p on, which is `left` values before the matrix
// ends: nothing past that is read.
template <class T>
inline __m256 spread_columns(const T* p, int64_t left, uint8_t keep) {
  if (left >= 8) return expand8(p, keep);
  T last[8] = {};
  std::copy_n(p, std::max<int64_t>(left, 0), last);
  return expand8(last, keep);
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

// Adds words [i0, i1) of R rows times M rows of x to `sums`, R x M vectors. x is
// [C / kRun][M][kRun]. What lies `ahead` bytes further is fetched into the second level. With one
// row of x every row of W has two sums: a sum alone would wait for itself.
// kEnds: a row's last columns, or the matrix's last values, may be among these.
template <class T, bool kDense, bool kAhead, int kRun, int M, int R, bool kEnds>
inline void multiply_words(RowsAt<T, R>& rows, int64_t i0, int64_t i1, const float* x,
                           int64_t ahead, FetchAhead* fetch, float* sums) {
  constexpr int kChains = M == 1 ? 2 : 1;
  constexpr int kSteps = R == 1 ? 4 : 1;  // of eight columns, before x is taken
  // Steps from one line to fetch to the next: dense, or at half density.
  constexpr int kFetch = std::min<int>(8, (kDense ? 8 : 16) / sizeof(T));
  __m256 acc[R][M][kChains];
  const T* v[R];
  const uint8_t* masks[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    v[r] = rows.v[r];
    masks[r] = static_cast<const uint8_t*>(rows.masks[r]);
    for (int m = 0; m < M; ++m) {
      acc[r][m][0] = _mm256_load_ps(sums + (r * M + m) * 8);
      if (kChains == 2) acc[r][m][kChains - 1] = _mm256_setzero_ps();
    }
  }
  x += i0 * 64 * M;
#pragma GCC unroll 1
  for (int64_t i = i0; i < i1; ++i, x += 64 * M) {
    if (!kAhead) fetch->step();
#pragma GCC unroll 8
    for (int first = 0; first < 8; first += kSteps) {
      __m256 w[kSteps][R];
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int step = first + s;
          const uint8_t keep = kDense ? uint8_t{0xff} : masks[r][8 * i + step];
          if constexpr (kDense)
            w[s][r] = dense_columns<kEnds>(v[r], step, rows.cols - 64 * i - 8 * step);
          else
            w[s][r] = kEnds ? spread_columns(v[r], rows.end - v[r], keep) : expand8(v[r], keep);
          v[r] += kDense ? 8 : __builtin_popcount(keep);
          if (kAhead && step % kFetch == kFetch - 1)
            _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
        }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int s = 0; s < kSteps; ++s) {
          const int column = 8 * (first + s), chain = (first + s) % kChains;
          __m256 xm = _mm256_load_ps(x + (column / kRun * M + m) * kRun + column % kRun);
          // Into a register, once for all rows: as an operand of each product it would be as many
          // loads, and two a cycle are the limit.
          if (R > 1) asm volatile("" : "+x"(xm));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            acc[r][m][chain] = _mm256_fmadd_ps(w[s][r], xm, acc[r][m][chain]);
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

template <class T, bool kDense, bool kAhead, int kRun, int M, int R>
inline void multiply_words(RowsAt<T, R>& rows, int64_t i0, int64_t i1, const float* x,
                           int64_t ahead, FetchAhead* fetch, float* sums) {
  bool ends = kDense && i1 * 64 > rows.cols;
  // A word takes at most its 64 values, and up to 8 more are read.
  for (int r = 0; r < R; ++r) ends |= rows.end - rows.v[r] < (i1 - i0) * 64 + 8;
  if (ends)
    multiply_words<T, kDense, kAhead, kRun, M, R, true>(rows, i0, i1, x, ahead, fetch, sums);
  else
    multiply_words<T, kDense, kAhead, kRun, M, R, false>(rows, i0, i1, x, ahead, fetch, sums);
}

// Rows that one turn multiplies side by side: as many as their sums leave registers for.
constexpr int rows_of_a_turn(int m) { return m <= 2 ? 4 : m <= 6 ? 2 : 1; }

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
