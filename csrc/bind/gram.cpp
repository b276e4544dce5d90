#include "cpu/gram.h"

#include "bind/capsule.h"

namespace pyprune {

void bind_gram(py::module_& m) {
  m.def("gram", [](py::capsule out, py::capsule x, OptionalCapsule weight, int threads) {
    const TensorView vx = view(x), vo = view(out);
    TensorView vw;
    require(vx.ndim == 3 && (vx.shape[2] <= 1 || vx.stride[2] == 1),
            "x: expected three dimensions with unit stride along the last");
    require_dtype(vo, DType::f32, "out");
    require(vo.ndim == 3 && (vo.shape[1] == vx.shape[2] || vo.shape[1] == vx.shape[2] + 1),
            "out: unexpected shape");
    require_shape(vo, {vx.shape[0], vo.shape[1], vo.shape[1]}, "out");
    require(vo.contiguous(), "out: expected a contiguous tensor");
    if (weight) {
      vw = view(*weight);
      require_dtype(vw, DType::f32, "weight");
      require_shape(vw, {vx.shape[0], vx.shape[1]}, "weight");
      require(vw.contiguous(), "weight: expected a contiguous tensor");
    }
    py::gil_scoped_release release;
    gram({vo, vx, weight ? &vw : nullptr, threads});
  });
}

}  // namespace pyprune
