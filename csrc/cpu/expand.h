// Values that a mask keeps, spread over their places (zeros elsewhere, and nothing else is read) or
// moved together.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/spread_table.h"

namespace pyprune {
namespace PYPRUNE_ISA {

#if defined(__AVX512F__)

// Zen 4 takes the destination of vpexpand and vpcompress for an operand even where a zeroing mask
// overwrites all of it: five cycles from one use of a register to the next, where one instruction
// takes 1.3. Zeroing it first ends that, and costs an instruction that is never executed. Bytes and
// words are AVX-512 VBMI2: assembly, as callers are compiled for the common subset and check for
// it.
struct Bytes64 {
  char bytes[64];
};
inline __m512i expand_bytes(uint64_t keep, const void* p) {
  __m512i out;
  asm("vpxord %0, %0, %0\n\tvpexpandb %1, %0%{%2%}%{z%}"
      : "=v"(out)
      : "m"(*static_cast<const Bytes64*>(p)), "Yk"(static_cast<__mmask64>(keep)));
  return out;
}
inline __m512i expand_words(uint32_t keep, const void* p) {
  __m512i out;
  asm("vpxord %0, %0, %0\n\tvpexpandw %1, %0%{%2%}%{z%}"
      : "=v"(out)
      : "m"(*static_cast<const Bytes64*>(p)), "Yk"(static_cast<__mmask32>(keep)));
  return out;
}
inline __m512 expand_floats(__mmask16 keep, const void* p) {
  __m512 out;
  asm("vpxord %0, %0, %0\n\tvexpandps %1, %0%{%2%}%{z%}"
      : "=v"(out)
      : "m"(*static_cast<const Bytes64*>(p)), "Yk"(keep));
  return out;
}

inline __m512i expand_dwords(__mmask16 keep, const void* p) {
  return _mm512_castps_si512(expand_floats(keep, p));
}
inline __m512i compress_words(uint32_t keep, __m512i v) {
  __m512i out;
  asm("vpxord %0, %0, %0\n\tvpcompressw %1, %0%{%2%}%{z%}"
      : "=&v"(out)
      : "v"(v), "Yk"(static_cast<__mmask32>(keep)));
  return out;
}
inline __m512i compress_dwords(__mmask16 keep, __m512i v) {
  __m512i out;
  asm("vpxord %0, %0, %0\n\tvpcompressd %1, %0%{%2%}%{z%}" : "=&v"(out) : "v"(v), "Yk"(keep));
  return out;
}

#elif defined(__AVX2__)

// Eight at a time, by shuffles from a table. What lies behind the kept ones is unspecified when
// they are moved together; spreading reads eight, whatever `keep` is.
inline __m128i load8_bytes(const void* p) {
  return _mm_loadl_epi64(static_cast<const __m128i*>(p));
}
inline __m128i load16_bytes(const void* p) {
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
}
inline __m128i kept_lanes(uint8_t keep) { return load8_bytes(kCompress<1>.from[keep]); }

inline __m256i compress_dwords(uint8_t keep, __m256i v) {
  return _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(kept_lanes(keep)));
}
inline __m128i compress_words(uint8_t keep, __m128i v) {
  return _mm_shuffle_epi8(v, load16_bytes(kCompress<2>.from[keep]));
}
inline __m256i expand_dwords(uint8_t keep, const void* p) {
  const __m256i pick = _mm256_cvtepi8_epi32(load8_bytes(kPicks.pick[keep]));
  const __m256i next = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  // The lowest three bits choose; the sign says that nothing is kept.
  return _mm256_andnot_si256(_mm256_srai_epi32(pick, 31), _mm256_permutevar8x32_epi32(next, pick));
}
inline __m128i expand_words(uint8_t keep, const void* p) {
  return _mm_shuffle_epi8(load16_bytes(p), load16_bytes(kSpread<2, 2>.pick[keep]));
}

// A bit for each element that compares true, which is -1 in vectors of integers.
inline uint64_t bits_of_words(__m256i low, __m256i high) {
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xd8);
  return static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
}
inline uint64_t bits_of_dwords(__m256i v) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(v)));
}
inline __m256i load32_bytes(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}

#endif

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
