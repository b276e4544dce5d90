#include "cpu/sparse_int8.h"

#include "bind/linear_op.h"

namespace pyprune {
namespace {

void finish(void (*kernel)(const SparseInt8Args&), const SparseInt8Args& a) {
  const SparseLinearArgs& l = a.linear;
  check_linear(l.y, l.x, l.rows, l.bias);
  require_dtype(l.values, DType::i8, "values");
  require_contiguous(l.values, "values");
  require_array(a.scales, DType::f32, {l.rows}, "scales");
  if (l.y.numel() == 0) return;
  require(l.cols > 0, "x: expected at least one column");
  kernel(a);
}

void multiply_dense_int8(const TensorView& y, const TensorView& x, const LinearWeight& w,
                         int threads) {
  const TensorView& values = w.parts[0];
  require(x.ndim == 2 && values.ndim == 2 && values.shape[1] == x.shape[1],
          "values: expected as many columns as x");
  finish(linear_int8, {{WeightFormat::dense, y, x, values.shape[0], values.shape[1], values,
                        nullptr, nullptr, w.bias, threads},
                       w.parts[1]});
}

void multiply_24_int8(const TensorView& y, const TensorView& x, const LinearWeight& w,
                      int threads) {
  const TensorView &values = w.parts[0], &meta = w.parts[1];
  require(x.ndim == 2 && values.ndim == 2 && x.shape[1] % 8 == 0, "x: expected 8 n columns");
  const int64_t rows = values.shape[0], cols = x.shape[1];
  require_shape(values, {rows, cols / 2}, "values");
  require_array(meta, DType::u8, {rows, cols / 8}, "meta");
  finish(sparse_int8,
         {{WeightFormat::sparse24, y, x, rows, cols, values, &meta, nullptr, w.bias, threads},
          w.parts[2]});
}

void multiply_bitmap_int8(const TensorView& y, const TensorView& x, const LinearWeight& w,
                          int threads) {
  const TensorView &values = w.parts[0], &bitmap = w.parts[1], &offsets = w.parts[2];
  require(x.ndim == 2 && values.ndim == 1 && bitmap.ndim == 2, "expected x [M, C], values [nnz]");
  const int64_t rows = bitmap.shape[0], cols = x.shape[1];
  require_array(bitmap, DType::u8, {rows, (cols + 7) / 8}, "bitmap");
  require_array(offsets, DType::i64, {rows + 1}, "row_offsets");
  finish(sparse_int8,
         {{WeightFormat::bitmap, y, x, rows, cols, values, &bitmap, &offsets, w.bias, threads},
          w.parts[3]});
}

}  // namespace

void bind_sparse_int8(py::module_& m) {
  bind_linear(m, {"linear_int8", 2, multiply_dense_int8});
  bind_linear(m, {"linear_24_int8", 3, multiply_24_int8});
  bind_linear(m, {"linear_bitmap_int8", 4, multiply_bitmap_int8});
}

}  // namespace pyprune
