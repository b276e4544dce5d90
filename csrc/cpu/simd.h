// A fixed-width float vector for the instruction set this file is being compiled for, with loads
// that widen bf16 and fp16. Everything lives in the PYPRUNE_ISA namespace: two sets never share a
// symbol.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__AARCH64EL__)
#include <arm_neon.h>
#define PYPRUNE_NEON 1  // in the baseline of aarch64, so the portable set has it there
#endif
// Sets whose compressed rows are spread over their columns by byte shuffles (sparse_spread.h).
#if (defined(__AVX2__) && !defined(__AVX512F__)) || defined(PYPRUNE_NEON)
#define PYPRUNE_SHUFFLES 1
#endif

#include "tensor_view.h"

namespace pyprune {

// Storage types: the bit patterns, no arithmetic.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace PYPRUNE_ISA {

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float to_float(f16 h) {
#if defined(__F16C__)
  return _cvtsh_ss(h.bits);
#elif defined(PYPRUNE_NEON)
  __fp16 half;
  std::memcpy(&half, &h.bits, 2);
  return half;
#else
  uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000) << 16;
  uint32_t exp = (h.bits >> 10) & 0x1f, man = h.bits & 0x3ff, u;
  if (exp == 0x1f) {
    u = sign | 0x7f800000 | (man << 13);
  } else if (exp != 0) {
    u = sign | ((exp + 112) << 23) | (man << 13);
  } else {  // zero and subnormals: man * 2^-24, exact in fp32
    float f = static_cast<float>(man) * 5.9604644775390625e-8f;
    std::memcpy(&u, &f, 4);
    u |= sign;
  }
  float f;
  std::memcpy(&f, &u, 4);
  return f;
#endif
}

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kLanes = 16;
  __m512 v;
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
  }
  static Vec load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec fnma(Vec a, Vec b, Vec c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
  static Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec clamp(Vec a, Vec low, Vec high) {
    return {_mm512_min_ps(_mm512_max_ps(a.v, low.v), high.v)};
  }
  // To the nearest whole number, ties to even.
  static Vec round(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  float sum() const { return _mm512_reduce_add_ps(v); }
};

#elif defined(__AVX2__)

struct Vec {
  static constexpr int kLanes = 8;
  __m256 v;
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) {
    __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
  }
  static Vec load(const f16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  friend Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec fnma(Vec a, Vec b, Vec c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
  static Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  friend Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec clamp(Vec a, Vec low, Vec high) {
    return {_mm256_min_ps(_mm256_max_ps(a.v, low.v), high.v)};
  }
  static Vec round(Vec a) {
    return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  }
  float sum() const {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};

#elif defined(PYPRUNE_NEON)

// Two registers: kernels are laid out for eight lanes and sixteen such vectors, as with AVX2.
struct Vec {
  static constexpr int kLanes = 8;
  float32x4_t a, b;
  static Vec zero() { return set1(0.0f); }
  static Vec set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static Vec load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static Vec load(const bf16* p) {
    const uint16x8_t h = vld1q_u16(&p->bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)),
            vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))};
  }
  static Vec load(const f16* p) {
    const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
    return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
  }
  void store(float* p) const { vst1q_f32(p, a), vst1q_f32(p + 4, b); }
  friend Vec operator+(Vec x, Vec y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
  friend Vec operator-(Vec x, Vec y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
  friend Vec operator*(Vec x, Vec y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
  static Vec fma(Vec x, Vec y, Vec z) {
    return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)};
  }
  static Vec fnma(Vec x, Vec y, Vec z) {
    return {vfmsq_f32(z.a, x.a, y.a), vfmsq_f32(z.b, x.b, y.b)};
  }
  static Vec abs(Vec x) { return {vabsq_f32(x.a), vabsq_f32(x.b)}; }
  friend Vec operator/(Vec x, Vec y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
  // As on x86 a NaN becomes `low`.
  static Vec clamp(Vec x, Vec low, Vec high) {
    return {vminnmq_f32(vmaxnmq_f32(x.a, low.a), high.a),
            vminnmq_f32(vmaxnmq_f32(x.b, low.b), high.b)};
  }
  static Vec round(Vec x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
  float sum() const { return vaddvq_f32(vaddq_f32(a, b)); }
};

#else

// Plain loops over eight floats, for everything else: the compiler maps them to whatever the
// baseline offers.
struct Vec {
  static constexpr int kLanes = 8;
  float v[8];
  static Vec set1(float x) {
    Vec r;
    for (int i = 0; i < 8; ++i) r.v[i] = x;
    return r;
  }
  static Vec zero() { return set1(0.0f); }
  template <class T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < 8; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  void store(float* p) const {
    for (int i = 0; i < 8; ++i) p[i] = v[i];
  }
  friend Vec operator+(Vec a, Vec b) {
    for (int i = 0; i < 8; ++i) a.v[i] += b.v[i];
    return a;
  }
  friend Vec operator-(Vec a, Vec b) {
    for (int i = 0; i < 8; ++i) a.v[i] -= b.v[i];
    return a;
  }
  friend Vec operator*(Vec a, Vec b) {
    for (int i = 0; i < 8; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < 8; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static Vec fnma(Vec a, Vec b, Vec c) {
    for (int i = 0; i < 8; ++i) c.v[i] -= a.v[i] * b.v[i];
    return c;
  }
  static Vec abs(Vec a) {
    for (int i = 0; i < 8; ++i) a.v[i] = __builtin_fabsf(a.v[i]);
    return a;
  }
  friend Vec operator/(Vec a, Vec b) {
    for (int i = 0; i < 8; ++i) a.v[i] /= b.v[i];
    return a;
  }
  static Vec clamp(Vec a, Vec low, Vec high) {
    for (int i = 0; i < 8; ++i) {
      a.v[i] = a.v[i] > low.v[i] ? a.v[i] : low.v[i];
      a.v[i] = a.v[i] < high.v[i] ? a.v[i] : high.v[i];
    }
    return a;
  }
  static Vec round(Vec a) {
    for (int i = 0; i < 8; ++i) a.v[i] = __builtin_nearbyintf(a.v[i]);
    return a;
  }
  float sum() const {
    float s = 0;
    for (int i = 0; i < 8; ++i) s += v[i];
    return s;
  }
};

#endif

// Keeps what is multiplied several times in a register: as an operand of each product it would be
// as many loads, of which a core has two a cycle, or one of 64 bytes.
inline void hold(Vec& x) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(x.v));
#elif defined(__AVX2__)
  asm volatile("" : "+x"(x.v));
#elif defined(PYPRUNE_NEON)
  asm volatile("" ::"w"(x.a), "w"(x.b));
#else
  (void)x;
#endif
}

// Calls f(const T*) with the tensor's element type; only floating storage types are listed.
template <class F>
inline void with_float_type(DType t, F&& f) {
  switch (t) {
    case DType::f32:
      return f(static_cast<const float*>(nullptr));
    case DType::bf16:
      return f(static_cast<const bf16*>(nullptr));
    case DType::f16:
      return f(static_cast<const f16*>(nullptr));
    default:
      throw std::invalid_argument(std::string("expected a 16- or 32-bit float, got ") +
                                  dtype_name(t));
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
