#include "bind/capsule.h"
#include "cpu/kron_quadratic.h"

namespace pyprune {

void bind_kron(py::module_& m) {
  m.def("kron_quadratic", [](py::capsule out, py::capsule w, py::capsule h, int threads) {
    const KronQuadraticArgs args{view(out), view(w), view(h), threads};
    for (const auto* t : {&args.w, &args.h}) require_dtype(*t, DType::f32, "tensors");
    require(args.w.ndim == 2, "w: expected two dimensions");
    const int64_t rows = args.w.shape[0], cols = args.w.shape[1];
    require(cols <= 1 || args.w.stride[1] == 1 || rows <= 1 || args.w.stride[0] == 1,
            "w: expected unit stride along one dimension");
    require_shape(args.h, {cols, cols}, "h");
    require(cols <= 1 || args.h.stride[1] == 1, "h: expected unit stride along the last dimension");
    require_array(args.out, DType::f32, {rows}, "out");
    require_threads(threads);
    py::gil_scoped_release release;
    kron_quadratic(args);
  });
}

}  // namespace pyprune
