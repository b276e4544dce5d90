// 2:4 int8 values with several rows of bf16 x, gathered as sparse_gather.h says.
#pragma once

#include "cpu/sparse_gather.h"
#include "cpu/widen_int8.h"

#if defined(__AVX512F__)

namespace pyprune {
namespace PYPRUNE_ISA {

// 64 columns a step: 32 bytes of each of two rows, widened together (Widen64 says how). That leaves
// columns 0-15 and 32-47 of both rows in one register, the others in a second, so x lies in that
// order and each permute reads one register of it.
struct GatherInt8 {
  using Value = int8_t;
  using Element = bf16;
  using Register = __m512i;
  static constexpr int kColumns = 64, kStored = 32, kRegisters = 2;
  static constexpr int kRows = kGatherPairRows;
  static int64_t place(int64_t c) { return ((c & 16) << 1) + ((c & 32) >> 1) + (c & 15); }
  static constexpr int side(int m) { return m <= 2 ? 2 : 1; }
  static Register load(const bf16* x) { return _mm512_load_si512(x); }
  static Register pick(__m512i columns, Register x) { return _mm512_permutexvar_epi16(columns, x); }
  static __m512 product(__m512 acc, Register a, Register b) {
    return GatherBf16::product(acc, a, b);
  }
  static void decode(const PairOfRows<int8_t>& rows, int64_t part, Register* values,
                     __m512i* which) {
    const __m512i q = two_rows(rows.v[0] + kStored * part, rows.v[1] + kStored * part);
    const __m512i a = _mm512_abs_epi8(q);
    const __m512i low =
        lookup(_mm512_load_si512(kMagnitudes.low), a, _mm512_load_si512(kMagnitudes.low + 64));
    const __m512i high =
        lookup(_mm512_load_si512(kMagnitudes.high), a, _mm512_load_si512(kMagnitudes.high + 64));
    // high | (q & 0x80)
    const __m512i up = _mm512_ternarylogic_epi32(high, q, _mm512_set1_epi8(-128), 0xf8);
    values[0] = _mm512_unpacklo_epi8(low, up);
    values[1] = _mm512_unpackhi_epi8(low, up);
    const __m512i meta = two_rows_words(rows.meta[0] + 8 * part, rows.meta[1] + 8 * part);
    which[0] = columns(meta, 0);
    which[1] = columns(meta, 16);
  }

 private:
  // Bytes of the table of 128 that starts with `first` and ends with `last`.
  static __m512i lookup(__m512i first, __m512i index, __m512i last) {
    asm("vpermi2b %2, %1, %0" : "+v"(index) : "v"(first), "v"(last));
    return index;
  }
  // 64 bits of metadata of two rows over the halves of a register.
  static __m512i two_rows_words(const uint8_t* low, const uint8_t* high) {
    int64_t first, second;
    std::memcpy(&first, low, 8);
    std::memcpy(&second, high, 8);
    return _mm512_mask_set1_epi64(_mm512_set1_epi64(first), 0xf0, second);
  }
  // Where in its register of x each value's column is; a permute reads five bits a lane. Values
  // 0-7 and 16-23 of a row have bits 0-15 and 32-47, the others the sixteen after those.
  static __m512i columns(__m512i meta, int shift) {
    const __m512i shifts = _mm512_add_epi8(
        _mm512_set1_epi16(static_cast<int16_t>(shift)),
        _mm512_set_epi64(0x2e002c002a0028, 0x26002400220020, 0x0e000c000a0008, 0x06000400020000,
                         0x2e002c002a0028, 0x26002400220020, 0x0e000c000a0008, 0x06000400020000));
    const __m512i groups =
        _mm512_set_epi64(0x1c001c00180018, 0x14001400100010, 0x0c000c00080008, 0x04000400000000,
                         0x1c001c00180018, 0x14001400100010, 0x0c000c00080008, 0x04000400000000);
    __m512i codes;
    asm("vpmultishiftqb %2, %1, %0" : "=v"(codes) : "v"(shifts), "v"(meta));
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(3), groups, 0xea);
  }
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
