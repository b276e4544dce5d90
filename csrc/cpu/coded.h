// bf16 matrices whose exponents are coded, without loss: about 11.4 bits a weight.
//
// Rotated left by one bit, a bf16 is a byte of exponent and a byte of mantissa and sign.
//
//   low      u8 [R, C]            the second of these bytes
//   codes    u8 [R, 3 ceil(C/8)]  three bits a weight, lowest first, eight weights in three bytes:
//                                 0 to 6 is what the exponent exceeds the row's base by, 7 an
//                                 escape
//   bases    u8 [R]
//   escapes  u8 [n]               the exponents of escaped weights, row after row, in column order
//   offsets  i64 [R + 1]          where each row's escapes start
#pragma once

#include "cpu/dispatch.h"
#include "cpu/sparse_linear.h"

namespace pyprune {

constexpr int kEscape = 7;

struct CodedViews {
  TensorView low, codes, bases, escapes, offsets;
};

struct LinearCodedArgs {
  SparseLinearArgs linear;  // its values are `low`
  CodedViews w;
};

// y[m, r] = sum_c x[m, c] * W[r, c] + bias[r]. Throws std::invalid_argument when a row's codes and
// offsets disagree: nothing outside the buffers is ever read, whatever they hold.
PYPRUNE_CPU_KERNEL(linear_coded, LinearCodedArgs)

struct UnpackCodedArgs {
  TensorView out;          // bf16 [n, C], contiguous
  const TensorView* rows;  // i64 [n], which ones; null: all
  CodedViews w;
  int threads;
};

// Rows of W. Throws as linear_coded(), and std::out_of_range for a row that is not there.
PYPRUNE_CPU_KERNEL(unpack_coded, UnpackCodedArgs)

}  // namespace pyprune
