// A checked, borrowed view of one tensor that arrived as a DLPack capsule.
//
// The module does not link torch: this struct is the only thing that crosses the language border.
// The capsule holds the tensor's memory: a view must not outlive the call that it was made for,
// unless whoever keeps it keeps the capsule (bind/prepared_linear.cpp).
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyprune {

enum class DType : int { f32, f64, bf16, f16, i8, u8, i32, i64, boolean };

inline const char* dtype_name(DType t) {
  static const char* names[] = {"float32", "float64", "bfloat16", "float16", "int8",
                                "uint8",   "int32",   "int64",    "bool"};
  return names[static_cast<int>(t)];
}

constexpr int kMaxDims = 4;

struct TensorView {
  void* data = nullptr;  // already advanced by the DLPack byte offset
  DType dtype = DType::f32;
  int ndim = 0;
  bool on_cuda = false;
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  template <class T>
  T* ptr() const {
    return static_cast<T*>(data);
  }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= shape[i];
    return n;
  }
  bool contiguous() const {
    if (numel() == 0) return true;  // DLPack exporters write any strides for an empty tensor
    int64_t expected = 1;
    for (int i = ndim - 1; i >= 0; --i) {
      if (shape[i] != 1 && stride[i] != expected) return false;
      expected *= shape[i];
    }
    return true;
  }
};

}  // namespace pyprune
