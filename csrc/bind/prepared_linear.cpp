#include <algorithm>
#include <string>

#include "bind/linear_op.h"

namespace pyprune {
namespace {

// A weight that was taken once, so that a product takes two addresses: describing four or five
// tensors anew costs more than the product of one row with a small matrix.
class PreparedLinear {
 public:
  PreparedLinear(const std::string& name, const std::vector<py::capsule>& parts,
                 const OptionalCapsule& bias, int64_t rows, int64_t cols)
      : op_(find(name)), rows_(rows), cols_(cols) {
    require(static_cast<int>(parts.size()) == op_.parts,
            name + ": expected " + std::to_string(op_.parts) + " tensors of W");
    for (int i = 0; i < op_.parts; ++i) weight_.parts[i] = keep(parts[i]);
    weight_.bias = nullptr;
    if (bias) {
      bias_ = keep(*bias);
      weight_.bias = &bias_;
    }
  }
  PreparedLinear(const PreparedLinear&) = delete;
  PreparedLinear& operator=(const PreparedLinear&) = delete;

  // y and x: addresses of contiguous bf16 or f32 matrices [m, rows] and [m, cols] on the CPU.
  void multiply(uintptr_t y, uintptr_t x, int64_t m, bool bf16, int threads) const {
    require(m >= 0 && threads >= 1, "expected rows of 0 or more and threads of 1 or more");
    const DType dtype = bf16 ? DType::bf16 : DType::f32;
    const TensorView out = matrix(y, dtype, m, rows_), in = matrix(x, dtype, m, cols_);
    py::gil_scoped_release release;
    op_.multiply(out, in, weight_, threads);
  }

 private:
  LinearOp op_;
  int64_t rows_, cols_;
  std::vector<py::object> kept_;  // capsules: they hold the memory that the views describe
  LinearWeight weight_;
  TensorView bias_;

  static const LinearOp& find(const std::string& name) {
    const auto& known = linear_ops();
    const auto found = std::find_if(known.begin(), known.end(),
                                    [&](const LinearOp& op) { return name == op.name; });
    require(found != known.end(), "expected the name of a product, got " + name);
    return *found;
  }

  TensorView keep(const py::capsule& capsule) {
    kept_.push_back(capsule);
    return view(capsule);
  }

  static TensorView matrix(uintptr_t data, DType dtype, int64_t rows, int64_t cols) {
    TensorView t;
    t.data = reinterpret_cast<void*>(data);
    t.dtype = dtype;
    t.ndim = 2;
    t.shape[0] = rows;
    t.shape[1] = cols;
    t.stride[0] = cols;
    t.stride[1] = 1;
    return t;
  }
};

}  // namespace

void bind_prepared_linear(py::module_& m) {
  py::class_<PreparedLinear>(m, "PreparedLinear")
      .def(py::init<const std::string&, const std::vector<py::capsule>&, const OptionalCapsule&,
                    int64_t, int64_t>())
      .def("multiply", &PreparedLinear::multiply);
}

}  // namespace pyprune
