// 64 elements at a time as bits of a word: which are kept, and moving those together or apart.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/expand.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyprune {
namespace PYPRUNE_ISA {

// Bits of the `count` <= 64 elements at `x` whose patterns under `select` differ from zero.
template <class U>
inline uint64_t bits_set(const U* x, int64_t count, U select) {
  uint64_t bits = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (count == 64) {
    const __m256i zero = _mm256_setzero_si256();
    if constexpr (sizeof(U) == 2) {
      const __m256i which = _mm256_set1_epi16(static_cast<int16_t>(select));
      const auto clear = [&](int i) {
        return _mm256_cmpeq_epi16(_mm256_and_si256(load32_bytes(x + i), which), zero);
      };
      bits = bits_of_words(clear(0), clear(16)) | bits_of_words(clear(32), clear(48)) << 32;
    } else {
      const __m256i which = _mm256_set1_epi32(static_cast<int32_t>(select));
      for (int i = 0; i < 64; i += 8) {
        const __m256i some = _mm256_and_si256(load32_bytes(x + i), which);
        bits |= bits_of_dwords(_mm256_cmpeq_epi32(some, zero)) << i;
      }
    }
    return ~bits;
  }
#endif
#if defined(__AVX512F__)
  constexpr int kLanes = 64 / sizeof(U);
  for (int i = 0; i < count; i += kLanes) {
    const int64_t left = count - i;
    if constexpr (sizeof(U) == 2) {
      const __mmask32 valid = left >= 32 ? ~0u : (1u << left) - 1;
      bits |= static_cast<uint64_t>(_mm512_test_epi16_mask(_mm512_maskz_loadu_epi16(valid, x + i),
                                                           _mm512_set1_epi16(select)))
              << i;
    } else {
      const __mmask16 valid = left >= 16 ? 0xffff : (1u << left) - 1;
      bits |= static_cast<uint64_t>(_mm512_test_epi32_mask(_mm512_maskz_loadu_epi32(valid, x + i),
                                                           _mm512_set1_epi32(select)))
              << i;
    }
  }
#else
  for (int64_t i = 0; i < count; ++i) bits |= static_cast<uint64_t>((x[i] & select) != 0) << i;
#endif
  return bits;
}

// Bits of the `count` <= 64 bool bytes at `x`.
inline uint64_t bits_of_bools(const uint8_t* x, int64_t count) {
#if defined(__AVX512F__)
  const __mmask64 valid = count >= 64 ? ~0ull : (1ull << count) - 1;
  const __m512i v = _mm512_maskz_loadu_epi8(valid, x);
  return _mm512_test_epi8_mask(v, v);
#else
  uint64_t bits = 0;
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 32 <= count; i += 32) {
    const __m256i clear = _mm256_cmpeq_epi8(load32_bytes(x + i), _mm256_setzero_si256());
    bits |= static_cast<uint64_t>(~static_cast<uint32_t>(_mm256_movemask_epi8(clear))) << i;
  }
#endif
  // Bytes become 0 or 1, and the product gathers their lowest bits in the top one.
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    std::memcpy(&eight, x + i, 8);
    constexpr uint64_t kLow7 = 0x7f7f7f7f7f7f7f7full, kOne = 0x0101010101010101ull;
    const uint64_t some = (((eight & kLow7) + kLow7) | eight) >> 7 & kOne;
    bits |= (some * 0x0102040810204080ull >> 56) << i;
  }
  for (; i < count; ++i) bits |= static_cast<uint64_t>(x[i] != 0) << i;
  return bits;
#endif
}

#if defined(__AVX512F__)
inline void compress_16(const uint16_t* x, uint64_t bits, uint16_t* out) {
  for (int half = 0; half < 2; ++half) {
    const __mmask32 keep = static_cast<__mmask32>(bits >> (32 * half));
    const __m512i v = _mm512_maskz_loadu_epi16(keep, x + 32 * half);
    const int n = __builtin_popcount(keep);
    _mm512_mask_storeu_epi16(out, static_cast<__mmask32>((1ull << n) - 1), compress_words(keep, v));
    out += n;
  }
}

inline void expand_16(const uint16_t* x, uint64_t bits, uint16_t* out) {
  for (int half = 0; half < 2; ++half) {
    const __mmask32 keep = static_cast<__mmask32>(bits >> (32 * half));
    _mm512_storeu_si512(out + 32 * half, expand_words(keep, x));
    x += __builtin_popcount(keep);
  }
}
#endif

// Stores the elements of x[0..count), count <= 64, whose bits are set, in order, and nothing from
// `end` on; what it leaves in between is unspecified.
template <class U>
inline void compress(const U* x, int64_t count, uint64_t bits, U* out, const U* end, bool vbmi2) {
#if defined(__AVX512F__)
  if constexpr (sizeof(U) == 2) {
    if (vbmi2) return compress_16(x, bits, out);
  } else {
    for (int v = 0; v < 4; ++v) {
      const __mmask16 keep = static_cast<__mmask16>(bits >> (16 * v));
      const int n = __builtin_popcount(keep);
      _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1u << n) - 1),
                               compress_dwords(keep, _mm512_maskz_loadu_epi32(keep, x + 16 * v)));
      out += n;
    }
    return;
  }
#elif defined(__AVX2__)
  if (count == 64 && end - out >= __builtin_popcountll(bits) + 8) {
    for (int i = 0; i < 64; i += 8) {
      const auto keep = static_cast<uint8_t>(bits >> i);
      if constexpr (sizeof(U) == 2)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                         compress_words(keep, load16_bytes(x + i)));
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                            compress_dwords(keep, load32_bytes(x + i)));
      out += __builtin_popcount(keep);
    }
    return;
  }
#endif
  (void)vbmi2, (void)count, (void)end;
  for (; bits; bits &= bits - 1) *out++ = x[__builtin_ctzll(bits)];
}

// Fills out[0..count), count <= 64, with the elements at `x` where bits are set and zeros
// elsewhere. Reads nothing from `end` on.
template <class U>
inline void expand(const U* x, const U* end, uint64_t bits, U* out, int64_t count, bool vbmi2) {
#if defined(__AVX512F__)
  if (count == 64) {
    if constexpr (sizeof(U) == 2) {
      if (vbmi2) return expand_16(x, bits, out);
    } else {
      for (int v = 0; v < 4; ++v) {
        const __mmask16 keep = static_cast<__mmask16>(bits >> (16 * v));
        _mm512_storeu_si512(out + 16 * v, expand_dwords(keep, x));
        x += __builtin_popcount(keep);
      }
      return;
    }
  }
#elif defined(__AVX2__)
  if (count == 64 && end - x >= __builtin_popcountll(bits) + 8) {
    for (int i = 0; i < 64; i += 8) {
      const auto keep = static_cast<uint8_t>(bits >> i);
      if constexpr (sizeof(U) == 2)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), expand_words(keep, x));
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), expand_dwords(keep, x));
      x += __builtin_popcount(keep);
    }
    return;
  }
#endif
  (void)vbmi2, (void)end;
  std::memset(out, 0, count * sizeof(U));
  for (; bits; bits &= bits - 1) out[__builtin_ctzll(bits)] = *x++;
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
