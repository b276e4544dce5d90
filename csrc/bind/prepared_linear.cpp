#include <algorithm>
#include <cstring>
#include <memory>
#include <string>

#include "bind/linear_op.h"

namespace pyprune {
namespace {

float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

float widen_bf16(uint16_t h) { return of_bits(static_cast<uint32_t>(h) << 16); }

// Without branches: a loop of these is made of vectors.
float widen_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu, sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  // Zero and subnormals count in units of 2^-24; an exponent of all ones stays one.
  const float small = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  uint32_t bits;
  std::memcpy(&bits, &small, 4);
  const uint32_t rebased = (magnitude << 13) + ((magnitude < 0x7c00u ? 112u : 224u) << 23);
  return of_bits((magnitude < 0x400u ? bits : rebased) | sign);
}

// 16-bit numbers of a vector as fp32, for the length of a call: a copy that was kept would not see
// what is written to the original.
class Widened {
 public:
  void take(TensorView& t) {
    if (t.dtype != DType::bf16 && t.dtype != DType::f16) return;
    const int64_t n = t.numel();
    numbers_.reset(new float[static_cast<size_t>(n)]);
    const auto* from = t.ptr<const uint16_t>();
    if (t.dtype == DType::bf16)
      std::transform(from, from + n, numbers_.get(), widen_bf16);
    else
      std::transform(from, from + n, numbers_.get(), widen_f16);
    t.data = numbers_.get();
    t.dtype = DType::f32;
  }

 private:
  std::unique_ptr<float[]> numbers_;
};

// A weight that was taken once, so that a product takes two addresses: describing four or five
// tensors anew costs more than the product of one row with a small matrix. The scales of int8
// values, and the bias, are fp32, bf16 or fp16.
class PreparedLinear {
 public:
  PreparedLinear(const std::string& name, const std::vector<py::capsule>& parts,
                 const OptionalCapsule& bias, int64_t rows, int64_t cols)
      : op_(find(name)), rows_(rows), cols_(cols) {
    require(static_cast<int>(parts.size()) == op_.parts,
            name + ": expected " + std::to_string(op_.parts) + " tensors of W");
    for (int i = 0; i < op_.parts; ++i) weight_.parts[i] = keep(parts[i]);
    scaled_ = weight_.parts[0].dtype == DType::i8;
    if (scaled_) require_contiguous(weight_.parts[op_.parts - 1], "scales");
    has_bias_ = bias.has_value();
    if (has_bias_) bias_ = keep(*bias);
    if (has_bias_) require_contiguous(bias_, "bias");
  }
  PreparedLinear(const PreparedLinear&) = delete;
  PreparedLinear& operator=(const PreparedLinear&) = delete;

  // y and x: addresses of contiguous bf16 or f32 matrices [m, rows] and [m, cols] on the CPU.
  void multiply(uintptr_t y, uintptr_t x, int64_t m, bool bf16, int threads) const {
    require(m >= 0 && threads >= 1, "expected rows of 0 or more and threads of 1 or more");
    const DType dtype = bf16 ? DType::bf16 : DType::f32;
    const TensorView out = matrix(y, dtype, m, rows_), in = matrix(x, dtype, m, cols_);
    py::gil_scoped_release release;
    LinearWeight w = weight_;
    TensorView shift = bias_;
    Widened scales, wide_bias;
    if (scaled_) scales.take(w.parts[op_.parts - 1]);
    if (has_bias_) wide_bias.take(shift);
    w.bias = has_bias_ ? &shift : nullptr;
    op_.multiply(out, in, w, threads);
  }

 private:
  LinearOp op_;
  int64_t rows_, cols_;
  std::vector<py::object> kept_;  // capsules: they hold the memory that the views describe
  LinearWeight weight_{};
  TensorView bias_;
  bool scaled_ = false;  // the last of the parts are scales
  bool has_bias_ = false;

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
