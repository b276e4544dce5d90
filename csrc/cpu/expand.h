// Values that a mask keeps, spread over their places (zeros elsewhere, and nothing else is read) or
// moved together.
#pragma once

#if defined(__AVX512F__)

#include <immintrin.h>

#include <cstdint>

namespace pyprune {
namespace PYPRUNE_ISA {

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

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
