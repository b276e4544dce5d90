// Strips: a few vectors' worth of matrix rows stored column by column, [columns][lanes], so that
// one SIMD lane belongs to one row. Moving between strips and row-major matrices, and the lane
// masks that the kernels on strips select with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// All bits set for a lane that is selected, 0 for the others.
#if defined(__AVX512F__)

inline Vec where(const int32_t* mask, Vec x) {
  return {_mm512_and_ps(_mm512_castsi512_ps(_mm512_loadu_si512(mask)), x.v)};
}
inline Vec where_not(const int32_t* mask, Vec x) {
  return {_mm512_andnot_ps(_mm512_castsi512_ps(_mm512_loadu_si512(mask)), x.v)};
}

// dst[c * ld_dst + r] = src[r * ld_src + c] for kLanes rows and columns.
inline void transpose_tile(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * ld_src);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    const auto pd = [](__m512 x) { return _mm512_castps_pd(x); };
    const auto ps = [](__m512d x) { return _mm512_castpd_ps(x); };
    a[i] = ps(_mm512_unpacklo_pd(pd(b[i]), pd(b[i + 2])));
    a[i + 1] = ps(_mm512_unpackhi_pd(pd(b[i]), pd(b[i + 2])));
    a[i + 2] = ps(_mm512_unpacklo_pd(pd(b[i + 1]), pd(b[i + 3])));
    a[i + 3] = ps(_mm512_unpackhi_pd(pd(b[i + 1]), pd(b[i + 3])));
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = 0; j < 4; ++j) {
      b[i + j] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_f32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  }
  for (int j = 0; j < 8; ++j) {
    _mm512_storeu_ps(dst + j * ld_dst, _mm512_shuffle_f32x4(b[j], b[j + 8], 0x88));
    _mm512_storeu_ps(dst + (j + 8) * ld_dst, _mm512_shuffle_f32x4(b[j], b[j + 8], 0xdd));
  }
}

#elif defined(__AVX2__)

inline Vec where(const int32_t* mask, Vec x) {
  return {_mm256_and_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(mask)), x.v)};
}
inline Vec where_not(const int32_t* mask, Vec x) {
  return {_mm256_andnot_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(mask)), x.v)};
}

inline void transpose_tile(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(src + i * ld_src);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(dst + j * ld_dst, _mm256_permute2f128_ps(a[j], a[j + 4], 0x20));
    _mm256_storeu_ps(dst + (j + 4) * ld_dst, _mm256_permute2f128_ps(a[j], a[j + 4], 0x31));
  }
}

#elif defined(PYPRUNE_NEON)

inline Vec where(const int32_t* mask, Vec x) {
  const auto kept = [](const int32_t* m, float32x4_t v) {
    return vreinterpretq_f32_s32(vandq_s32(vld1q_s32(m), vreinterpretq_s32_f32(v)));
  };
  return {kept(mask, x.a), kept(mask + 4, x.b)};
}
inline Vec where_not(const int32_t* mask, Vec x) {
  const auto kept = [](const int32_t* m, float32x4_t v) {
    return vreinterpretq_f32_s32(vbicq_s32(vreinterpretq_s32_f32(v), vld1q_s32(m)));
  };
  return {kept(mask, x.a), kept(mask + 4, x.b)};
}

// Four squares of four.
inline void transpose_tile(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 8; j += 4) {
      const float* from = src + i * ld_src + j;
      float* to = dst + j * ld_dst + i;
      const auto wide = [](float32x4_t v) { return vreinterpretq_f64_f32(v); };
      const auto narrow = [](float64x2_t v) { return vreinterpretq_f32_f64(v); };
      const float32x4_t r0 = vld1q_f32(from), r1 = vld1q_f32(from + ld_src);
      const float32x4_t r2 = vld1q_f32(from + 2 * ld_src), r3 = vld1q_f32(from + 3 * ld_src);
      const float64x2_t a = wide(vtrn1q_f32(r0, r1)), b = wide(vtrn2q_f32(r0, r1));
      const float64x2_t c = wide(vtrn1q_f32(r2, r3)), d = wide(vtrn2q_f32(r2, r3));
      vst1q_f32(to, narrow(vtrn1q_f64(a, c)));
      vst1q_f32(to + ld_dst, narrow(vtrn1q_f64(b, d)));
      vst1q_f32(to + 2 * ld_dst, narrow(vtrn2q_f64(a, c)));
      vst1q_f32(to + 3 * ld_dst, narrow(vtrn2q_f64(b, d)));
    }
}

#else

inline Vec where(const int32_t* mask, Vec x) {
  for (int i = 0; i < Vec::kLanes; ++i) x.v[i] = mask[i] ? x.v[i] : 0.0f;
  return x;
}
inline Vec where_not(const int32_t* mask, Vec x) {
  for (int i = 0; i < Vec::kLanes; ++i) x.v[i] = mask[i] ? 0.0f : x.v[i];
  return x;
}

