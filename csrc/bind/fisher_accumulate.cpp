#include "cpu/fisher_accumulate.h"

#include "bind/capsule.h"

namespace pyprune {

void bind_fisher_accumulate(py::module_& m) {
  m.def("fisher_accumulate",
        [](py::capsule acc, py::capsule g, py::capsule x, int power, double scale, int threads) {
          const TensorView va = view(acc), vg = view(g), vx = view(x);
          require_rows(vg, 3, "g");
          require_rows(vx, 3, "x");
          require_shape(vg, {vx.shape[0], vx.shape[1], vg.shape[2]}, "g");
          require_dtype(vg, vx.dtype, "g");
          require_array(va, DType::f32, {vg.shape[2], vx.shape[2]}, "acc");
          require(power == 1 || power == 2, "power: expected 1 or 2");
          py::gil_scoped_release release;
          fisher_accumulate({va, vg, vx, power, static_cast<float>(scale), threads});
        });
}

}  // namespace pyprune
