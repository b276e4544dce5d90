// Compressed int8 weights with many rows of x, where no kernel takes them as they are: some rows of
// W at a time are widened to bf16, which holds every int8, and given to sparse_linear(), which
// scales its sums before it rounds them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/sparse_int8.h"
#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Rows of W that are widened at a time: enough that packing x anew for each costs about one
// per cent, and few enough that the widened values stay in the last-level cache.
constexpr int64_t kWideRows = 1024;

inline TensorView view_of(void* data, DType dtype, int64_t rows, int64_t cols) {
  TensorView v;
  v.data = data;
  v.dtype = dtype;
  v.ndim = 2;
  v.shape[0] = rows;
  v.shape[1] = v.stride[0] = cols;
  v.stride[1] = 1;
  return v;
}

inline TensorView view_of(void* data, DType dtype, int64_t n) {
  TensorView v = view_of(data, dtype, 1, n);
  v.ndim = 1;
  v.shape[0] = n;
  v.stride[0] = 1;
  return v;
}

// Rows [r0, r0 + count): values as bf16 (at most as many as they have columns), offsets counted
// from the first; false, and the row noted, when one is inconsistent.
inline bool widen_rows(const Weights& w, int64_t r0, int64_t count, int threads, bf16* values,
                       int64_t* offsets, std::atomic<int64_t>* broken) {
  const bool bitmap = w.format == WeightFormat::bitmap;
  const int64_t first = w.begin(r0);
  for (int64_t r = 0; bitmap && r < count; ++r) {
    const int64_t begin = w.offsets[r0 + r], end = w.offsets[r0 + r + 1];
    if (begin < 0 || begin > end || end > w.nnz || end - begin > w.cols) {
      broken->store(r0 + r, std::memory_order_relaxed);
      return false;
    }
    offsets[r] = begin - first;
  }
  const int64_t n = (bitmap ? w.offsets[r0 + count] : w.begin(r0 + count)) - first;
  offsets[count] = n;
  const int8_t* q = static_cast<const int8_t*>(w.values) + first;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) {
    const float f = static_cast<float>(q[i]);
    uint32_t u;
    std::memcpy(&u, &f, 4);
    values[i] = {static_cast<uint16_t>(u >> 16)};
  }
  std::vector<uint64_t> words(static_cast<size_t>(mask_words(w.cols)));
  for (int64_t r = 0; bitmap && r < count; ++r)
    if (!row_mask(w, r0 + r, words.data())) {
      broken->store(r0 + r, std::memory_order_relaxed);
      return false;
    }
  return true;
}

template <class X>
void many_rows(const SparseInt8Args& a, const Weights& w, std::atomic<int64_t>* broken) {
  const SparseLinearArgs& args = a.linear;
  const bool bitmap = w.format == WeightFormat::bitmap;
  const int64_t tokens = args.x.shape[0], most = std::min(kWideRows, w.rows);
  const Scratch values(std::min(most * w.cols, w.nnz) * 2), offsets((most + 1) * 8);
  const Scratch block(tokens * most * static_cast<int64_t>(sizeof(X)));
  auto* wide = values.as<bf16>();
  auto* begins = offsets.as<int64_t>();
  X* y = args.y.ptr<X>();
  for (int64_t r0 = 0; r0 < w.rows; r0 += kWideRows) {
    const int64_t count = std::min(kWideRows, w.rows - r0);
    if (!widen_rows(w, r0, count, args.threads, wide, begins, broken)) return;
    TensorView meta =
        view_of(const_cast<uint8_t*>(w.meta) + r0 * w.meta_stride, DType::u8, count, w.meta_stride);
    TensorView starts = view_of(begins, DType::i64, count + 1);
    TensorView bias;
    SparseLinearArgs part = args;
    part.y = view_of(block.as<X>(), args.y.dtype, tokens, count);
    part.rows = count;
    part.values = view_of(wide, DType::bf16, bitmap ? begins[count] : count * w.cols / 2);
    part.meta = &meta;
    part.offsets = bitmap ? &starts : nullptr;
    part.scales = a.scales.ptr<const float>() + r0;
    if (args.bias) {
      bias = view_of(args.bias->ptr<float>() + r0, DType::f32, count);
      part.bias = &bias;
    }
    PYPRUNE_ISA::sparse_linear(part);
#pragma omp parallel for schedule(static) num_threads(args.threads)
    for (int64_t t = 0; t < tokens; ++t)
      std::copy_n(block.as<const X>() + t * count, count, y + t * w.rows + r0);
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
