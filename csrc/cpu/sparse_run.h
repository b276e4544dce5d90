// What the drivers of the compressed products share: scratch memory, rounding of the
// output, and the choice of a kernel by the number of rows of x.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/sparse_rows.h"
#if defined(PYPRUNE_NEON)
#include "cpu/strip.h"
#endif

namespace pyprune {
namespace PYPRUNE_ISA {

// One cache-line aligned allocation a call, shared out by the caller.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class U>
  U* as() const {
    return static_cast<U*>(data_);
  }

 private:
  void* data_;
};

inline void store(float* y, float value) { *y = value; }
inline void store(bf16* y, float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  // Round to nearest even; a NaN stays one (its low bits could otherwise carry into infinity).
  u = value != value ? (u | 0x400000u) : u + 0x7fffu + ((u >> 16) & 1);
  y->bits = static_cast<uint16_t>(u >> 16);
}

#if defined(__AVX512F__)

// The first n of 16 lanes.
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

// v[i]'s lane j becomes v[j]'s lane i.
inline void transpose16(__m512i* v) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  // b[i + k] has, in each 128 bits, lane k of four vectors from i on.
  __m512i b[16];
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      b[i + 2 * k] = _mm512_unpacklo_epi64(a[i + k], a[i + 2 + k]);
      b[i + 2 * k + 1] = _mm512_unpackhi_epi64(a[i + k], a[i + 2 + k]);
    }
  for (int k = 0; k < 4; ++k) {
    const __m512i p = _mm512_shuffle_i32x4(b[k], b[4 + k], 0x88);
    const __m512i q = _mm512_shuffle_i32x4(b[k], b[4 + k], 0xdd);
    const __m512i r = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0x88);
    const __m512i s = _mm512_shuffle_i32x4(b[8 + k], b[12 + k], 0xdd);
    v[k] = _mm512_shuffle_i32x4(p, r, 0x88);
    v[4 + k] = _mm512_shuffle_i32x4(q, s, 0x88);
    v[8 + k] = _mm512_shuffle_i32x4(p, r, 0xdd);
    v[12 + k] = _mm512_shuffle_i32x4(q, s, 0xdd);
  }
}

// `words` pairs of neighbouring columns of `tokens` rows of x, of which `cols` columns are there:
// out[word][lane], a row of x a lane, words `out_stride` apart; all lanes of the vectors that any
// row is in, zeros outside x.
inline void pack_pairs(const bf16* x, int64_t stride, int64_t tokens, int64_t cols, int64_t words,
                       int64_t out_stride, float* out) {
  for (int64_t t0 = 0; t0 < tokens; t0 += 16)
    for (int64_t k0 = 0; k0 < words; k0 += 16) {
      const int64_t left = std::clamp<int64_t>(cols - 2 * k0, 0, 32);
      const __mmask32 columns = static_cast<__mmask32>((uint64_t{1} << left) - 1);
      __m512i v[16];
      for (int t = 0; t < 16; ++t)
        v[t] = t0 + t < tokens ? _mm512_maskz_loadu_epi16(columns, x + (t0 + t) * stride + 2 * k0)
                               : _mm512_setzero_si512();
      transpose16(v);
      for (int k = 0; k < 16; ++k) _mm512_store_si512(out + (k0 + k) * out_stride + t0, v[k]);
    }
}

// Lane i is the sum over the vector at at + i * stride, for the first `count` of 16; the others are
// 0. 45 instructions, where sixteen sums one by one take 150.
inline __m512 sums_of(const float* at, int64_t stride, int64_t count) {
  __m512 v[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i)
    v[i] = i < count ? _mm512_load_ps(at + i * stride) : _mm512_setzero_ps();
  const auto ps = [](__m512d x) { return _mm512_castpd_ps(x); };
  const auto pd = [](__m512 x) { return _mm512_castps_pd(x); };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]),
                         _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    v[i] = _mm512_add_ps(ps(_mm512_unpacklo_pd(pd(v[2 * i]), pd(v[2 * i + 1]))),
                         ps(_mm512_unpackhi_pd(pd(v[2 * i]), pd(v[2 * i + 1]))));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88),
                       _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

inline void store_lanes(float* y, __mmask16 lanes, __m512 value) {
  _mm512_mask_storeu_ps(y, lanes, value);
}
// Rounded as store() rounds.
inline void store_lanes(bf16* y, __mmask16 lanes, __m512 value) {
  const __m512i u = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i all = _mm512_mask_or_epi32(up, nan, u, _mm512_set1_epi32(0x400000));
  _mm256_mask_storeu_epi16(y, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(all, 16)));
}

// 16 x 16 of store_transposed() at most.
template <class X>
void store_square(const float* sums, int64_t stride, int64_t count, int64_t tokens,
                  const float* scales, const float* bias, X* y, int64_t y_stride) {
  const __mmask16 columns = first_lanes(tokens), rows = first_lanes(count);
  __m512i v[16];
  for (int r = 0; r < 16; ++r)
    v[r] =
        r < count ? _mm512_maskz_loadu_epi32(columns, sums + r * stride) : _mm512_setzero_si512();
  transpose16(v);
  const __m512 scale = scales ? _mm512_maskz_loadu_ps(rows, scales) : _mm512_set1_ps(1.0f);
  const __m512 shift = bias ? _mm512_maskz_loadu_ps(rows, bias) : _mm512_setzero_ps();
  for (int t = 0; t < tokens; ++t) {
    const __m512 sum = _mm512_castsi512_ps(v[t]);
    store_lanes(y + t * y_stride, rows, _mm512_add_ps(_mm512_mul_ps(sum, scale), shift));
  }
}

#elif defined(PYPRUNE_NEON)

