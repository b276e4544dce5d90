// The last step of a product with few rows of x: the sums that a block's warps hold of the same
// elements are added, and those of the blocks of a cluster that share its rows of W. Always in the
// same order: the result does not depend on timing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyprune {

__device__ inline void convert(float v, __nv_bfloat16* out) { *out = __float2bfloat16(v); }
__device__ inline void convert(float v, __half* out) { *out = __float2half(v); }
__device__ inline void convert(float v, float* out) { *out = v; }

__device__ __forceinline__ void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// What another block of the cluster has where this one has `shared`.
__device__ __forceinline__ float load_of_block(const float* shared, int block) {
  float v = *shared;
#if __CUDA_ARCH__ >= 900
  uint32_t at;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(at)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(block));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
#endif
  return v;
}

// Where a block of kRows rows of W and kTokens rows of x leaves its sums: [part][row of x][row of
// W] in shared memory. The gap spreads what a warp writes at a time over the banks.
template <int kRows, int kTokens, int kParts>
struct BlockSums {
  static constexpr int kPitch = kRows + 4;
  static constexpr int kPart = kTokens * kPitch;
  static constexpr int kBytes = kParts * kPart * 4;

  // Stores y[m][first_row + r] for the `m` first rows of x. Parallel to it the blocks of the same
  // blockIdx.x and others' blockIdx.y, a cluster, have parts of the same sums.
  template <class T>
  __device__ static void store(float* sums, T* y, const float* bias, int64_t first_row,
                               int64_t rows, int m) {
    const int splits = gridDim.y, size = kRows * m, threads = blockDim.x;
    const auto put = [&](int i, float v) {
      const int64_t row = first_row + i % kRows;
      if (row >= rows) return;
      if (bias) v += bias[row];
      convert(v, y + i / kRows * rows + row);
    };
    for (int i = threadIdx.x; i < size; i += threads) {
      float* at = sums + i / kRows * kPitch + i % kRows;
      float total = *at;
#pragma unroll
      for (int part = 1; part < kParts; ++part) total += at[part * kPart];
      if (splits == 1)
        put(i, total);
      else
        *at = total;
    }
    if (splits == 1) return;
    cluster_barrier();
    for (int i = blockIdx.y * threads + threadIdx.x; i < size; i += splits * threads) {
      float total = 0.0f;
      for (int k = 0; k < splits; ++k)
        total += load_of_block(sums + i / kRows * kPitch + i % kRows, k);
      put(i, total);
    }
    cluster_barrier();  // the others may still read this block's
  }
};

constexpr int kMostSplits = 8;  // blocks of a cluster on any device that has them

// Adds to a launch that the blocks of the same blockIdx.x are a cluster.
inline void add_cluster(cudaLaunchConfig_t& config, cudaLaunchAttribute* attributes) {
  if (config.gridDim.y == 1) return;
  cudaLaunchAttribute& a = attributes[config.numAttrs++];
  a.id = cudaLaunchAttributeClusterDimension;
  a.val.clusterDim.x = 1;
  a.val.clusterDim.y = config.gridDim.y;
  a.val.clusterDim.z = 1;
}

}  // namespace pyprune
