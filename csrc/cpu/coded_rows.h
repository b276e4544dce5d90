// Rows of a coded matrix (coded.h), decoded 64 columns at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "cpu/coded.h"
#include "cpu/simd.h"
#include "cpu/sparse_rows.h"

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int64_t kCodeBytes = 3 * kMaskColumns / 8;  // of 64 columns
inline int64_t code_bytes(int64_t columns) { return 3 * ((columns + 7) / 8); }

// Where a decoder stands in a row.
struct CodedRow {
  const uint8_t *low, *codes;    // of the next column
  const uint8_t *escapes, *end;  // the next one, and where the row's end
  uint8_t base;
  bool sound;  // nothing was escaped that has no escape; where it has none, none is read

  // After the last column: whether the row had as many escapes as its offsets say.
  bool complete() const { return sound && escapes == end; }
};

// A coded matrix by its raw pointers.
struct CodedMatrix {
  const uint8_t *low, *codes, *bases, *escapes;
  const int64_t* offsets;
  int64_t rows, cols, count;  // count: escapes of all rows

  explicit CodedMatrix(const CodedViews& v)
      : low(v.low.ptr<const uint8_t>()),
        codes(v.codes.ptr<const uint8_t>()),
        bases(v.bases.ptr<const uint8_t>()),
        escapes(v.escapes.ptr<const uint8_t>()),
        offsets(v.offsets.ptr<const int64_t>()),
        rows(v.low.shape[0]),
        cols(v.low.shape[1]),
        count(v.escapes.numel()) {}

  CodedRow row(int64_t r) const {
    const int64_t first = offsets[r], end = offsets[r + 1];
    const bool inside = 0 <= first && first <= end && end <= count;
    return {low + r * cols,
            codes + r * code_bytes(cols),
            escapes + (inside ? first : 0),
            escapes + (inside ? end : 0),
            bases[r],
            inside};
  }
};

[[noreturn]] inline void refuse_row(int64_t r) {
  throw std::invalid_argument("codes: row " + std::to_string(r) +
                              " has escapes that do not match its row_offsets");
}

inline uint16_t joined(unsigned exponent, unsigned low) {
  const unsigned rotated = exponent << 8 | low;
  return static_cast<uint16_t>(rotated >> 1 | rotated << 15);
}

inline unsigned next_escape(CodedRow& row) {
  if (row.escapes < row.end) return *row.escapes++;
  row.sound = false;
  return 0;
}

// At most 64 columns in plain steps; zeros up to the 64th.
inline void decode_word(CodedRow& row, int64_t columns, uint16_t* out) {
  for (int64_t c = 0; c < columns; c += 8, row.codes += 3) {
    const unsigned codes = row.codes[0] | row.codes[1] << 8 | row.codes[2] << 16;
    for (int64_t j = 0; j < std::min<int64_t>(8, columns - c); ++j) {
      const unsigned code = codes >> (3 * j) & 7;
      const unsigned exponent = code == kEscape ? next_escape(row) : row.base + code;
      out[c + j] = joined(exponent & 255, *row.low++);
    }
  }
  std::fill(out + columns, out + kMaskColumns, uint16_t{0});
}

#if defined(__AVX512F__)

// Byte tables of permutes: where the bytes of codes go, 3 j + i to 8 j + i, and the pairs of low
// byte (of the first operand) and exponent (of the second) of 32 columns.
struct CodedBytes {
  uint8_t spread[64], pairs[2][64];
  constexpr CodedBytes() : spread(), pairs() {
    for (int i = 0; i < 64; ++i) spread[i] = static_cast<uint8_t>(3 * (i / 8) + i % 8);
    for (int h = 0; h < 2; ++h)
      for (int i = 0; i < 64; ++i)
        pairs[h][i] = static_cast<uint8_t>(32 * h + i / 2 + (i % 2 ? 64 : 0));
  }
};
alignas(64) constexpr CodedBytes kCodedBytes;

#pragma GCC push_options
#pragma GCC target("avx512vbmi,avx512vbmi2")

// 64 columns in registers: two vectors of 32 bf16 numbers, in order.
struct Decode64 {
  __m512i spread = _mm512_load_si512(kCodedBytes.spread);
  __m512i pairs[2] = {_mm512_load_si512(kCodedBytes.pairs[0]),
                      _mm512_load_si512(kCodedBytes.pairs[1])};
  __m512i shifts = _mm512_set1_epi64(0x15120f0c09060300);  // code j of eight begins at bit 3 j
  __m512i escape = _mm512_set1_epi8(kEscape);

