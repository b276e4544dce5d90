#include "cpu/obs_greedy.h"

#include "bind/capsule.h"

namespace pyprune {
namespace {

void obs_greedy_checked(py::capsule order, py::capsule loss, py::capsule w, py::capsule inverse,
                        OptionalCapsule first, int64_t n, int64_t m, int threads) {
  ObsGreedyArgs a{view(order), view(loss), view(w), view(inverse), TensorView{}, n, m, threads};
  require(a.w.ndim == 2 && a.order.ndim == 2, "w, order: expected two dimensions");
  const int64_t problems = a.w.shape[0], cols = a.w.shape[1], steps = a.order.shape[1];
  for (const auto* t : {&a.w, &a.inverse, &a.loss}) require_dtype(*t, DType::f32, "tensors");
  require_dtype(a.order, DType::i64, "order");
  for (const auto* t : {&a.order, &a.loss}) require_shape(*t, {problems, steps}, "order, loss");
  require(a.inverse.ndim == 3 && (a.inverse.shape[0] == 1 || a.inverse.shape[0] == problems),
          "inverse: unexpected shape");
  require_shape(a.inverse, {a.inverse.shape[0], cols, cols}, "inverse");
  a.first = optional_array(first, DType::boolean, {problems, cols}, "first").t;
  for (const auto* t : {&a.order, &a.loss, &a.w, &a.inverse})
    require(t->contiguous(), "expected contiguous tensors");
  require(steps <= cols, "order: expected at most as many steps as weights");
  require(m == 0 || (m > 0 && 0 <= n && n <= m && cols % m == 0), "n, m: expected whole groups");
  require_threads(threads);
  py::gil_scoped_release release;
  obs_greedy(a);
}

}  // namespace

void bind_obs_greedy(py::module_& m) { m.def("obs_greedy", &obs_greedy_checked); }

}  // namespace pyprune
