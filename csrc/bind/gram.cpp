#include "cpu/gram.h"

#include "bind/capsule.h"

namespace pyprune {

void bind_gram(py::module_& m) {
  m.def("gram", [](py::capsule out, py::capsule x, OptionalCapsule weight, int threads) {
    const TensorView vx = view(x), vo = view(out);
    require_rows(vx, 3, "x");
    require(vo.ndim == 3 && (vo.shape[1] == vx.shape[2] || vo.shape[1] == vx.shape[2] + 1),
            "out: unexpected shape");
    require_array(vo, DType::f32, {vx.shape[0], vo.shape[1], vo.shape[1]}, "out");
    const OptionalView vw =
        optional_array(weight, DType::f32, {vx.shape[0], vx.shape[1]}, "weight");
    py::gil_scoped_release release;
    gram({vo, vx, vw.get(), threads});
  });
}

}  // namespace pyprune
