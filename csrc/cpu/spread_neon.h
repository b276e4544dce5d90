// sparse_spread.h with NEON: a byte shuffle gives zero for every index past its table.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"
#include "cpu/spread_table.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// An address in a register of its own: the compiler would rather add its parts in every load, which
// takes more instructions where two loads follow from it, and makes no pair of those.
template <class T>
inline const T* fixed(const T* p) {
  asm("" : "+r"(p));
  return p;
}

// Eight elements of 32 bits, their bytes looked up in `next`.
template <int kValue>
inline uint32x4x2_t spread8(uint8x16_t next, uint8_t keep) {
  const uint8_t* pick = fixed(kSpread<kValue, 4>.pick[keep]);
  const uint8x16_t first = vld1q_u8(pick), second = vld1q_u8(pick + 16);
  return {{vreinterpretq_u32_u8(vqtbl1q_u8(next, first)),
           vreinterpretq_u32_u8(vqtbl1q_u8(next, second))}};
}

// Eight consecutive columns as floats, those of `keep` stored from p on; reads eight values,
// whatever `keep` is.
inline Vec expand8(const bf16* p, uint8_t keep) {
  const uint8x16_t next = vreinterpretq_u8_u16(vld1q_u16(&p->bits));
  const uint32x4x2_t spread = spread8<2>(next, keep);
  return {vreinterpretq_f32_u32(spread.val[0]), vreinterpretq_f32_u32(spread.val[1])};
}
inline Vec expand8(const f16* p, uint8_t keep) {
  const uint8x16_t next = vreinterpretq_u8_u16(vld1q_u16(&p->bits));
  const float16x8_t h = vreinterpretq_f16_u8(vqtbl1q_u8(next, vld1q_u8(kSpread<2, 2>.pick[keep])));
  return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
inline Vec expand8(const float* p, uint8_t keep) {
  const uint8x16x2_t next = {{vreinterpretq_u8_f32(vld1q_f32(p)),  //
                              vreinterpretq_u8_f32(vld1q_f32(p + 4))}};
  const uint8_t* pick = fixed(kSpread<4, 4>.pick[keep]);
  const uint8x16_t first = vld1q_u8(pick), second = vld1q_u8(pick + 16);
  return {vreinterpretq_f32_u8(vqtbl2q_u8(next, first)),
          vreinterpretq_f32_u8(vqtbl2q_u8(next, second))};
}
// A byte in the highest of four is a number of 24 binary places.
inline Vec expand8(const int8_t* p, uint8_t keep) {
  const uint8x16_t next = vcombine_u8(vreinterpret_u8_s8(vld1_s8(p)), vdup_n_u8(0));
  const uint32x4x2_t spread = spread8<1>(next, keep);
  return {vcvtq_n_f32_s32(vreinterpretq_s32_u32(spread.val[0]), 24),
          vcvtq_n_f32_s32(vreinterpretq_s32_u32(spread.val[1]), 24)};
}

// As in spread_avx2.h: nothing to gain here.
template <class T>
constexpr float kRaised = 1.0f;
template <class T>
inline Vec expand8_raised(const T* p, uint8_t keep) {
  return expand8(p, keep);
}

// The even and the odd ones of sixteen consecutive columns.
inline Vec even_columns(const bf16* p) {
  const auto even = [](const bf16* at) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(&at->bits)), 16));
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

// A word of 64 columns, of which byte `step` says which of eight are kept. Bits are counted in
// vector registers here, so for all eight bytes at once: byte k of `ends` is the number of values
// up to its end.
struct KeptWord {
  uint64_t bits, ends;
  KeptWord() = default;
  explicit KeptWord(const uint8_t* at) {
    std::memcpy(&bits, at, 8);
    const uint8x8_t counts = vcnt_u8(vld1_u8(fixed(at)));
    ends = vget_lane_u64(vreinterpret_u64_u8(counts), 0) * 0x0101010101010101u;
  }
  uint8_t keep(int step) const { return static_cast<uint8_t>(bits >> (8 * step)); }
  // Where the values of a step begin. `v` is where the word's do, and moves on with the last step.
  template <class T>
  const T* take(const T*& v, int step) const {
    const T* at = step ? fixed(v + (ends >> (8 * step - 8) & 255)) : v;
    if (step == 7) v += ends >> 56;
    return at;
  }
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
