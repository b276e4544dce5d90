// A failed CUDA call as an exception. Only where CUDA objects are built.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>

namespace pyprune {

inline void check_status(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

}  // namespace pyprune
