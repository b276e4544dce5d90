#include "cpu/obs_sweep.h"

#include "bind/capsule.h"

namespace pyprune {
namespace {

// An optional contiguous f32 tensor of the given shape.
void view_floats(const OptionalCapsule& capsule, std::initializer_list<int64_t> shape,
                 const char* name, TensorView& out) {
  if (!capsule) return;
  out = view(*capsule);
  require_dtype(out, DType::f32, name);
  require_shape(out, shape, name);
  require(out.contiguous(), std::string(name) + ": expected a contiguous tensor");
}

// An optional bool [B, R, C] like `w`.
void view_flags(const OptionalCapsule& capsule, const TensorView& w, const char* name,
                TensorView& out) {
  if (!capsule) return;
  out = view(*capsule);
  require_dtype(out, DType::boolean, name);
  require_shape(out, {w.shape[0], w.shape[1], w.shape[2]}, name);
  require(out.contiguous(), std::string(name) + ": expected a contiguous tensor");
}

void obs_sweep_checked(py::capsule weight, py::capsule mask, py::capsule loss, py::capsule w,
                       py::capsule u, OptionalCapsule counts, OptionalCapsule given,
                       OptionalCapsule preserve, OptionalCapsule scale, OptionalCapsule grid,
                       int64_t n, int64_t m, int64_t block, bool all_ties, int threads) {
  ObsSweepArgs a{};
  a.w = view(w);
  require(a.w.ndim == 3 && (a.w.shape[2] <= 1 || a.w.stride[2] == 1),
          "w: expected three dimensions with unit stride along the last");
  const int64_t batch = a.w.shape[0], rows = a.w.shape[1], cols = a.w.shape[2];
  a.u = view(u), a.weight = view(weight), a.mask = view(mask), a.loss = view(loss);
  for (const auto* t : {&a.w, &a.u, &a.weight, &a.loss}) require_dtype(*t, DType::f32, "tensors");
  for (const auto* t : {&a.u, &a.weight, &a.mask, &a.loss})
    require(t->contiguous(), "expected contiguous tensors");
  require(a.u.ndim == 3 && (a.u.shape[0] == 1 || a.u.shape[0] == batch), "u: unexpected shape");
  require_shape(a.u, {a.u.shape[0], cols, cols}, "u");
  require_shape(a.weight, {batch, rows, cols}, "weight");
  require_dtype(a.mask, DType::boolean, "mask");
  require_shape(a.mask, {batch, rows, cols}, "mask");
  require_shape(a.loss, {batch, rows}, "loss");
  require(block >= 1, "block: expected at least 1 column");
  TensorView vc, vg, vp, vs, vr;
  const bool shared = scale && view(*scale).shape[0] == 1;
  view_floats(scale, {shared ? 1 : batch, cols}, "scale", vs);
  view_floats(grid, {batch, 3, rows}, "grid", vr);
  view_flags(given, a.w, "given", vg);
  view_flags(preserve, a.w, "preserve", vp);
  if (counts) {
    vc = view(*counts);
    require_dtype(vc, DType::i32, "counts");
    require(vc.ndim == 3 && (vc.shape[1] == 1 || vc.shape[1] == rows), "counts: unexpected shape");
    require_shape(vc, {batch, vc.shape[1], (cols + block - 1) / block}, "counts");
    require(vc.contiguous(), "counts: expected a contiguous tensor");
  } else if (!given) {
    require(1 <= n && n <= m && block % m == 0 && cols % m == 0,
            "n, m: expected 1 <= n <= m with m dividing the columns and the block");
  }
  a.counts = counts ? &vc : nullptr;
  a.given = given ? &vg : nullptr;
  a.preserve = preserve ? &vp : nullptr;
  a.scale = scale ? &vs : nullptr;
  a.grid = grid ? &vr : nullptr;
  a.n = n, a.m = m, a.block = block, a.all_ties = all_ties, a.threads = threads;
  py::gil_scoped_release release;
  obs_sweep(a);
}

}  // namespace

void bind_obs_sweep(py::module_& m) { m.def("obs_sweep", &obs_sweep_checked); }

}  // namespace pyprune