inline void store_eight(float* y, Vec value) { value.store(y); }
// Rounded as store() rounds.
inline void store_eight(bf16* y, Vec value) {
  const auto rounded = [](float32x4_t f) {
    const uint32x4_t u = vreinterpretq_u32_f32(f);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
    const uint32x4_t up = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
    return vbslq_u32(vceqq_f32(f, f), up, vorrq_u32(u, vdupq_n_u32(0x400000)));
  };
  vst1q_u16(&y->bits, vshrn_high_n_u32(vshrn_n_u32(rounded(value.a), 16), rounded(value.b), 16));
}

// The sums of eight rows of W for one of x, scaled and shifted.
template <class X>
void store_eight(Vec sums, const float* scales, const float* bias, X* y) {
  const Vec scale = scales ? Vec::load(scales) : Vec::set1(1.0f);
  store_eight(y, Vec::fma(sums, scale, bias ? Vec::load(bias) : Vec::zero()));
}

#endif

// y[t, r] = sum over vector (r, t) of sums [count, tokens] * scales[r] + bias[r]; rows of y are
// `y_stride` apart, and scales or bias may be null.
template <class X>
void store_outputs(const float* sums, int64_t count, int64_t tokens, const float* scales,
                   const float* bias, X* y, int64_t y_stride) {
#if defined(__AVX512F__)
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < count; r += 16) {
      const __mmask16 rows = first_lanes(std::min<int64_t>(16, count - r));
      const __m512 sum = sums_of(sums + (r * tokens + t) * 16, tokens * 16, count - r);
      const __m512 scale = scales ? _mm512_maskz_loadu_ps(rows, scales + r) : _mm512_set1_ps(1.0f);
      const __m512 shift = bias ? _mm512_maskz_loadu_ps(rows, bias + r) : _mm512_setzero_ps();
      store_lanes(y + t * y_stride + r, rows, _mm512_fmadd_ps(sum, scale, shift));
    }
#else
  for (int64_t r = 0; r < count; ++r)
    for (int64_t t = 0; t < tokens; ++t) {
      const float sum = Vec::load(sums + (r * tokens + t) * Vec::kLanes).sum();
      store(y + t * y_stride + r, sum * (scales ? scales[r] : 1.0f) + (bias ? bias[r] : 0.0f));
    }
#endif
}

// m rows of x in chunks, one pass over a block of W each, as even as can be.
struct Chunks {
  int64_t count, base, longer;  // the first `longer` have base + 1 rows
  Chunks(int64_t m, int64_t most) : count((m + most - 1) / most) {
    base = m / count, longer = m % count;
  }
  int64_t begin(int64_t c) const { return c * base + std::min(c, longer); }
  int64_t rows(int64_t c) const { return base + (c < longer); }
};

// Words of columns whose x, `lanes` floats a column, fits the first-level cache beside W.
inline int64_t piece_words(int lanes) {
  constexpr int64_t kPieceBytes = 24 * 1024;
  return std::max<int64_t>(1, kPieceBytes / (kMaskColumns * 4 * lanes));
}

// Rows of W in a block where x has one or two: the next block is fetched during one, so long rows
// go by fours; short ones by more, or what a block costs besides would take longer than its
// products, unless there would be too few blocks to share out evenly.
constexpr int64_t kMostFewRows = 32;  // of W, in any block; they stay in the second level
inline int64_t few_rows_block(int64_t rows, int64_t cols, int threads) {
  const int64_t share = rows / (8 * int64_t{threads});
  const int64_t most = std::min<int64_t>((int64_t{1} << 14) / std::max<int64_t>(cols, 1), share);
  return std::clamp<int64_t>(most / 4 * 4, 4, kMostFewRows);
}

// y[t, r] = sums[r, t] * scales[r] + bias[r] for `count` rows of W, whose sums are `stride` apart
// (a multiple of a vector, all of which may be read), and `tokens` of x; without scales or bias
// where those are null.
template <class X>
void store_transposed(const float* sums, int64_t stride, int64_t count, int64_t tokens,
                      const float* scales, const float* bias, X* y, int64_t y_stride) {
#if defined(__AVX512F__)
  for (int64_t t = 0; t < tokens; t += 16)
    for (int64_t r = 0; r < count; r += 16)
      store_square(sums + r * stride + t, stride, std::min<int64_t>(16, count - r),
                   std::min<int64_t>(16, tokens - t), scales ? scales + r : nullptr,
                   bias ? bias + r : nullptr, y + t * y_stride + r, y_stride);
#else
  int64_t first = 0;
#if defined(PYPRUNE_NEON)
  for (; first + 8 <= count; first += 8)
    for (int64_t t = 0; t < tokens; t += 8) {
      float square[64];
      transpose_tile(sums + first * stride + t, stride, square, 8);
      for (int64_t i = 0; i < std::min<int64_t>(8, tokens - t); ++i)
        store_eight(Vec::load(square + 8 * i), scales ? scales + first : nullptr,
                    bias ? bias + first : nullptr, y + (t + i) * y_stride + first);
    }
#endif
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = first; r < count; ++r)
      store(y + t * y_stride + r,
            sums[r * stride + t] * (scales ? scales[r] : 1.0f) + (bias ? bias[r] : 0.0f));
#endif
}

// Calls f with m, one of kMost, kMost - kStep, ... above zero, as a constant.
template <int kMost, int kStep = 1, class F>
void with_rows(int64_t m, F&& f) {
  if (m == kMost) {
    f(std::integral_constant<int, kMost>());
  } else if constexpr (kMost > kStep) {
    with_rows<kMost - kStep, kStep>(m, static_cast<F&&>(f));
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
