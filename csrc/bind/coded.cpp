#include "cpu/coded.h"

#include "bind/capsule.h"

namespace pyprune {
namespace {

void require_bytes(const TensorView& t, DType dtype, std::initializer_list<int64_t> shape,
                   const char* name) {
  require_dtype(t, dtype, name);
  require_shape(t, shape, name);
  require(t.contiguous(), std::string(name) + ": expected a contiguous tensor");
}

CodedViews coded_views(const py::capsule& low, const py::capsule& codes, const py::capsule& bases,
                       const py::capsule& escapes, const py::capsule& row_offsets) {
  const CodedViews w{view(low), view(codes), view(bases), view(escapes), view(row_offsets)};
  require(w.low.ndim == 2 && w.low.shape[1] > 0, "low: expected two dimensions and a column");
  require(w.escapes.ndim == 1, "escapes: expected one dimension");
  const int64_t rows = w.low.shape[0], cols = w.low.shape[1];
  require_bytes(w.low, DType::u8, {rows, cols}, "low");
  require_bytes(w.codes, DType::u8, {rows, 3 * ((cols + 7) / 8)}, "codes");
  require_bytes(w.bases, DType::u8, {rows}, "bases");
  require_bytes(w.escapes, DType::u8, {w.escapes.shape[0]}, "escapes");
  require_bytes(w.offsets, DType::i64, {rows + 1}, "row_offsets");
  return w;
}

}  // namespace

void bind_coded(py::module_& m) {
  m.def("linear_coded", [](py::capsule y, py::capsule x, py::capsule low, py::capsule codes,
                           py::capsule bases, py::capsule escapes, py::capsule row_offsets,
                           OptionalCapsule bias, int threads) {
    const CodedViews w = coded_views(low, codes, bases, escapes, row_offsets);
    const TensorView vx = view(x), vy = view(y);
    const int64_t rows = w.low.shape[0], cols = w.low.shape[1];
    require(vx.ndim == 2 && vx.shape[1] == cols, "x: expected as many columns as low");
    require(vx.stride[1] == 1 || cols == 1, "x: expected unit stride along the last");
    require(vx.dtype == DType::f32 || vx.dtype == DType::bf16, "x: expected float32 or bfloat16");
    require_bytes(vy, vx.dtype, {vx.shape[0], rows}, "y");
    TensorView b;
    if (bias) {
      b = view(*bias);
      require_bytes(b, DType::f32, {rows}, "bias");
    }
    if (vy.numel() == 0) return;
    py::gil_scoped_release release;
    linear_coded({{WeightFormat::dense, vy, vx, rows, cols, w.low, nullptr, nullptr,
                   bias ? &b : nullptr, threads},
                  w});
  });
  m.def("unpack_coded",
        [](py::capsule out, OptionalCapsule rows, py::capsule low, py::capsule codes,
           py::capsule bases, py::capsule escapes, py::capsule row_offsets, int threads) {
          const CodedViews w = coded_views(low, codes, bases, escapes, row_offsets);
          const TensorView to = view(out);
          TensorView chosen;
          int64_t n = w.low.shape[0];
          if (rows) {
            chosen = view(*rows);
            require(chosen.ndim == 1, "rows: expected one dimension");
            n = chosen.shape[0];
            require_bytes(chosen, DType::i64, {n}, "rows");
          }
          require_bytes(to, DType::bf16, {n, w.low.shape[1]}, "out");
          if (n == 0) return;
          py::gil_scoped_release release;
          unpack_coded({to, rows ? &chosen : nullptr, w, threads});
        });
}

}  // namespace pyprune
