#include "cpu/sparse_int8.h"

#include "bind/capsule.h"

namespace pyprune {
namespace {

void require_bytes(const TensorView& t, DType dtype, std::initializer_list<int64_t> shape,
                   const char* name) {
  require_dtype(t, dtype, name);
  require_shape(t, shape, name);
  require(t.contiguous(), std::string(name) + ": expected a contiguous tensor");
}

void multiply_int8(void (*kernel)(const SparseInt8Args&), SparseInt8Args a, OptionalCapsule& bias) {
  SparseLinearArgs& l = a.linear;
  TensorView b;
  if (bias) {
    b = view(*bias);
    require_bytes(b, DType::f32, {l.rows}, "bias");
    l.bias = &b;
  }
  require(l.x.stride[1] == 1 || l.x.shape[1] <= 1, "x: expected unit stride along the last");
  require(l.x.dtype == DType::f32 || l.x.dtype == DType::bf16, "x: expected float32 or bfloat16");
  require_bytes(l.y, l.x.dtype, {l.x.shape[0], l.rows}, "y");
  require_dtype(l.values, DType::i8, "values");
  require(l.values.contiguous(), "values: expected a contiguous tensor");
  require_bytes(a.scales, DType::f32, {l.rows}, "scales");
  if (l.y.numel() == 0) return;
  require(l.cols > 0, "x: expected at least one column");
  py::gil_scoped_release release;
  kernel(a);
}

}  // namespace

void bind_sparse_int8(py::module_& m) {
  m.def("linear_int8", [](py::capsule y, py::capsule x, py::capsule values, py::capsule scales,
                          OptionalCapsule bias, int threads) {
    const TensorView vx = view(x), vv = view(values);
    require(vx.ndim == 2 && vv.ndim == 2 && vv.shape[1] == vx.shape[1],
            "values: expected as many columns as x");
    multiply_int8(linear_int8,
                  {{WeightFormat::dense, view(y), vx, vv.shape[0], vx.shape[1], vv, nullptr,
                    nullptr, nullptr, threads},
                   view(scales)},
                  bias);
  });
  m.def("linear_24_int8", [](py::capsule y, py::capsule x, py::capsule values, py::capsule meta,
                             py::capsule scales, OptionalCapsule bias, int threads) {
    const TensorView vx = view(x), vv = view(values), vm = view(meta);
    require(vx.ndim == 2 && vv.ndim == 2 && vx.shape[1] % 8 == 0, "x: expected 8 n columns");
    const int64_t rows = vv.shape[0], cols = vx.shape[1];
    require_shape(vv, {rows, cols / 2}, "values");
    require_bytes(vm, DType::u8, {rows, cols / 8}, "meta");
    multiply_int8(
        sparse_int8,
        {{WeightFormat::sparse24, view(y), vx, rows, cols, vv, &vm, nullptr, nullptr, threads},
         view(scales)},
        bias);
  });
  m.def("linear_bitmap_int8", [](py::capsule y, py::capsule x, py::capsule values,
                                 py::capsule bitmap, py::capsule row_offsets, py::capsule scales,
                                 OptionalCapsule bias, int threads) {
    const TensorView vx = view(x), vv = view(values), vm = view(bitmap);
    const TensorView vo = view(row_offsets);
    require(vx.ndim == 2 && vv.ndim == 1 && vm.ndim == 2, "expected x [M, C], values [nnz]");
    const int64_t rows = vm.shape[0], cols = vx.shape[1];
    require_bytes(vm, DType::u8, {rows, (cols + 7) / 8}, "bitmap");
    require_bytes(vo, DType::i64, {rows + 1}, "row_offsets");
    multiply_int8(sparse_int8,
                  {{WeightFormat::bitmap, view(y), vx, rows, cols, vv, &vm, &vo, nullptr, threads},
                   view(scales)},
                  bias);
  });
}

}  // namespace pyprune
