// Kernels that begin while the one before them ends (programmatic dependent launch, compute
// capability 9.0 and up; elsewhere all of this does nothing).
//
// A product with few rows takes a few microseconds, of which one or two pass between the end of the
// kernel before it and the first bytes of W. So the kernel is launched early, asks the second-level
// cache for the first part of W, and waits before it reads or writes anything: what it asked for
// may still change, for the cache is where all multiprocessors' writes arrive.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyprune {

// The results of the kernel before are there, and it has ended.
__device__ __forceinline__ void wait_for_kernel_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin as soon as all blocks have come here and leave it room. Called after
// wait_for_kernel_before(): it then need not fear a kernel before this one.
__device__ __forceinline__ void let_next_kernel_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks the second-level cache for `bytes` bytes, a multiple of 16, from a multiple of 16.
__device__ __forceinline__ void prefetch_bytes(const void* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  if (bytes)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(from), "r"(bytes) : "memory");
#endif
}

// Adds to a launch that it may overlap the kernel before it.
inline void add_overlap(cudaLaunchConfig_t& config, cudaLaunchAttribute* attributes) {
  cudaLaunchAttribute& a = attributes[config.numAttrs++];
  a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  a.val.programmaticStreamSerializationAllowed = 1;
}

}  // namespace pyprune
