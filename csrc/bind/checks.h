// What the bindings ask of tensors. The Python side has checked shapes and dtypes already (each
// op's _check_<op>); these guard the native entry points against being called around it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "tensor_view.h"

namespace pyprune {

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

// A contiguous tensor of this dtype and shape.
inline void require_array(const TensorView& t, DType dtype, std::initializer_list<int64_t> shape,
                          const char* name) {
  require_dtype(t, dtype, name);
  require_shape(t, shape, name);
  require_contiguous(t, name);
}

inline bool unit_stride(const TensorView& t) {
  const int last = t.ndim - 1;
  return t.shape[last] <= 1 || t.stride[last] == 1;
}

// A tensor of two or three dimensions whose rows are contiguous, at any distance from each other.
inline void require_rows(const TensorView& t, int ndim, const char* name) {
  if (t.ndim != ndim || !unit_stride(t))
    throw std::invalid_argument(std::string(name) + ": expected " + (ndim == 2 ? "two" : "three") +
                                " dimensions with unit stride along the last");
}

inline void require_on_cuda(const TensorView& t, const char* name) {
  if (!t.on_cuda) throw std::invalid_argument(std::string(name) + ": expected a CUDA tensor");
}

inline void require_threads(int threads) { require(threads >= 1, "threads: expected at least 1"); }

}  // namespace pyprune
