// bf16 products on aarch64, for processors with its extension BF16.
//
// `bfmmla` multiplies two rows of W by two of x, four columns of each: sixteen products, where a
// fused multiply-add of floats makes four. A register holds four columns of one row, then the same
// of the next; the sums are W's first row by x's first and second, then W's second row by those.
//
// As `vdpbf16ps` the instruction takes subnormal numbers for zero, and it makes sums that are
// subnormal zero. It rounds sums to odd (so an error may be twice that of rounding to nearest), and
// the sum of two products before it is added. Infinities and NaNs are as in other products.
#pragma once

#include <utility>

#include "cpu/sparse_spread.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Assembly (binutils 2.34 on) because this file is compiled for the baseline.
inline float32x4_t multiply_block(uint16x8_t w, uint16x8_t x, float32x4_t sums) {
  asm(".arch_extension bf16\n\tbfmmla %0.4s, %1.8h, %2.8h" : "+w"(sums) : "w"(w), "w"(x));
  return sums;
}

// Sums of two rows of W by eight of x: from a vector each to four blocks of two by two, and back.
inline void rows_to_blocks(Vec& p, Vec& q) {
  const auto wide = [](float32x4_t v) { return vreinterpretq_f64_f32(v); };
  const auto low = [&](float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vzip1q_f64(wide(a), wide(b)));
  };
  const auto high = [&](float32x4_t a, float32x4_t b) {
    return vreinterpretq_f32_f64(vzip2q_f64(wide(a), wide(b)));
  };
  const Vec first{low(p.a, q.a), high(p.a, q.a)};
  q = {low(p.b, q.b), high(p.b, q.b)};
  p = first;
}
inline void blocks_to_rows(Vec& p, Vec& q) {
  std::swap(p.b, q.a);  // so that a and b are again what the same zips take
  rows_to_blocks(p, q);
  std::swap(p.b, q.a);
}

// Eight columns of a row as bf16 numbers, where every second group of four is another row's.
struct EightPairs {
  uint16x8_t bits;
  static EightPairs expand(const bf16* p, uint8_t keep) {
    const uint8x16_t next = vreinterpretq_u8_u16(vld1q_u16(&p->bits));
    const uint8x16_t pick = vld1q_u8(kSpread<2, 2>.pick[keep]);
    return {vreinterpretq_u16_u8(vqtbl1q_u8(next, pick))};
  }
  // The upper halves of floats: int8 numbers have no lower.
  static EightPairs expand(const int8_t* p, uint8_t keep) {
    const Vec w = expand8(p, keep);
    return {vuzp2q_u16(vreinterpretq_u16_f32(w.a), vreinterpretq_u16_f32(w.b))};
  }
  static EightPairs load(const bf16* p) { return {vld1q_u16(&p->bits)}; }
  static EightPairs load(const int8_t* p) { return expand(p, 0xff); }
  void store(float* out) const {
    auto* to = reinterpret_cast<uint16_t*>(out);
    vst1_u16(to, vget_low_u16(bits));
    vst1_u16(to + 8, vget_high_u16(bits));
  }
};

// The first four of eight columns of two rows, and the others.
struct TwoBlocks {
  uint16x8_t first, second;
};
inline TwoBlocks blocks_of(EightPairs p, EightPairs q) {
  const auto wide = [](EightPairs e) { return vreinterpretq_u64_u16(e.bits); };
  return {vreinterpretq_u16_u64(vzip1q_u64(wide(p), wide(q))),
          vreinterpretq_u16_u64(vzip2q_u64(wide(p), wide(q)))};
}
// Of floats that are bf16 numbers.
inline TwoBlocks blocks_of(Vec p, Vec q) {
  const auto halves = [](float32x4_t v) { return vreinterpretq_u16_f32(v); };
  return {vuzp2q_u16(halves(p.a), halves(q.a)), vuzp2q_u16(halves(p.b), halves(q.b))};
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
