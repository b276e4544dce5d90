#include "cpu/coded.h"

#include "bind/linear_op.h"

namespace pyprune {
namespace {

CodedViews check_coded(const CodedViews& w) {
  require(w.low.ndim == 2 && w.low.shape[1] > 0, "low: expected two dimensions and a column");
  require(w.escapes.ndim == 1, "escapes: expected one dimension");
  const int64_t rows = w.low.shape[0], cols = w.low.shape[1];
  require_array(w.low, DType::u8, {rows, cols}, "low");
  require_array(w.codes, DType::u8, {rows, 3 * ((cols + 7) / 8)}, "codes");
  require_array(w.bases, DType::u8, {rows}, "bases");
  require_array(w.escapes, DType::u8, {w.escapes.shape[0]}, "escapes");
  require_array(w.offsets, DType::i64, {rows + 1}, "row_offsets");
  return w;
}

void multiply(const TensorView& y, const TensorView& x, const LinearWeight& w, int threads) {
  const auto& p = w.parts;
  const CodedViews coded = check_coded({p[0], p[1], p[2], p[3], p[4]});
  const int64_t rows = coded.low.shape[0], cols = coded.low.shape[1];
  check_linear(y, x, rows, w.bias);
  require(x.shape[1] == cols, "x: expected as many columns as low");
  if (y.numel() == 0) return;
  linear_coded(
      {{WeightFormat::dense, y, x, rows, cols, coded.low, nullptr, nullptr, w.bias, threads},
       coded});
}

}  // namespace

void bind_coded(py::module_& m) {
  bind_linear(m, {"linear_coded", 5, multiply});
  m.def("unpack_coded",
        [](py::capsule out, OptionalCapsule rows, py::capsule low, py::capsule codes,
           py::capsule bases, py::capsule escapes, py::capsule row_offsets, int threads) {
          const CodedViews w =
              check_coded({view(low), view(codes), view(bases), view(escapes), view(row_offsets)});
          const TensorView to = view(out);
          TensorView chosen;
          int64_t n = w.low.shape[0];
          if (rows) {
            chosen = view(*rows);
            require(chosen.ndim == 1, "rows: expected one dimension");
            n = chosen.shape[0];
            require_array(chosen, DType::i64, {n}, "rows");
          }
          require_array(to, DType::bf16, {n, w.low.shape[1]}, "out");
          if (n == 0) return;
          py::gil_scoped_release release;
          unpack_coded({to, rows ? &chosen : nullptr, w, threads});
        });
}

}  // namespace pyprune
