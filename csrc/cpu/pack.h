// Dense matrices to and from the two packed layouts. Values move as bit patterns.
//
//   2:4     values [R, C/2], meta u8 [R, C/8]: per group of 4 the 2-bit indices of its two kept
//           elements, ascending, the lower in the low bits; the first group in the low nibble
//   bitmap  values [nnz], bitmap u8 [R, ceil(C/8)] (bit c%8 of byte c/8), row_offsets i64 [R+1]
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

struct Pack24Args {
  TensorView values;  // w's dtype [R, C/2], contiguous
  TensorView meta;    // u8 [R, C/8], contiguous
  TensorView w;       // f32 | bf16 | f16 [R, C], unit stride along C
  TensorView mask;    // bool [R, C], unit stride along C; data null: non-zero elements are kept
  int64_t* overfull;  // out: the first group (flat index) that keeps more than two, or -1
  int threads;
};

struct Unpack24Args {
  TensorView w;       // [R, C], contiguous
  TensorView values;  // w's dtype [R, C/2], contiguous
  TensorView meta;    // u8 [R, C/8], contiguous
  int threads;
};

struct BitmapRowsArgs {
  TensorView bitmap;  // u8 [R, ceil(C/8)], contiguous
  TensorView counts;  // i64 [R], contiguous: kept elements of each row
  TensorView w;       // f32 | bf16 | f16 [R, C], unit stride along C
  TensorView mask;    // bool [R, C], unit stride along C; data null: non-zero bit patterns are kept
  int threads;
};

// Moves kept elements from `w` to `values` (pack) or back, the rest becoming +0 (unpack).
struct BitmapValuesArgs {
  TensorView w;            // [R, C], unit stride along C
  TensorView values;       // w's dtype [nnz], contiguous
  TensorView bitmap;       // u8 [R, ceil(C/8)], contiguous
  TensorView row_offsets;  // i64 [R+1], contiguous
  int64_t* broken;         // out: the first row whose offsets disagree with its bits, or -1
  bool pack;
  int threads;
};

PYPRUNE_CPU_KERNEL(pack_24, Pack24Args)
PYPRUNE_CPU_KERNEL(unpack_24, Unpack24Args)
PYPRUNE_CPU_KERNEL(pack_bitmap_rows, BitmapRowsArgs)
PYPRUNE_CPU_KERNEL(move_bitmap_values, BitmapValuesArgs)

}  // namespace pyprune
