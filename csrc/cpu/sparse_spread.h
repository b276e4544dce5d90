// Columns of a compressed row as floats where byte shuffles spread values over eight columns at a
// time: AVX2 and NEON. Included by sparse_rows.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/fetch_ahead.h"
#include "cpu/simd.h"
#if defined(PYPRUNE_NEON)
#include "cpu/spread_neon.h"
#else
#include "cpu/spread_avx2.h"
#endif

namespace pyprune {
namespace PYPRUNE_ISA {

// The first `count` of eight columns of a dense row, zeros after them.
template <class T>
inline Vec load_columns(const T* p, int64_t count) {
  if (count >= 8) return Vec::load(p);
  T row[8] = {};
  std::copy_n(p, std::max<int64_t>(count, 0), row);
  return Vec::load(row);
}

// Dense rows come eight columns at a time in order; bf16 ones as the even, then the odd of sixteen
// columns, which a shift and a mask widen in place: a conversion in order would take one of the
// pipes that multiply.
template <class T>
constexpr bool kDenseEvenOdd = std::is_same_v<T, bf16>;

// Columns [8 * step, 8 * step + 8) of a dense row, in that order, from `p` on, which is the first
// of them.
template <class T>
inline Vec dense_columns(const T* p, int step) {
  if constexpr (kDenseEvenOdd<T>) {
    return step % 2 ? odd_columns(p - 8) : even_columns(p);
  } else {
    return Vec::load(p);
  }
}

// The same where `count` columns are left before the row ends, and more may be read. Not inlined,
// here and below: what is rare would be most of the code.
template <class T>
[[gnu::noinline]] Vec last_dense_columns(const T* p, int step, int64_t count) {
  constexpr int kRead = kDenseEvenOdd<T> ? 16 : 8;
  const int before = kDenseEvenOdd<T> && step % 2 ? 8 : 0;
  T row[kRead] = {};
  std::copy_n(p - before, std::clamp<int64_t>(count + before, 0, kRead), row);
  return dense_columns(row + before, step);
}

// Eight columns as floats, for those who may choose.
struct EightFloats {
  template <class T>
  static Vec expand(const T* p, uint8_t keep) {
    return expand8(p, keep);
  }
};

// The same, multiplied by kRaised.
struct EightRaised {
  template <class T>
  static Vec expand(const T* p, uint8_t keep) {
    return expand8_raised(p, keep);
  }
};

// Eight columns of which `keep` are stored from p on, which is `left` values, fewer than eight,
// before the matrix ends: nothing past that is read.
template <class Eight, class T>
[[gnu::noinline]] auto spread_last(const T* p, int64_t left, uint8_t keep) {
  T last[8] = {};
  std::copy_n(p, std::max<int64_t>(left, 0), last);
  return Eight::expand(last, keep);
}
template <class Eight = EightFloats, class T>
inline auto spread_columns(const T* p, int64_t left, uint8_t keep) {
  return left >= 8 ? Eight::expand(p, keep) : spread_last<Eight>(p, left, keep);
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
  // With more rows of x products decide, and the larger table takes what x has of the first level.
  constexpr bool kRaise = M <= 4 && !kDense;
  using Eight = std::conditional_t<kRaise, EightRaised, EightFloats>;
  constexpr float kScale = kRaise ? kRaised<T> : 1.0f;  // of the sums meanwhile
  constexpr int kSteps = R == 1 ? 4 : 1;                // of eight columns, before x is taken
  // Steps from one line to fetch to the next: dense, or at half density.
  constexpr int kFetch = std::min<int>(8, (kDense ? 8 : 16) / sizeof(T));
  Vec acc[R][M][kChains];
  const T* v[R];
  const uint8_t* masks[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    v[r] = rows.v[r];
    masks[r] = static_cast<const uint8_t*>(rows.masks[r]);
    for (int m = 0; m < M; ++m) {
      acc[r][m][0] = Vec::load(sums + (r * M + m) * 8);
      if (kScale != 1.0f) acc[r][m][0] = acc[r][m][0] * Vec::set1(kScale);
      if (kChains == 2) acc[r][m][kChains - 1] = Vec::zero();
    }
  }
  x += i0 * 64 * M;
#pragma GCC unroll 1
  for (int64_t i = i0; i < i1; ++i, x += 64 * M) {
    if (!kAhead) fetch->step();
    KeptWord kept[R];
#pragma GCC unroll 4
    for (int r = 0; !kDense && r < R; ++r) kept[r] = KeptWord(masks[r] + 8 * i);
#pragma GCC unroll 8
    for (int first = 0; first < 8; first += kSteps) {
      Vec w[kSteps][R];
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; ++s)
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          const int step = first + s;
          if constexpr (kDense) {
            const int64_t left = rows.cols - 64 * i - 8 * step;
            w[s][r] = kEnds && left < 16 ? last_dense_columns(v[r], step, left)
                                         : dense_columns(v[r], step);
            v[r] += 8;
          } else {
            const uint8_t keep = kept[r].keep(step);
            const T* at = kept[r].take(v[r], step);
            w[s][r] =
                kEnds ? spread_columns<Eight>(at, rows.end - at, keep) : Eight::expand(at, keep);
          }
          if (kAhead && step % kFetch == kFetch - 1)
            __builtin_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, 0, 2);
        }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int s = 0; s < kSteps; ++s) {
          const int column = 8 * (first + s), chain = (first + s) % kChains;
          Vec xm = Vec::load(x + (column / kRun * M + m) * kRun + column % kRun);
          if (R > 1) hold(xm);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) acc[r][m][chain] = Vec::fma(w[s][r], xm, acc[r][m][chain]);
        }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    rows.v[r] = v[r];
    for (int m = 0; m < M; ++m) {
      Vec sum = acc[r][m][0];
      if (kChains == 2) sum = sum + acc[r][m][kChains - 1];
      if (kScale != 1.0f) sum = sum * Vec::set1(1.0f / kScale);
      sum.store(sums + (r * M + m) * 8);
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
