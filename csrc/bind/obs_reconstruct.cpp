#include "cpu/obs_reconstruct.h"

#include "bind/capsule.h"

namespace pyprune {
namespace {

void obs_reconstruct_checked(py::capsule x, py::capsule residual, py::capsule mask, py::capsule h,
                             py::capsule low, py::capsule diagonal, py::capsule loss,
                             py::capsule noise, py::capsule gap, py::capsule iterations,
                             double least, double tolerance, int64_t max_iterations, int threads) {
  ObsReconstructArgs a{view(x),        view(residual), view(mask),     view(h),   view(low),
                       view(diagonal), view(loss),     view(noise),    view(gap), view(iterations),
                       least,          tolerance,      max_iterations, threads};
  require(a.x.ndim == 2, "x: expected two dimensions");
  const int64_t rows = a.x.shape[0], cols = a.x.shape[1];
  for (const auto* t : {&a.x, &a.residual, &a.h, &a.low, &a.diagonal})
    require_dtype(*t, DType::f32, "f32");
  for (const auto* t : {&a.loss, &a.noise, &a.gap}) require_dtype(*t, DType::f64, "f64");
  require_dtype(a.mask, DType::boolean, "mask");
  require_dtype(a.iterations, DType::i32, "iterations");
  for (const auto* t : {&a.x, &a.residual, &a.mask}) require_shape(*t, {rows, cols}, "rows");
  require_shape(a.h, {cols, cols}, "h");
  require_shape(a.low, {a.low.shape[0], cols}, "low");
  require(a.low.shape[0] % 8 == 0 && a.low.shape[0] <= kReconstructRank,
          "low: expected a multiple of 8 rows, at most " + std::to_string(kReconstructRank));
  require_shape(a.diagonal, {cols}, "diagonal");
  for (const auto* t : {&a.loss, &a.noise, &a.gap, &a.iterations})
    require_shape(*t, {rows}, "per row");
  for (const auto* t : {&a.x, &a.residual, &a.mask, &a.h, &a.low, &a.diagonal, &a.loss, &a.noise,
                        &a.gap, &a.iterations})
    require(t->contiguous(), "expected contiguous tensors");
  require(0 < least && least <= 1, "least: expected a number in (0, 1]");
  require_threads(threads);
  py::gil_scoped_release release;
  obs_reconstruct(a);
}

}  // namespace

void bind_obs_reconstruct(py::module_& m) { m.def("obs_reconstruct", &obs_reconstruct_checked); }

}  // namespace pyprune
