// int8 numbers as bf16, which holds each of them exactly.
#pragma once

#include <cstdint>

#include "cpu/sparse_bf16.h"

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int64_t kWidenRun = 8;

#if defined(__AVX512F__)

// The two bytes of every magnitude as a bf16 number.
struct MagnitudeBytes {
  uint8_t low[128], high[128];
  constexpr MagnitudeBytes() : low(), high() {
    for (int a = 1; a < 128; ++a) {
      int e = 0;
      while (a >> (e + 1)) ++e;
      const int bits = ((127 + e) << 7) | ((a << (7 - e)) & 127);
      low[a] = static_cast<uint8_t>(bits & 255);
      high[a] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
alignas(64) constexpr MagnitudeBytes kMagnitudes;

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512vbmi2,avx512vpopcntdq")

// Bytes -127 to 127 as bf16, by looking both bytes of the magnitude up: half the instructions of
// the way through fp32. Word 8 l + j of w[h] is byte 16 l + 8 h + j.
struct Widen64 {
  __m512i low[2], high[2];
  Widen64() {
    for (int h = 0; h < 2; ++h) {
      low[h] = _mm512_load_si512(kMagnitudes.low + 64 * h);
      high[h] = _mm512_load_si512(kMagnitudes.high + 64 * h);
    }
  }
  void operator()(__m512i q, __m512bh* w) const {
    const __m512i a = _mm512_abs_epi8(q);
    const __m512i lo = _mm512_permutex2var_epi8(low[0], a, low[1]);
    const __m512i hi = _mm512_permutex2var_epi8(high[0], a, high[1]);
    // hi | (q & 0x80)
    const __m512i up = _mm512_ternarylogic_epi32(hi, q, _mm512_set1_epi8(-128), 0xf8);
    w[0] = words_of(_mm512_unpacklo_epi8(lo, up));
    w[1] = words_of(_mm512_unpackhi_epi8(lo, up));
  }
};

#pragma GCC pop_options

// Where column c of a word of 64 goes: kWidenRun of them at a time stay neighbours.
inline int64_t widen64_place(int64_t c) { return ((c & 8) << 2) + ((c >> 4) << 3) + (c & 7); }

#endif

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
