// sparse_spread.h with AVX2.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/expand.h"
#include "cpu/simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

inline __m128i picks_of(uint8_t keep) { return load8_bytes(kPicks.pick[keep]); }

// Eight consecutive columns as floats, those of `keep` stored from p on; reads eight values,
// whatever `keep` is.
inline Vec expand8(const bf16* p, uint8_t keep) {
  // Both halves of the register see all eight values.
  const __m256i next = _mm256_broadcastsi128_si256(load16_bytes(p));
  const auto* pick = reinterpret_cast<const __m256i*>(kSpread<2, 4>.pick[keep]);
  return {_mm256_castsi256_ps(_mm256_shuffle_epi8(next, _mm256_load_si256(pick)))};
}
inline Vec expand8(const f16* p, uint8_t keep) { return {_mm256_cvtph_ps(expand_words(keep, p))}; }
inline Vec expand8(const float* p, uint8_t keep) {
  return {_mm256_castsi256_ps(expand_dwords(keep, p))};
}
inline Vec expand8(const int8_t* p, uint8_t keep) {
  const __m128i bytes = _mm_shuffle_epi8(load8_bytes(p), picks_of(keep));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
}

// What expand8_raised() multiplies values by. A byte that lands in the highest of four needs no
// sign extension: three instructions instead of five, 0.85-0.93 of the time of int8 rows with one
// to four rows of x (Zen 3). Sums of products x * q overflow from 2^104 on.
template <class T>
constexpr float kRaised = std::is_same_v<T, int8_t> ? 0x1p24f : 1.0f;

template <class T>
inline Vec expand8_raised(const T* p, uint8_t keep) {
  if constexpr (std::is_same_v<T, int8_t>) {
    int64_t bytes;
    std::memcpy(&bytes, p, 8);
    const auto* pick = reinterpret_cast<const __m256i*>(kSpread<1, 4>.pick[keep]);
    const __m256i next = _mm256_set1_epi64x(bytes);
    return {_mm256_cvtepi32_ps(_mm256_shuffle_epi8(next, _mm256_load_si256(pick)))};
  } else {
    return expand8(p, keep);
  }
}

// Eight consecutive values as floats.
template <class T>
inline Vec load8(const T* p) {
  return Vec::load(p);
}
inline Vec load8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8_bytes(p)))};
}

// The even and the odd ones of sixteen consecutive columns.
inline Vec even_columns(const bf16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
}
inline Vec odd_columns(const bf16* p) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm256_castsi256_ps(_mm256_and_si256(both, high))};
}

// A word of 64 columns, of which byte `step` says which of eight are kept.
struct KeptWord {
  const uint8_t* bytes;
  KeptWord() = default;
  explicit KeptWord(const uint8_t* at) : bytes(at) {}
  uint8_t keep(int step) const { return bytes[step]; }
  // Where the values of a step begin: at `v`, which moves on, step by step in order.
  template <class T>
  const T* take(const T*& v, int step) const {
    const T* at = v;
    v += __builtin_popcount(bytes[step]);
    return at;
  }
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
