#include "cpu/obs_sweep.h"

#include "bind/capsule.h"

namespace pyprune {
namespace {

void obs_sweep_checked(py::capsule weight, py::capsule mask, py::capsule loss, py::capsule w,
                       py::capsule u, OptionalCapsule counts, OptionalCapsule given,
                       OptionalCapsule preserve, OptionalCapsule scale, OptionalCapsule grid,
                       int64_t n, int64_t m, int64_t block, bool all_ties, int threads) {
  ObsSweepArgs a{};
  a.w = view(w);
  require_rows(a.w, 3, "w");
  const int64_t batch = a.w.shape[0], rows = a.w.shape[1], cols = a.w.shape[2];
  a.u = view(u), a.weight = view(weight), a.mask = view(mask), a.loss = view(loss);
  for (const auto* t : {&a.w, &a.u, &a.weight, &a.loss}) require_dtype(*t, DType::f32, "tensors");
  for (const auto* t : {&a.u, &a.weight, &a.loss})
    require(t->contiguous(), "expected contiguous tensors");
  require(a.u.ndim == 3 && (a.u.shape[0] == 1 || a.u.shape[0] == batch), "u: unexpected shape");
  require_shape(a.u, {a.u.shape[0], cols, cols}, "u");
  require_shape(a.weight, {batch, rows, cols}, "weight");
  require_array(a.mask, DType::boolean, {batch, rows, cols}, "mask");
  require_shape(a.loss, {batch, rows}, "loss");
  require(block >= 1, "block: expected at least 1 column");
  const bool shared = scale && view(*scale).shape[0] == 1;
  const OptionalView vs = optional_array(scale, DType::f32, {shared ? 1 : batch, cols}, "scale");
  const OptionalView vr = optional_array(grid, DType::f32, {batch, 3, rows}, "grid");
  const OptionalView vg = optional_array(given, DType::boolean, {batch, rows, cols}, "given");
  const OptionalView vp = optional_array(preserve, DType::boolean, {batch, rows, cols}, "preserve");
  TensorView vc;
  if (counts) {
    vc = view(*counts);
    require(vc.ndim == 3 && (vc.shape[1] == 1 || vc.shape[1] == rows), "counts: unexpected shape");
    require_array(vc, DType::i32, {batch, vc.shape[1], (cols + block - 1) / block}, "counts");
  } else if (!given) {
    require(1 <= n && n <= m && block % m == 0 && cols % m == 0,
            "n, m: expected 1 <= n <= m with m dividing the columns and the block");
  }
  a.counts = counts ? &vc : nullptr;
  a.given = vg.get();
  a.preserve = vp.get();
  a.scale = vs.get();
  a.grid = vr.get();
  a.n = n, a.m = m, a.block = block, a.all_ties = all_ties, a.threads = threads;
  py::gil_scoped_release release;
  obs_sweep(a);
}

}  // namespace

void bind_obs_sweep(py::module_& m) { m.def("obs_sweep", &obs_sweep_checked); }

}  // namespace pyprune
