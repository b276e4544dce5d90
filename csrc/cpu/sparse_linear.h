// y[m, r] = sum_c x[m, c] * W[r, c] + bias[r], with W dense, 2:4 or bitmap compressed.
//
//   dense     values [R, C]
//   sparse24  values [R, C/2]; meta u8 [R, C/8]: per group of four columns two 2-bit column
//   numbers,
//             ascending, the first in the low bits, the first group in the low nibble
//   bitmap    values [nnz], row after row; meta u8 [R, ceil(C/8)]: one bit a column, lowest first;
//             offsets i64 [R + 1]: where each row's values start
#pragma once

#include "cpu/dispatch.h"
#include "tensor_view.h"

namespace pyprune {

enum class WeightFormat : int { dense, sparse24, bitmap };

struct SparseLinearArgs {
  WeightFormat format;
  TensorView y;               // f32 | bf16 [M, R], contiguous
  TensorView x;               // f32 | bf16 [M, C], unit stride along C
  int64_t rows, cols;         // of W
  TensorView values;          // f32 | bf16 | f16, contiguous
  const TensorView* meta;     // null when dense
  const TensorView* offsets;  // bitmap only
  const TensorView* bias;     // f32 [R], contiguous, or null
  int threads;
  const float* scales = nullptr;  // [R], what sums are multiplied by: of int8 values, also widened
};

// Throws std::invalid_argument when a bitmap row's bits and offsets disagree: nothing outside the
// buffers is ever read, whatever they hold.
PYPRUNE_CPU_KERNEL(sparse_linear, SparseLinearArgs)

// x rows up to which W is streamed once and multiplied as it is decoded; above, W's kept columns
// are listed, with AVX2 where that pays (lists_pay() in sparse_panels.h), or W is decoded into
// tiles of floats and multiplied as a matrix, whose rows of x come by 24 (AVX2) or 16 (AVX-512).
// From memory, 8192 x 4096, two Zen 4 cores, a bitmap takes 0.65, 0.92, 0.98 and 1.05 of the tiles'
// time at 12, 16, 24 and 32 rows with AVX2; 0.73, 0.82 and 1.1 at 12, 24 and 32 with AVX-512.
// Portable code gains nothing from tiles at any number of rows: 0.4-0.75 of their time up to 512
// rows (in the cache). NEON goes with AVX2, untimed.
constexpr int64_t kMaxDecodeRows = 24;

// fp32 x rows up to which bf16 weights meet x as three bf16 parts, where the processor multiplies
// those natively.
constexpr int64_t kSplitRows = 2;

// bf16 x rows up to which bf16 weights are multiplied row by row with such products; above, they
// are decoded into tiles, or bitmaps listed for tables (bitmap_table.h). Dense rows need no
// decoding, so tiles pay later. A bitmap's tiles take as long at 28 rows and 0.93-0.95 of the time
// at 32 (8192 x 4096, 4096 x 14336), 0.72-0.85 in the cache (576 x 576 to 576 x 1536; one Zen 4
// core, busy).
constexpr int64_t kDotRowsBitmap = 24, kDotRowsDense = 128;

// bf16 x rows up to which 2:4 gathers them (sparse_gather.h); above, a table of their pairs
// (sparse_table.h), which costs the same for any 16 of them. From memory (8192 x 4096, 576 x 1536,
// 1536 x 576; one Zen 4 core) the table takes 1.25 of gathering's time at 10 rows, 0.78 to 0.94 at
// 12 and 0.66 to 0.75 at 16.
constexpr int64_t kGatherPairRows = 10;

// bf16 x rows up to which a processor with AMX takes the kernels of one without; above, rows of W
// are spread into tiles for it, whatever the format. Counted, not timed: spreading takes some eight
// cycles for 64 columns and the products of 16 rows of x two, where eight rows take 18 without AMX.
constexpr int64_t kBeforeTiles = 8;

}  // namespace pyprune
