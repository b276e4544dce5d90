#include "cpu/fisher_accumulate.h"

#include "bind/capsule.h"

namespace pyprune {

void bind_fisher_accumulate(py::module_& m) {
  m.def("fisher_accumulate",
        [](py::capsule acc, py::capsule g, py::capsule x, int power, double scale, int threads) {
          const TensorView va = view(acc), vg = view(g), vx = view(x);
          require(vg.ndim == 3 && (vg.shape[2] <= 1 || vg.stride[2] == 1),
                  "g: expected three dimensions with unit stride along the last");
          require(vx.ndim == 3 && (vx.shape[2] <= 1 || vx.stride[2] == 1),
                  "x: expected three dimensions with unit stride along the last");
          require_shape(vg, {vx.shape[0], vx.shape[1], vg.shape[2]}, "g");
          require_dtype(vg, vx.dtype, "g");
          require_dtype(va, DType::f32, "acc");
          require_shape(va, {vg.shape[2], vx.shape[2]}, "acc");
          require(va.contiguous(), "acc: expected a contiguous tensor");
          require(power == 1 || power == 2, "power: expected 1 or 2");
          py::gil_scoped_release release;
          fisher_accumulate({va, vg, vx, power, static_cast<float>(scale), threads});
        });
}

}  // namespace pyprune
