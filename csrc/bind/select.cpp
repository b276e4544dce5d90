#include "bind/capsule.h"
#include "cpu/mask_global.h"
#include "cpu/mask_nm.h"
#include "cpu/mask_topk.h"
#include "huge_pages.h"
#ifdef PYPRUNE_WITH_CUDA
#include "bind/cuda_status.h"
#include "cuda/mask_global.h"
#include "cuda/mask_nm.h"
#include "cuda/mask_topk.h"
#endif

namespace pyprune {
namespace {

void require_matrix(const TensorView& t, const TensorView& w, const char* name) {
  require(t.ndim == 2 && t.shape[0] == w.shape[0] && t.shape[1] == w.shape[1] && unit_stride(t),
          std::string(name) + ": expected w's shape with unit stride along the last dimension");
}

ScoreTerms terms(const TensorView& w, const OptionalCapsule& column_scale,
                 const OptionalCapsule& row_scale, const OptionalCapsule& addend,
                 const OptionalCapsule& preserve) {
  ScoreTerms t;
  t.column_scale = optional_array(column_scale, DType::f32, {w.shape[1]}, "column_scale").t;
  t.row_scale = optional_array(row_scale, DType::f32, {w.shape[0]}, "row_scale").t;
  if (addend) {
    t.addend = view(*addend);
    require_dtype(t.addend, DType::f32, "addend");
    require_matrix(t.addend, w, "addend");
  }
  if (preserve) {
    t.preserve = view(*preserve);
    require_dtype(t.preserve, DType::boolean, "preserve");
    require_matrix(t.preserve, w, "preserve");
  }
  return t;
}

TensorView weight(const py::capsule& capsule) {
  const TensorView w = view(capsule);
  require(w.ndim == 2, "w: expected two dimensions");
  require_matrix(w, w, "w");
  return w;
}

TensorView mask(const py::capsule& capsule, const TensorView& w) {
  const TensorView v = view(capsule);
  require_dtype(v, DType::boolean, "mask");
  require_matrix(v, w, "mask");
  require_contiguous(v, "mask");
  prefer_huge_pages(v, 1);
  return v;
}

OptionalCapsule item(const py::list& list, size_t i) {
  if (i >= list.size()) return std::nullopt;
  return list[i].cast<py::capsule>();
}

void bind_mask_global(py::module_& m) {
  // A list of terms is empty (absent) or has one entry a tensor.
  m.def("mask_global", [](const py::list& masks, const py::list& ws, int64_t pruned,
                          const py::list& column_scales, const py::list& row_scales,
                          const py::list& addends, const py::list& preserves, int threads) {
    require(masks.size() == ws.size(), "masks: expected as many as ws");
    std::vector<GlobalTensor> tensors;
    int64_t elements = 0;
    for (size_t i = 0; i < ws.size(); ++i) {
      const TensorView w = weight(ws[i].cast<py::capsule>());
      require_dtype(w, tensors.empty() ? w.dtype : tensors[0].w.dtype, "ws");
      tensors.push_back({mask(masks[i].cast<py::capsule>(), w), w,
                         terms(w, item(column_scales, i), item(row_scales, i), item(addends, i),
                               item(preserves, i))});
      elements += w.numel();
    }
    require(0 <= pruned && pruned <= elements, "pruned: out of range");
    py::gil_scoped_release release;
    mask_global({tensors.data(), static_cast<int64_t>(tensors.size()), pruned, threads});
  });
}

#ifdef PYPRUNE_WITH_CUDA
TensorView cuda_weight(const py::capsule& capsule) {
  const TensorView w = weight(capsule);
  require_on_cuda(w, "w");
  require(w.numel() > 0, "w: expected at least one row and one column");
  return w;
}

void bind_mask_nm_cuda(py::module_& m) {
  m.def("mask_nm_cuda",
        [](py::capsule out, py::capsule w, int64_t n, int64_t group, OptionalCapsule column_scale,
           OptionalCapsule row_scale, OptionalCapsule addend, OptionalCapsule preserve,
           uintptr_t stream, int /*threads*/) {
          const TensorView vw = cuda_weight(w);
          require(1 <= n && n <= group && mask_nm_takes(n, group) && vw.shape[1] % group == 0,
                  "n, m: expected a pattern that the kernel takes, m a divisor of the columns");
          check_status(launch_mask_nm(mask(out, vw), vw, n, group,
                                      terms(vw, column_scale, row_scale, addend, preserve),
                                      reinterpret_cast<cudaStream_t>(stream)));
        });
}

void bind_mask_topk_cuda(py::module_& m) {
  m.def("mask_topk_cuda",
        [](py::capsule out, py::capsule w, int64_t pruned, OptionalCapsule column_scale,
           OptionalCapsule row_scale, OptionalCapsule addend, OptionalCapsule preserve,
           uintptr_t stream, int /*threads*/) {
          const TensorView vw = cuda_weight(w);
          require(1 <= pruned && pruned <= vw.shape[1] && vw.shape[1] <= kMaskTopkColumns,
                  "pruned: out of range, or too many columns");
          check_status(launch_mask_topk(mask(out, vw), vw, pruned,
                                        terms(vw, column_scale, row_scale, addend, preserve),
                                        reinterpret_cast<cudaStream_t>(stream)));
        });
}

void bind_mask_global_cuda(py::module_& m) {
  m.def("mask_global_cuda",
        [](const py::list& masks, const py::list& ws, int64_t pruned, const py::list& column_scales,
           const py::list& row_scales, const py::list& addends, const py::list& preserves,
           py::capsule workspace, uintptr_t stream, int /*threads*/) {
          require(!ws.empty() && masks.size() == ws.size(), "masks: expected as many as ws");
          std::vector<GlobalMaskCuda> matrices;
          int64_t elements = 0;
          for (size_t i = 0; i < ws.size(); ++i) {
            const TensorView w = cuda_weight(ws[i].cast<py::capsule>());
            require_dtype(w, matrices.empty() ? w.dtype : matrices[0].w.dtype, "ws");
            require(0 < w.numel() && w.shape[0] * ((w.shape[1] + 7) / 8) < int64_t{1} << 32,
                    "ws: expected matrices of less than 2^35 elements, none empty");
            matrices.push_back({mask(masks[i].cast<py::capsule>(), w), w,
                                terms(w, item(column_scales, i), item(row_scales, i),
                                      item(addends, i), item(preserves, i))});
            elements += w.numel();
          }
          require(1 <= pruned && pruned <= elements, "pruned: out of range");
          const TensorView space = view(workspace);
          require_dtype(space, DType::i64, "workspace");
          require(space.contiguous() && space.numel() >= mask_global_workspace(matrices),
                  "workspace: too small");
          check_status(launch_mask_global(matrices, pruned, space.ptr<uint64_t>(),
                                          reinterpret_cast<cudaStream_t>(stream)));
        });
}
#endif

}  // namespace

void bind_select(py::module_& m) {
  m.def("mask_nm", [](py::capsule out, py::capsule w, int64_t n, int64_t group,
                      OptionalCapsule column_scale, OptionalCapsule row_scale,
                      OptionalCapsule addend, OptionalCapsule preserve, int threads) {
    const TensorView vw = weight(w);
    const MaskNmArgs args{
        mask(out, vw), vw, terms(vw, column_scale, row_scale, addend, preserve), n, group, threads};
    require(1 <= n && n <= group && vw.shape[1] % group == 0, "n, m: m must divide the columns");
    py::gil_scoped_release release;
    mask_nm(args);
  });
  m.def("mask_topk", [](py::capsule out, py::capsule w, int64_t pruned,
                        OptionalCapsule column_scale, OptionalCapsule row_scale,
                        OptionalCapsule addend, OptionalCapsule preserve, int threads) {
    const TensorView vw = weight(w);
    const MaskTopkArgs args{mask(out, vw), vw, terms(vw, column_scale, row_scale, addend, preserve),
                            pruned, threads};
    require(0 <= pruned && pruned <= vw.shape[1], "pruned: out of range");
    py::gil_scoped_release release;
    mask_topk(args);
  });
  bind_mask_global(m);
#ifdef PYPRUNE_WITH_CUDA
  bind_mask_nm_cuda(m);
  bind_mask_topk_cuda(m);
  bind_mask_global_cuda(m);
#endif
}

}  // namespace pyprune
