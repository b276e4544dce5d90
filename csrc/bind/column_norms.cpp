#include "cpu/column_norms.h"

#include "bind/capsule.h"

namespace pyprune {

void bind_column_norms(py::module_& m) {
  m.def("column_norms", [](py::capsule acc, py::capsule x, OptionalCapsule weight, int threads) {
    const TensorView vx = view(x), va = view(acc);
    TensorView vw;
    require(vx.ndim == 2 && (vx.shape[1] <= 1 || vx.stride[1] == 1),
            "x: expected two dimensions with unit stride along the last");
    require_dtype(va, DType::f32, "acc");
    require_shape(va, {vx.shape[1]}, "acc");
    require(va.contiguous(), "acc: expected a contiguous tensor");
    if (weight) {
      vw = view(*weight);
      require_dtype(vw, DType::f32, "weight");
      require_shape(vw, {vx.shape[0]}, "weight");
      require(vw.contiguous(), "weight: expected a contiguous tensor");
    }
    py::gil_scoped_release release;
    column_norms({va, vx, weight ? &vw : nullptr, threads});
  });
}

}  // namespace pyprune
