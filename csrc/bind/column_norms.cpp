#include "cpu/column_norms.h"

#include "bind/capsule.h"

namespace pyprune {

void bind_column_norms(py::module_& m) {
  m.def("column_norms", [](py::capsule acc, py::capsule x, OptionalCapsule weight, int threads) {
    const TensorView vx = view(x), va = view(acc);
    require_rows(vx, 2, "x");
    require_array(va, DType::f32, {vx.shape[1]}, "acc");
    const OptionalView vw = optional_array(weight, DType::f32, {vx.shape[0]}, "weight");
    py::gil_scoped_release release;
    column_norms({va, vx, vw.get(), threads});
  });
}

}  // namespace pyprune
