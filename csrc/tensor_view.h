// A checked, borrowed view of one tensor that arrived as a DLPack capsule.
//
// The module does not link torch: this struct is the only thing that crosses the language border.
// The capsule stays owned by Python, so a view must not outlive the call it was made for.
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

// The Python side has checked shapes and dtypes already (each op's _check_<op>); these guard the
// native entry points against being called around it.
inline void require(bool ok, const std::string& message) {
  if (!ok) throw std::invalid_argument(message);
}
// Messages are put together when they are needed: a product of one row takes some microseconds.
inline void require(bool ok, const char* message) {
  if (!ok) throw std::invalid_argument(message);
}

inline void require_dtype(const TensorView& t, DType want, const char* name) {
  if (t.dtype != want)
    throw std::invalid_argument(std::string(name) + ": expected " + dtype_name(want) + ", got " +
                                dtype_name(t.dtype));
}

inline void require_shape(const TensorView& t, std::initializer_list<int64_t> want,
                          const char* name) {
  bool ok = t.ndim == static_cast<int>(want.size());
  int i = 0;
  for (int64_t w : want) ok = ok && t.shape[i++] == w;
  if (!ok) throw std::invalid_argument(std::string(name) + ": unexpected shape");
}

inline void require_contiguous(const TensorView& t, const char* name) {
  if (!t.contiguous())
    throw std::invalid_argument(std::string(name) + ": expected a contiguous tensor");
}

}  // namespace pyprune