inline void transpose_tile(const float* src, int64_t ld_src, float* dst, int64_t ld_dst) {
  for (int r = 0; r < Vec::kLanes; ++r)
    for (int c = 0; c < Vec::kLanes; ++c) dst[c * ld_dst + r] = src[r * ld_src + c];
}

#endif

// strip[c][r] = x[r][c] for `rows` rows (at most `lanes`) and `cols` columns; the remaining lanes
// become 0. `lanes` is a multiple of the vector width.
inline void load_strip(const float* x, int64_t ld, int rows, int64_t cols, float* strip,
                       int lanes) {
  constexpr int L = Vec::kLanes;
  for (int r = 0; r < lanes; r += L) {
    int64_t c = 0;
    if (r + L <= rows)
      for (; c + L <= cols; c += L)
        transpose_tile(x + r * ld + c, ld, strip + c * lanes + r, lanes);
    for (; c < cols; ++c)
      for (int i = r; i < r + L; ++i) strip[c * lanes + i] = i < rows ? x[i * ld + c] : 0.0f;
  }
}

// The reverse of load_strip.
inline void store_strip(const float* strip, int lanes, int rows, int64_t cols, float* x,
                        int64_t ld) {
  constexpr int L = Vec::kLanes;
  for (int r = 0; r < rows; r += L) {
    int64_t c = 0;
    if (r + L <= rows)
      for (; c + L <= cols; c += L)
        transpose_tile(strip + c * lanes + r, lanes, x + r * ld + c, ld);
    for (; c < cols; ++c)
      for (int i = r; i < std::min(rows, r + L); ++i) x[i * ld + c] = strip[c * lanes + i];
  }
}

// dst[r * ld_dst + c] = 1 + src[c * ld_src + r] for kLanes rows and columns.
inline void store_unset_tile(const int32_t* src, int64_t ld_src, uint8_t* dst, int64_t ld_dst) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // Each half holds four rows: of columns 0 to 3, then of 4 to 7, [columns][rows] turned around.
  const __m256i turn = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const auto column = [&](int c) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + c * ld_src));
  };
  const auto four = [&](int c) {
    const __m256i low = _mm256_packs_epi32(column(c), column(c + 1));
    const __m256i high = _mm256_packs_epi32(column(c + 2), column(c + 3));
    const __m256i bytes = _mm256_packs_epi16(low, high);
    return _mm256_shuffle_epi8(_mm256_add_epi8(bytes, _mm256_set1_epi8(1)), turn);
  };
  const __m256i left = four(0), right = four(4);
  const __m256i pairs[2] = {_mm256_unpacklo_epi32(left, right), _mm256_unpackhi_epi32(left, right)};
  for (int half = 0; half < 2; ++half) {
    const auto store = [&](int r, __m128i rows) {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(dst + r * ld_dst), rows);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(dst + (r + 1) * ld_dst),
                       _mm_unpackhi_epi64(rows, rows));
    };
    store(2 * half, _mm256_castsi256_si128(pairs[half]));
    store(4 + 2 * half, _mm256_extracti128_si256(pairs[half], 1));
  }
#else
  constexpr int L = Vec::kLanes;
  int32_t tile[L * L];
  transpose_tile(reinterpret_cast<const float*>(src), ld_src, reinterpret_cast<float*>(tile), L);
  for (int r = 0; r < L; ++r)
    for (int c = 0; c < L; ++c) dst[r * ld_dst + c] = 1 + tile[r * L + c];
#endif
}

// x[r][c] = 1 where the strip's lane mask is clear, 0 where it is set.
inline void store_strip_unset(const int32_t* strip, int lanes, int rows, int64_t cols, uint8_t* x,
                              int64_t ld) {
  constexpr int L = Vec::kLanes;
  for (int r = 0; r < rows; r += L) {
    int64_t c = 0;
    if (r + L <= rows)
      for (; c + L <= cols; c += L)
        store_unset_tile(strip + c * lanes + r, lanes, x + r * ld + c, ld);
    for (; c < cols; ++c)
      for (int i = r; i < std::min(rows, r + L); ++i) x[i * ld + c] = !strip[c * lanes + i];
  }
}

// The reverse of store_strip_unset: a lane mask set where x[r][c] is 0. Lanes past `rows` are set.
inline void load_strip_unset(const uint8_t* x, int64_t ld, int rows, int64_t cols, int32_t* strip,
                             int lanes) {
  constexpr int L = Vec::kLanes;
  int32_t tile[L * L];
  for (int r = 0; r < lanes; r += L) {
    int64_t c = 0;
    if (r + L <= rows)
      for (; c + L <= cols; c += L) {
        for (int i = 0; i < L; ++i)
          for (int j = 0; j < L; ++j) tile[i * L + j] = x[(r + i) * ld + c + j] - 1;
        transpose_tile(reinterpret_cast<const float*>(tile), L,
                       reinterpret_cast<float*>(strip + c * lanes + r), lanes);
      }
    for (; c < cols; ++c)
      for (int i = r; i < r + L; ++i) strip[c * lanes + i] = i < rows ? x[i * ld + c] - 1 : -1;
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
