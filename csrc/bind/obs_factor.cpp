#include "cpu/obs_factor.h"

#include "bind/capsule.h"

namespace pyprune {

void bind_obs_factor(py::module_& m) {
  m.def("obs_factor", [](py::capsule u, py::capsule dead, py::capsule h, double damping,
                         int threads) {
    bool good = false;
    const ObsFactorArgs args{view(h), view(u), view(dead), damping, &good, threads};
    require_rows(args.h, 2, "h");
    const int64_t n = args.h.shape[0];
    for (const auto* t : {&args.h, &args.u}) require_dtype(*t, DType::f32, "tensors");
    require_dtype(args.dead, DType::boolean, "dead");
    require_shape(args.h, {n, n}, "h");
    require_shape(args.u, {n, n}, "u");
    require_shape(args.dead, {n}, "dead");
    require(args.u.contiguous() && args.dead.contiguous(), "u, dead: expected contiguous tensors");
    {
      py::gil_scoped_release release;
      obs_factor(args);
    }
    return good;
  });
}

}  // namespace pyprune
