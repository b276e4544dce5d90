// Kernels that begin while the one before them ends (programmatic dependent launch, compute
// capability 9.0 and up; elsewhere all of this does nothing).
//
// A product with few rows takes a few microseconds, of which one or two pass between the end of the
// kernel before it and the first bytes of W. So the kernel is launched early, sets itself up, and
// waits before it reads or writes anything global: 0 to 9 % on an H200, most where W is small.
// (Asking the second-level cache for W before the wait gained nothing on top; reading W before it
// would, 2 to 12 %, but a kernel before may have written W.)
//
// That holds in streams and in graphs, whatever the kernel before is: the wait ends when that
// kernel has ended and what it wrote is visible. If it is one of these, it has itself waited before
// it let this one begin, so everything before it has ended, too; a kernel that was launched without
// this waits for this one's end as ever.
#pragma once

#include <cuda_runtime_api.h>

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

// Adds to a launch that it may overlap the kernel before it.
inline void add_overlap(cudaLaunchConfig_t& config, cudaLaunchAttribute* attributes) {
  cudaLaunchAttribute& a = attributes[config.numAttrs++];
  a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  a.val.programmaticStreamSerializationAllowed = 1;
}

}  // namespace pyprune
