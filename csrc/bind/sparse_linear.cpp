#include "cpu/sparse_linear.h"

#include "bind/capsule.h"

namespace pyprune {
namespace {

void require_matrix(const TensorView& t, DType dtype, int64_t rows, int64_t cols,
                    const char* name) {
  require_dtype(t, dtype, name);
  require_shape(t, {rows, cols}, name);
  require(t.contiguous(), std::string(name) + ": expected a contiguous tensor");
}

void check_activations(const SparseLinearArgs& a) {
  require(a.x.ndim == 2 && (a.x.shape[1] <= 1 || a.x.stride[1] == 1),
          "x: expected two dimensions with unit stride along the last");
  require(a.x.dtype == DType::f32 || a.x.dtype == DType::bf16, "x: expected float32 or bfloat16");
  require_matrix(a.y, a.x.dtype, a.x.shape[0], a.rows, "y");
  if (a.bias) {
    require_dtype(*a.bias, DType::f32, "bias");
    require_shape(*a.bias, {a.rows}, "bias");
    require(a.bias->contiguous(), "bias: expected a contiguous tensor");
  }
  require(a.values.contiguous(), "values: expected a contiguous tensor");
}

void finish(SparseLinearArgs a, OptionalCapsule& bias) {
  TensorView b;
  if (bias) {
    b = view(*bias);
    a.bias = &b;
  }
  check_activations(a);
  if (a.y.numel() == 0) return;
  require(a.cols > 0, "x: expected at least one column");
  py::gil_scoped_release release;
  sparse_linear(a);
}

}  // namespace

void bind_sparse_linear(py::module_& m) {
  m.def("linear_dense",
        [](py::capsule y, py::capsule x, py::capsule weight, OptionalCapsule bias, int threads) {
          const TensorView vx = view(x), vw = view(weight);
          require(vw.ndim == 2 && vx.ndim == 2 && vw.shape[1] == vx.shape[1],
                  "weight: expected as many columns as x");
          finish({WeightFormat::dense, view(y), vx, vw.shape[0], vw.shape[1], vw, nullptr, nullptr,
                  nullptr, threads},
                 bias);
        });
  m.def("linear_24", [](py::capsule y, py::capsule x, py::capsule values, py::capsule meta,
                        OptionalCapsule bias, int threads) {
    const TensorView vx = view(x), vv = view(values), vm = view(meta);
    require(vx.ndim == 2 && vv.ndim == 2 && vx.shape[1] % 8 == 0, "x: expected 8 n columns");
    require_shape(vv, {vv.shape[0], vx.shape[1] / 2}, "values");
    require_matrix(vm, DType::u8, vv.shape[0], vx.shape[1] / 8, "meta");
    finish({WeightFormat::sparse24, view(y), vx, vv.shape[0], vx.shape[1], vv, &vm, nullptr,
            nullptr, threads},
           bias);
  });
  m.def("linear_bitmap", [](py::capsule y, py::capsule x, py::capsule values, py::capsule bitmap,
                            py::capsule row_offsets, OptionalCapsule bias, int threads) {
    const TensorView vx = view(x), vv = view(values), vm = view(bitmap), vo = view(row_offsets);
    require(vx.ndim == 2 && vv.ndim == 1 && vm.ndim == 2, "expected x [M, C], values [nnz]");
    require_matrix(vm, DType::u8, vm.shape[0], (vx.shape[1] + 7) / 8, "bitmap");
    require_dtype(vo, DType::i64, "row_offsets");
    require_shape(vo, {vm.shape[0] + 1}, "row_offsets");
    require(vo.contiguous(), "row_offsets: expected a contiguous tensor");
    finish({WeightFormat::bitmap, view(y), vx, vm.shape[0], vx.shape[1], vv, &vm, &vo, nullptr,
            threads},
           bias);
  });
}

}  // namespace pyprune
