// What a launch needs to know of the device it goes to.
#pragma once

#include <cuda_runtime_api.h>

namespace pyprune {

struct Device {
  int processors;    // multiprocessors
  int major;         // of the compute capability
  int block_shared;  // bytes of shared memory that a block can have if its kernel opts in
};

// The least that block_shared is on any device from compute capability 8.0 on (8.6, 8.9, 12.0).
constexpr int kLeastBlockShared = 99 * 1024;

// The current one.
inline cudaError_t query_device(Device& d) {
  int device;
  cudaError_t status = cudaGetDevice(&device);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&value, attribute, device);
  };
  get(d.processors, cudaDevAttrMultiProcessorCount);
  get(d.major, cudaDevAttrComputeCapabilityMajor);
  get(d.block_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return status;
}

}  // namespace pyprune
