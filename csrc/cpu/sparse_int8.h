// y[m, r] = scale[r] * sum_c x[m, c] * q[r, c] + bias[r], with q int8, dense, 2:4 or bitmap as in
// sparse_linear.h. An int8 number is a bf16 number exactly (eight significant bits), so wherever
// bf16 values are multiplied these are too.
#pragma once

#include "cpu/sparse_linear.h"

namespace pyprune {

struct SparseInt8Args {
  SparseLinearArgs linear;  // its values are i8
  TensorView scales;        // f32 [R], contiguous
};

// Of a 2:4 or bitmap compressed W. Throws std::invalid_argument as sparse_linear() does.
PYPRUNE_CPU_KERNEL(sparse_int8, SparseInt8Args)

// Of an uncompressed W, linear_int8.cpp.
PYPRUNE_CPU_KERNEL(linear_int8, SparseInt8Args)

// x rows up to which int8 values are widened in registers; above, some rows of W at a time are
// widened to bf16 in memory and given to sparse_linear(). Not so with bf16 x of so many rows that
// tables pay (sparse_table.h, bitmap_table.h), where bf16 is native, nor where lists do
// (sparse_panels.h).
constexpr int64_t kInt8FewRows = 16;

}  // namespace pyprune
