// Products y = x W^T + bias on the CPU, whatever the format of W, under two bindings: a function of
// capsules, `<name>(y, x, *parts, bias, threads)`, and `PreparedLinear`, which has taken the weight
// beforehand (prepared_linear.cpp).
#pragma once

#include <array>
#include <vector>

#include "bind/capsule.h"

namespace pyprune {

// The tensors of W in the order of its format, and the bias: fp32 [R], or null.
struct LinearWeight {
  static constexpr int kMaxParts = 6;
  std::array<TensorView, kMaxParts> parts;
  const TensorView* bias;
};

struct LinearOp {
  const char* name;
  int parts;
  // Checks everything and multiplies; called without the interpreter's lock. x: f32 or bf16 [M, C];
  // y: [M, R].
  void (*multiply)(const TensorView& y, const TensorView& x, const LinearWeight& w, int threads);
};

inline std::vector<LinearOp>& linear_ops() {
  static std::vector<LinearOp> known;
  return known;
}

// What all formats ask of x, y and the bias.
inline void check_linear(const TensorView& y, const TensorView& x, int64_t rows,
                         const TensorView* bias) {
  require_rows(x, 2, "x");
  require(x.dtype == DType::f32 || x.dtype == DType::bf16, "x: expected float32 or bfloat16");
  require_array(y, x.dtype, {x.shape[0], rows}, "y");
  if (bias) require_array(*bias, DType::f32, {rows}, "bias");
}

inline void bind_linear(py::module_& m, const LinearOp& op) {
  linear_ops().push_back(op);
  m.def(op.name, [op](const py::args& args) {
    require(static_cast<int>(args.size()) == op.parts + 4,
            "expected y, x, the tensors of W, a bias or None and the number of threads");
    const TensorView y = view(args[0].cast<py::capsule>()), x = view(args[1].cast<py::capsule>());
    LinearWeight w{};
    for (int i = 0; i < op.parts; ++i) w.parts[i] = view(args[2 + i].cast<py::capsule>());
    const auto given = args[2 + op.parts].cast<OptionalCapsule>();
    TensorView bias;
    if (given) {
      bias = view(*given);
      w.bias = &bias;
    }
    const int threads = args[3 + op.parts].cast<int>();
    require_threads(threads);
    py::gil_scoped_release release;
    op.multiply(y, x, w, threads);
  });
}

}  // namespace pyprune
