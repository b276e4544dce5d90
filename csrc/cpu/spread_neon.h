// sparse_spread.h with NEON: a byte shuffle gives zero for every index past its table.
#pragma once

#include <cstdint>

#include "cpu/simd.h"
#include "cpu/spread_table.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Two vectors of four elements of 32 bits, each byte of them looked up in `next`.
template <int kValue>
inline uint32x4_t spread4(uint8x16_t next, uint8_t keep, int half) {
  return vreinterpretq_u32_u8(
      vqtbl1q_u8(next, vld1q_u8(kSpread<kValue, 4>.pick[keep] + 16 * half)));
}

// Eight consecutive columns as floats, those of `keep` stored from p on; reads eight values,
// whatever `keep` is.
inline Vec expand8(const bf16* p, uint8_t keep) {
  const uint8x16_t next = vreinterpretq_u8_u16(vld1q_u16(&p->bits));
  return {vreinterpretq_f32_u32(spread4<2>(next, keep, 0)),
          vreinterpretq_f32_u32(spread4<2>(next, keep, 1))};
}
inline Vec expand8(const f16* p, uint8_t keep) {
  const uint8x16_t next = vreinterpretq_u8_u16(vld1q_u16(&p->bits));
  const float16x8_t h =
      vreinterpretq_f16_u8(vqtbl1q_u8(next, vld1q_u8(kSpread<2, 2>.pick[keep])));
  return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
inline Vec expand8(const float* p, uint8_t keep) {
  const uint8x16x2_t next = {{vreinterpretq_u8_f32(vld1q_f32(p)),  //
                              vreinterpretq_u8_f32(vld1q_f32(p + 4))}};
  const uint8_t* pick = kSpread<4, 4>.pick[keep];
  return {vreinterpretq_f32_u8(vqtbl2q_u8(next, vld1q_u8(pick))),
          vreinterpretq_f32_u8(vqtbl2q_u8(next, vld1q_u8(pick + 16)))};
}
// A byte in the highest of four is a number of 24 binary places.
inline Vec expand8(const int8_t* p, uint8_t keep) {
  const uint8x16_t next = vcombine_u8(vreinterpret_u8_s8(vld1_s8(p)), vdup_n_u8(0));
  return {vcvtq_n_f32_s32(vreinterpretq_s32_u32(spread4<1>(next, keep, 0)), 24),
          vcvtq_n_f32_s32(vreinterpretq_s32_u32(spread4<1>(next, keep, 1)), 24)};
}

// The even and the odd ones of sixteen consecutive columns.
inline Vec even_columns(const bf16* p) {
  const auto even = [](const bf16* at) {
    return vreinterpretq_f32_u32(
        vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(&at->bits)), 16));
  };
  return {even(p), even(p + 8)};
}
inline Vec odd_columns(const bf16* p) {
  const auto odd = [](const bf16* at) {
    const uint32x4_t high = vdupq_n_u32(0xffff0000u);
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(vld1q_u16(&at->bits)), high));
  };
  return {odd(p), odd(p + 8)};
}

// Bits set in a byte. Counting them takes the way through a vector register here.
struct BitCounts {
  uint8_t of[256];
  constexpr BitCounts() : of() {
    for (int byte = 1; byte < 256; ++byte) of[byte] = static_cast<uint8_t>((byte & 1) + of[byte / 2]);
  }
};
constexpr BitCounts kBitCounts;
inline int count_kept(uint8_t keep) { return kBitCounts.of[keep]; }

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
