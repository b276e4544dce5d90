#include "cpu/pack.h"

#include "bind/capsule.h"
#include "huge_pages.h"
#ifdef PYPRUNE_WITH_CUDA
#include "bind/cuda_status.h"
#include "cuda/pack_24.h"
#include "cuda/pack_bitmap.h"
#endif

namespace pyprune {
namespace {

TensorView matrix(const py::capsule& capsule, const char* name) {
  const TensorView t = view(capsule);
  require_rows(t, 2, name);
  return t;
}

TensorView mask_of(const OptionalCapsule& capsule, const TensorView& w) {
  if (!capsule) return {};
  const TensorView t = matrix(*capsule, "mask");
  require_dtype(t, DType::boolean, "mask");
  require_shape(t, {w.shape[0], w.shape[1]}, "mask");
  return t;
}

int64_t element_bytes(const TensorView& t) { return t.dtype == DType::f32 ? 4 : 2; }

struct Packed24 {
  TensorView values, meta;
};

Packed24 packed_24(const py::capsule& values, const py::capsule& meta, const TensorView& w) {
  const Packed24 p{view(values), view(meta)};
  require(w.shape[1] % 8 == 0, "w: expected a multiple of 8 columns");
  require_array(p.values, w.dtype, {w.shape[0], w.shape[1] / 2}, "values");
  require_array(p.meta, DType::u8, {w.shape[0], w.shape[1] / 8}, "meta");
  return p;
}

TensorView bitmap_of(const py::capsule& capsule, const TensorView& w) {
  const TensorView t = view(capsule);
  require_array(t, DType::u8, {w.shape[0], (w.shape[1] + 7) / 8}, "bitmap");
  return t;
}

TensorView offsets_of(const py::capsule& capsule, const TensorView& w) {
  const TensorView t = view(capsule);
  require_array(t, DType::i64, {w.shape[0] + 1}, "row_offsets");
  return t;
}

#ifdef PYPRUNE_WITH_CUDA
void require_aligned(const TensorView& t, int64_t bytes, const char* name) {
  const bool rows = t.ndim < 2 || t.shape[0] <= 1 ||
                    t.stride[0] * (t.dtype == DType::boolean ? 1 : element_bytes(t)) % bytes == 0;
  require(rows && reinterpret_cast<uintptr_t>(t.data) % bytes == 0,
          std::string(name) + ": expected rows that start at multiples of " +
              std::to_string(bytes) + " bytes");
}

// What both directions check of their tensors.
Pack24Cuda cuda_24(const py::capsule& values, const py::capsule& meta, const TensorView& w) {
  require_on_cuda(w, "w");
  const Packed24 p = packed_24(values, meta, w);
  require_aligned(w, 16, "w");
  require_aligned(p.values, 4 * element_bytes(p.values), "values");
  return {p.values, p.meta, w, {}, {}};
}

void bind_pack_24_cuda(py::module_& m) {
  m.def("pack_24_cuda", [](py::capsule values, py::capsule meta, py::capsule overfull,
                           py::capsule w, OptionalCapsule mask, uintptr_t stream, int /*threads*/) {
    const TensorView vw = matrix(w, "w");
    Pack24Cuda args = cuda_24(values, meta, vw);
    args.mask = mask_of(mask, vw);
    if (mask) {
      require_contiguous(args.mask, "mask");
      require_aligned(args.mask, 8, "mask");
    }
    args.overfull = view(overfull);
    require_dtype(args.overfull, DType::i64, "overfull");
    require_shape(args.overfull, {1}, "overfull");
    check_status(launch_pack_24(args, reinterpret_cast<cudaStream_t>(stream)));
  });
  m.def("unpack_24_cuda",
        [](py::capsule w, py::capsule values, py::capsule meta, uintptr_t stream, int /*threads*/) {
          const TensorView vw = matrix(w, "w");
          require_contiguous(vw, "w");
          check_status(
              launch_unpack_24(cuda_24(values, meta, vw), reinterpret_cast<cudaStream_t>(stream)));
        });
}

void bind_pack_bitmap_cuda(py::module_& m) {
  m.def("pack_bitmap_rows_cuda",
        [](py::capsule bitmap, py::capsule row_offsets, py::capsule w, OptionalCapsule mask,
           py::capsule state, uintptr_t stream, int /*threads*/) {
          const TensorView vw = matrix(w, "w"), vm = mask_of(mask, vw), vs = view(state);
          require_on_cuda(vw, "w");
          require_contiguous(vm, "mask");
          require_dtype(vs, DType::i64, "state");
          require_shape(vs, {1}, "state");
          check_status(
              launch_bitmap_rows({bitmap_of(bitmap, vw), offsets_of(row_offsets, vw), vw, vm, vs},
                                 reinterpret_cast<cudaStream_t>(stream)));
        });
  m.def("move_bitmap_values_cuda",
        [](py::capsule w, py::capsule values, py::capsule bitmap, py::capsule row_offsets,
           bool pack, uintptr_t stream, int /*threads*/) {
          const TensorView vw = matrix(w, "w"), vv = view(values);
          require_on_cuda(vw, "w");
          require(pack || vw.contiguous(), "w: expected a contiguous tensor");
          require_dtype(vv, vw.dtype, "values");
          require(vv.ndim == 1 && vv.contiguous(), "values: expected one contiguous dimension");
          require_aligned(vv, 16, "values");
          check_status(launch_bitmap_values(
              {vw, vv, bitmap_of(bitmap, vw), offsets_of(row_offsets, vw), pack},
              reinterpret_cast<cudaStream_t>(stream)));
        });
}
#endif

}  // namespace

void bind_pack(py::module_& m) {
#ifdef PYPRUNE_WITH_CUDA
  bind_pack_24_cuda(m);
  bind_pack_bitmap_cuda(m);
#endif
  m.def("pack_24",
        [](py::capsule values, py::capsule meta, py::capsule w, OptionalCapsule mask, int threads) {
          const TensorView vw = matrix(w, "w");
          const Packed24 p = packed_24(values, meta, vw);
          int64_t overfull = -1;
          prefer_huge_pages(p.values, element_bytes(p.values));
          const Pack24Args args{p.values, p.meta, vw, mask_of(mask, vw), &overfull, threads};
          py::gil_scoped_release release;
          pack_24(args);
          return overfull;
        });
  m.def("unpack_24", [](py::capsule w, py::capsule values, py::capsule meta, int threads) {
    const TensorView vw = matrix(w, "w");
    const Packed24 p = packed_24(values, meta, vw);
    require_contiguous(vw, "w");
    prefer_huge_pages(vw, element_bytes(vw));
    py::gil_scoped_release release;
    unpack_24({vw, p.values, p.meta, threads});
  });
  m.def("pack_bitmap_rows", [](py::capsule bitmap, py::capsule counts, py::capsule w,
                               OptionalCapsule mask, int threads) {
    const TensorView vw = matrix(w, "w"), vc = view(counts);
    require_array(vc, DType::i64, {vw.shape[0]}, "counts");
    const BitmapRowsArgs args{bitmap_of(bitmap, vw), vc, vw, mask_of(mask, vw), threads};
    py::gil_scoped_release release;
    pack_bitmap_rows(args);
  });
  m.def("move_bitmap_values", [](py::capsule w, py::capsule values, py::capsule bitmap,
                                 py::capsule row_offsets, bool pack, int threads) {
    const TensorView vw = matrix(w, "w"), vv = view(values), vo = offsets_of(row_offsets, vw);
    require_dtype(vv, vw.dtype, "values");
    require(vv.ndim == 1 && vv.contiguous(), "values: expected one contiguous dimension");
    prefer_huge_pages(pack ? vv : vw, element_bytes(vw));
    int64_t broken = -1;
    const BitmapValuesArgs args{vw, vv, bitmap_of(bitmap, vw), vo, &broken, pack, threads};
    py::gil_scoped_release release;
    move_bitmap_values(args);
    return broken;
  });
}

}  // namespace pyprune