  // The word at `low` and `codes`. kTail: the one that the matrix ends in, `columns` of its 64.
  // `escapes` goes on to the next; where `end` is nearer than that none is read, and the row is not
  // sound.
  template <bool kTail>
  void word(const uint8_t* low, const uint8_t* codes, const uint8_t*& escapes, const uint8_t* end,
            bool& sound, __m512i base, int64_t columns, __m512i* w) const {
    const uint64_t valid = kTail ? (uint64_t{1} << columns) - 1 : ~uint64_t{0};
    const __m512i bytes =
        kTail ? _mm512_maskz_loadu_epi8((uint64_t{1} << code_bytes(columns)) - 1, codes)
              : _mm512_maskz_loadu_epi64(0x7, codes);
    const __m512i bits =
        _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(spread, bytes));
    const __m512i code = _mm512_and_si512(bits, escape);
    uint64_t escaped = _mm512_cmpeq_epi8_mask(code, escape) & valid;
    int64_t count = popcount(escaped);
    if (__builtin_expect(end - escapes < count, 0)) {
      asm volatile("");  // keeps it a branch: a conditional move would take the mask through
                         // general registers and back
      escaped = 0;
      count = 0;
      sound = false;
    }
    const __m512i exponent =
        _mm512_mask_expandloadu_epi8(_mm512_add_epi8(code, base), escaped, escapes);
    escapes += count;
    const __m512i second = kTail ? _mm512_maskz_loadu_epi8(valid, low) : _mm512_loadu_si512(low);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512i rotated = _mm512_permutex2var_epi8(second, pairs[h], exponent);
      w[h] = _mm512_shrdi_epi16(rotated, rotated, 1);
      if (kTail) w[h] = _mm512_maskz_mov_epi16(static_cast<__mmask32>(valid >> (32 * h)), w[h]);
    }
  }
};

// The next `columns` columns of a row as bf16, padded with zeros to whole words of 64.
inline void decode(CodedRow& row, int64_t columns, bf16* out) {
  const Decode64 decode;
  const __m512i base = _mm512_set1_epi8(static_cast<char>(row.base));
  __m512i w[2];
  int64_t c = 0;
  const auto store = [&] {
    _mm512_storeu_si512(out + c, w[0]);
    _mm512_storeu_si512(out + c + 32, w[1]);
    row.low += kMaskColumns;
    row.codes += kCodeBytes;
  };
  for (; c + kMaskColumns <= columns; c += kMaskColumns) {
    decode.word<false>(row.low, row.codes, row.escapes, row.end, row.sound, base, 0, w);
    store();
  }
  if (c < columns) {
    decode.word<true>(row.low, row.codes, row.escapes, row.end, row.sound, base, columns - c, w);
    store();
  }
}

#pragma GCC pop_options

#else

#if defined(__AVX2__)

// 32 columns but for their escapes, of which the positions are returned as bits. A code is three
// bits of the 16 that begin at a byte: a product moves them to the top, a shift to the bottom.
inline uint32_t decode32(__m128i codes, uint8_t base, const uint8_t* low, uint16_t* out) {
  const __m256i wide = _mm256_broadcastsi128_si256(codes);
  const __m256i even = _mm256_setr_epi8(0, 1, 0, 1, 0, 1, 1, 2, 1, 2, 1, 2, 2, -1, 2, -1,  //
                                        6, 7, 6, 7, 6, 7, 7, 8, 7, 8, 7, 8, 8, -1, 8, -1);
  const __m256i odd = _mm256_setr_epi8(3, 4, 3, 4, 3, 4, 4, 5, 4, 5, 4, 5, 5, -1, 5, -1,  //
                                       9, 10, 9, 10, 9, 10, 10, 11, 10, 11, 10, 11, 11, -1, 11, -1);
  const __m256i up =
      _mm256_setr_epi16(1 << 13, 1 << 10, 1 << 7, 1 << 12, 1 << 9, 1 << 6, 1 << 11, 1 << 8,  //
                        1 << 13, 1 << 10, 1 << 7, 1 << 12, 1 << 9, 1 << 6, 1 << 11, 1 << 8);
  const auto words = [&](__m256i bytes) {
    return _mm256_srli_epi16(_mm256_mullo_epi16(_mm256_shuffle_epi8(wide, bytes), up), 13);
  };
  const __m256i code = _mm256_packus_epi16(words(even), words(odd));
  const __m256i exponent = _mm256_add_epi8(code, _mm256_set1_epi8(static_cast<char>(base)));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low));
  const auto rotated = [](__m256i x) {
    return _mm256_or_si256(_mm256_srli_epi16(x, 1), _mm256_slli_epi16(x, 15));
  };
  const __m256i a = rotated(_mm256_unpacklo_epi8(second, exponent));
  const __m256i b = rotated(_mm256_unpackhi_epi8(second, exponent));
  auto* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(to + 1, _mm256_permute2x128_si256(a, b, 0x31));
  const __m256i escaped = _mm256_cmpeq_epi8(code, _mm256_set1_epi8(kEscape));
  return static_cast<uint32_t>(_mm256_movemask_epi8(escaped));
}

// The same of 64 columns.
inline uint64_t decode64(const uint8_t* codes, uint8_t base, const uint8_t* low, uint16_t* out) {
  // 12 bytes of codes each; the second load ends where the word's codes do.
  const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
  const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 8));
  const uint64_t escaped = decode32(first, base, low, out);
  return escaped | uint64_t{decode32(_mm_srli_si128(second, 4), base, low + 32, out + 32)} << 32;
}

