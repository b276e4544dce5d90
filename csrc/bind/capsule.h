// DLPack capsules to TensorViews, for the binding files (csrc/bind/ and bindings.cpp: the only
// files that include pybind11).
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "bind/checks.h"

namespace py = pybind11;

namespace pyprune {

// The DLPack ABI, version 0.x capsules named "dltensor" (as torch.utils.dlpack.to_dlpack makes).
struct DLDevice {
  int32_t type, id;
};
struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

inline DType dtype_of(DLDataType t) {
  enum { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
  if (t.lanes == 1) {
    if (t.code == kFloat && t.bits == 32) return DType::f32;
    if (t.code == kFloat && t.bits == 64) return DType::f64;
    if (t.code == kFloat && t.bits == 16) return DType::f16;
    if (t.code == kBfloat && t.bits == 16) return DType::bf16;
    if (t.code == kInt && t.bits == 8) return DType::i8;
    if (t.code == kUInt && t.bits == 8) return DType::u8;
    if (t.code == kInt && t.bits == 32) return DType::i32;
    if (t.code == kInt && t.bits == 64) return DType::i64;
    if (t.code == kBool && t.bits == 8) return DType::boolean;
  }
  throw std::invalid_argument("unsupported DLPack dtype: code " + std::to_string(t.code) +
                              ", bits " + std::to_string(t.bits));
}

inline TensorView view(const py::capsule& capsule) {
  require(std::string(capsule.name() ? capsule.name() : "") == "dltensor",
          "expected an unused DLPack capsule");
  // The DLTensor is the first member of the DLManagedTensor that the capsule points to.
  const auto* t = capsule.get_pointer<DLTensor>();
  enum { kCPU = 1, kCUDA = 2, kCUDAHost = 3 };
  require(t->device.type == kCPU || t->device.type == kCUDA || t->device.type == kCUDAHost,
          "expected a CPU or CUDA tensor");
  require(t->ndim <= kMaxDims, "expected at most 4 dimensions");
  TensorView v;
  v.data = static_cast<char*>(t->data) + t->byte_offset;
  v.dtype = dtype_of(t->dtype);
  v.ndim = t->ndim;
  v.on_cuda = t->device.type == kCUDA;
  int64_t expected = 1;
  for (int i = t->ndim - 1; i >= 0; --i) {
    v.shape[i] = t->shape[i];
    v.stride[i] = t->strides ? t->strides[i] : expected;
    expected *= t->shape[i];
  }
  return v;
}

using OptionalCapsule = std::optional<py::capsule>;

// A tensor that may be left out. Kernels take null for it.
struct OptionalView {
  TensorView t;
  bool given = false;

  const TensorView* get() const { return given ? &t : nullptr; }
};

// One that is contiguous and of this dtype and shape, if it is there.
inline OptionalView optional_array(const OptionalCapsule& capsule, DType dtype,
                                   std::initializer_list<int64_t> shape, const char* name) {
  OptionalView v;
  if (!capsule) return v;
  v = {view(*capsule), true};
  require_array(v.t, dtype, shape, name);
  return v;
}

}  // namespace pyprune
