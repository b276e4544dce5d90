#include "cpu/obs_factor.h"

#include "bind/capsule.h"

namespace pyprune {

void bind_obs_factor(py::module_& m) {
  m.def("obs_factor", [](py::capsule u, py::capsule h, py::capsule shift, int threads) {
    bool definite = false;
    const ObsFactorArgs args{view(h), view(shift), view(u), &definite, threads};
    require(args.h.ndim == 2 && (args.h.shape[1] <= 1 || args.h.stride[1] == 1),
            "h: expected two dimensions with unit stride along the last");
    const int64_t n = args.h.shape[0];
    for (const auto* t : {&args.h, &args.shift, &args.u}) require_dtype(*t, DType::f32, "tensors");
    require_shape(args.h, {n, n}, "h");
    require_shape(args.shift, {n}, "shift");
    require_shape(args.u, {n, n}, "u");
    require(args.shift.contiguous() && args.u.contiguous(),
            "shift, u: expected contiguous tensors");
    {
      py::gil_scoped_release release;
      obs_factor(args);
    }
    return definite;
  });
}

}  // namespace pyprune