#elif defined(PYPRUNE_NEON)

// The two bytes in which each code of eight begins, for the four groups of codes in 16 bytes from
// `first` on; a code that ends within its byte needs no second one.
struct CodeBytes {
  uint8_t of[4][16];
  constexpr explicit CodeBytes(int first) : of() {
    for (int g = 0; g < 4; ++g)
      for (int j = 0; j < 8; ++j) {
        const int byte = first + 3 * g + 3 * j / 8;
        of[g][2 * j] = static_cast<uint8_t>(byte);
        of[g][2 * j + 1] = static_cast<uint8_t>(j < 6 ? byte + 1 : 0xff);
      }
  }
};
// The second 16 bytes of codes end where the word's do.
constexpr CodeBytes kCodeBytesOf[2] = {CodeBytes(0), CodeBytes(4)};

// 64 columns but for their escapes, of which the positions are returned as bits.
inline uint64_t decode64(const uint8_t* codes, uint8_t base, const uint8_t* low, uint16_t* out) {
  static const int16_t begins[8] = {0, -3, -6, -1, -4, -7, -2, -5};
  static const uint8_t weights[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const int16x8_t shifts = vld1q_s16(begins);
  const uint8x16_t bits = vld1q_u8(weights), escape = vdupq_n_u8(kEscape);
  const uint8x16_t both[2] = {vld1q_u8(codes), vld1q_u8(codes + 8)};
  const auto eight = [&](int g) {
    const uint8x16_t at = vld1q_u8(kCodeBytesOf[g / 4].of[g % 4]);
    const uint16x8_t words = vreinterpretq_u16_u8(vqtbl1q_u8(both[g / 4], at));
    return vreinterpretq_u8_u16(vshlq_u16(words, shifts));
  };
  uint8x16_t escaped[4];
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    const uint8x16_t code = vandq_u8(vuzp1q_u8(eight(2 * q), eight(2 * q + 1)), escape);
    const uint8x16_t exponent = vaddq_u8(code, vdupq_n_u8(base)), second = vld1q_u8(low + 16 * q);
    const auto rotated = [](uint8x16_t v) {
      const uint16x8_t x = vreinterpretq_u16_u8(v);
      return vsliq_n_u16(vshrq_n_u16(x, 1), x, 15);
    };
    vst1q_u16(out + 16 * q, rotated(vzip1q_u8(second, exponent)));
    vst1q_u16(out + 16 * q + 8, rotated(vzip2q_u8(second, exponent)));
    escaped[q] = vandq_u8(vceqq_u8(code, escape), bits);
  }
  // Eight lanes of weights add up to a byte of the answer.
  const uint8x16_t pairs =
      vpaddq_u8(vpaddq_u8(escaped[0], escaped[1]), vpaddq_u8(escaped[2], escaped[3]));
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(pairs, pairs)), 0);
}

#endif

#if defined(__AVX2__) || defined(PYPRUNE_NEON)

// Words of 64 columns that are decoded before their escapes are put in.
constexpr int64_t kDecodeWords = 8;

// `words` of them. How many escapes a word has cannot be foreseen, and a loop over each word's
// would be mispredicted every time: their positions are noted four at a time, however many there
// are, and gone through in one loop.
inline void decode_words(CodedRow& row, int64_t words, uint16_t* out) {
  uint16_t places[kDecodeWords * kMaskColumns + 4];
  int64_t count = 0;
  for (int64_t k = 0; k < words; ++k) {
    uint64_t escaped = decode64(row.codes + k * kCodeBytes, row.base, row.low + k * kMaskColumns,
                                out + k * kMaskColumns);
    const int64_t found = popcount(escaped);
    for (int64_t j = 0; j < found || j == 0; j += 4)
      for (int64_t i = j; i < j + 4; ++i, escaped &= escaped - 1)
        places[count + i] =
            static_cast<uint16_t>(k * kMaskColumns + __builtin_ctzll(escaped | 1ull << 63));
    count += found;
  }
  const int64_t there = std::min<int64_t>(count, row.end - row.escapes);
  for (int64_t i = 0; i < there; ++i) out[places[i]] = joined(row.escapes[i], row.low[places[i]]);
  row.sound &= there == count;
  row.escapes += there;
  row.low += words * kMaskColumns;
  row.codes += words * kCodeBytes;
}

#endif

// The next `columns` columns of a row as bf16, padded with zeros to whole words of 64.
inline void decode(CodedRow& row, int64_t columns, bf16* out) {
  auto* to = reinterpret_cast<uint16_t*>(out);
  int64_t c = 0;
#if defined(__AVX2__) || defined(PYPRUNE_NEON)
  while (c + kMaskColumns <= columns) {
    const int64_t words = std::min(kDecodeWords, (columns - c) / kMaskColumns);
    decode_words(row, words, to + c);
    c += words * kMaskColumns;
  }
#endif
  for (; c < columns; c += kMaskColumns)
    decode_word(row, std::min(kMaskColumns, columns - c), to + c);
}

#endif

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
