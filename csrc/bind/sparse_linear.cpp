#include "cpu/sparse_linear.h"

#include "bind/linear_op.h"
#ifdef PYPRUNE_WITH_CUDA
#include "bind/cuda_status.h"
#include "cuda/linear_24.h"
#include "cuda/linear_bitmap.h"
#endif

namespace pyprune {
namespace {

void finish(const SparseLinearArgs& a) {
  check_linear(a.y, a.x, a.rows, a.bias);
  require_contiguous(a.values, "values");
  if (a.y.numel() == 0) return;
  require(a.cols > 0, "x: expected at least one column");
  sparse_linear(a);
}

void multiply_dense(const TensorView& y, const TensorView& x, const LinearWeight& w, int threads) {
  const TensorView& values = w.parts[0];
  require(values.ndim == 2 && x.ndim == 2 && values.shape[1] == x.shape[1],
          "weight: expected as many columns as x");
  finish({WeightFormat::dense, y, x, values.shape[0], values.shape[1], values, nullptr, nullptr,
          w.bias, threads});
}

void multiply_24(const TensorView& y, const TensorView& x, const LinearWeight& w, int threads) {
  const TensorView &values = w.parts[0], &meta = w.parts[1];
  require(x.ndim == 2 && values.ndim == 2 && x.shape[1] % 8 == 0, "x: expected 8 n columns");
  const int64_t rows = values.shape[0], cols = x.shape[1];
  require_shape(values, {rows, cols / 2}, "values");
  require_array(meta, DType::u8, {rows, cols / 8}, "meta");
  finish({WeightFormat::sparse24, y, x, rows, cols, values, &meta, nullptr, w.bias, threads});
}

void multiply_bitmap(const TensorView& y, const TensorView& x, const LinearWeight& w, int threads) {
  const TensorView &values = w.parts[0], &bitmap = w.parts[1], &offsets = w.parts[2];
  require(x.ndim == 2 && values.ndim == 1 && bitmap.ndim == 2, "expected x [M, C], values [nnz]");
  const int64_t rows = bitmap.shape[0], cols = x.shape[1];
  require_array(bitmap, DType::u8, {rows, (cols + 7) / 8}, "bitmap");
  require_array(offsets, DType::i64, {rows + 1}, "row_offsets");
  finish({WeightFormat::bitmap, y, x, rows, cols, values, &bitmap, &offsets, w.bias, threads});
}

#ifdef PYPRUNE_WITH_CUDA
TensorView cuda_view(const py::capsule& capsule, const char* name) {
  const TensorView t = view(capsule);
  require_on_cuda(t, name);
  return t;
}

TensorView cuda_bias(const OptionalCapsule& bias, int64_t rows) {
  if (!bias) return {};
  const TensorView t = cuda_view(*bias, "bias");
  require_array(t, DType::f32, {rows}, "bias");
  return t;
}

void require_vector_aligned(std::initializer_list<const TensorView*> tensors) {
  for (const TensorView* t : tensors)
    require(reinterpret_cast<uintptr_t>(t->data) % 16 == 0, "expected 16-byte aligned tensors");
}

Linear24 linear_24_args(const py::capsule& y, const py::capsule& x, const py::capsule& values,
                        const py::capsule& meta, const OptionalCapsule& bias) {
  Linear24 a{cuda_view(y, "y"),
             cuda_view(x, "x"),
             cuda_view(values, "values"),
             cuda_view(meta, "meta"),
             {}};
  require(a.x.ndim == 2 && a.values.ndim == 2, "expected x [M, C] and values [R, C/2]");
  const int64_t m = a.x.shape[0], cols = a.x.shape[1], rows = a.values.shape[0];
  require(1 <= m && m <= 64, "x: expected 1 to 64 rows");
  require(cols > 0 && cols % 64 == 0 && rows > 0, "x: expected a multiple of 64 columns");
  require(a.x.dtype == DType::bf16 || a.x.dtype == DType::f16, "x: expected a 16-bit float");
  require_array(a.x, a.x.dtype, {m, cols}, "x");
  require_array(a.y, a.x.dtype, {m, rows}, "y");
  require_array(a.values, a.x.dtype, {rows, cols / 2}, "values");
  require_array(a.meta, DType::u8, {rows, cols / 8}, "meta");
  require_vector_aligned({&a.x, &a.values, &a.meta});
  a.bias = cuda_bias(bias, rows);
  return a;
}

LinearBitmap linear_bitmap_args(const py::capsule& y, const py::capsule& x,
                                const py::capsule& values, const py::capsule& bitmap,
                                const py::capsule& row_offsets, const OptionalCapsule& bias) {
  LinearBitmap a{cuda_view(y, "y"),
                 cuda_view(x, "x"),
                 cuda_view(values, "values"),
                 cuda_view(bitmap, "bitmap"),
                 cuda_view(row_offsets, "row_offsets"),
                 {}};
  require(a.x.ndim == 2 && a.values.ndim == 1 && a.bitmap.ndim == 2,
          "expected x [M, C], values [nnz] and bitmap [R, C/8]");
  const int64_t m = a.x.shape[0], cols = a.x.shape[1], rows = a.bitmap.shape[0];
  require(a.x.dtype == DType::bf16 || a.x.dtype == DType::f16 || a.x.dtype == DType::f32,
          "x: expected bfloat16, float16 or float32");
  const int64_t most = linear_bitmap_rows(a.x.dtype);
  require(1 <= m && m <= most, "x: expected 1 to " + std::to_string(most) + " rows");
  require(cols > 0 && cols % 32 == 0 && rows > 0, "x: expected a multiple of 32 columns");
  require_array(a.x, a.x.dtype, {m, cols}, "x");
  require_array(a.y, a.x.dtype, {m, rows}, "y");
  require_dtype(a.values, a.x.dtype == DType::f32 ? DType::bf16 : a.x.dtype, "values");
  require_array(a.bitmap, DType::u8, {rows, cols / 8}, "bitmap");
  require_array(a.row_offsets, DType::i64, {rows + 1}, "row_offsets");
  require_contiguous(a.values, "values");
  require_vector_aligned({&a.x, &a.values, &a.bitmap});
  require(a.values.numel() <= INT32_MAX && a.bitmap.numel() / 4 <= INT32_MAX,
          "values, bitmap: expected fewer than 2^31 values and words");
  a.bias = cuda_bias(bias, rows);
  return a;
}

void bind_linear_bitmap_cuda(py::module_& m) {
  m.def("linear_bitmap_cuda", [](py::capsule y, py::capsule x, py::capsule values,
                                 py::capsule bitmap, py::capsule row_offsets, OptionalCapsule bias,
                                 uintptr_t stream, int /*threads*/) {
    check_status(launch_linear_bitmap(linear_bitmap_args(y, x, values, bitmap, row_offsets, bias),
                                      reinterpret_cast<cudaStream_t>(stream)));
  });
}

void bind_linear_24_cuda(py::module_& m) {
  m.def("linear_24_cuda", [](py::capsule y, py::capsule x, py::capsule values, py::capsule meta,
                             OptionalCapsule bias, uintptr_t stream, int /*threads*/) {
    check_status(launch_linear_24(linear_24_args(y, x, values, meta, bias),
                                  reinterpret_cast<cudaStream_t>(stream)));
  });
}
#endif

}  // namespace

void bind_sparse_linear(py::module_& m) {
  bind_linear(m, {"linear_dense", 1, multiply_dense});
  bind_linear(m, {"linear_24", 2, multiply_24});
  bind_linear(m, {"linear_bitmap", 3, multiply_bitmap});
#ifdef PYPRUNE_WITH_CUDA
  bind_linear_24_cuda(m);
  bind_linear_bitmap_cuda(m);
#endif
}

}  // namespace pyprune
