#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/mask_nm.h"

namespace pyprune {
namespace {

// Eight weights a thread: two groups, one 128-bit load of 16-bit weights (two of fp32) and one
// 64-bit store of mask bytes. A warp then writes 256 consecutive bytes.
constexpr int kWidth = 8;
constexpr int kThreads = 256;
// Rows beyond this are reached by a stride over the grid (gridDim.y is 16 bits).
constexpr int64_t kMaxGridRows = 32768;

struct Problem {
  uint8_t* mask;
  const void* w;
  const float* column_scale;
  const float* row_scale;
  const float* addend;
  const uint8_t* preserve;
  int64_t rows, cols, w_stride, addend_stride, preserve_stride;
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

// The order-preserving key of csrc/cpu/score.h: bit pattern plus one, one key for all NaNs.
__device__ inline uint32_t key_of(float score) {
  const uint32_t bits = __float_as_uint(score) & 0x7fffffffu;
  return (bits > 0x7f800000u ? 0x7fc00000u : bits) + 1;
}

// Ranks four keys by six comparisons; of equal keys the higher index wins. Returns one byte a
// member, 1 = among the two highest.
__device__ inline uint32_t keep_two_of_four(const uint32_t (&key)[4]) {
  int beaten[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = i + 1; j < 4; ++j) {
      const int later_wins = key[j] >= key[i];
      beaten[i] += later_wins;
      beaten[j] += 1 - later_wins;
    }
  uint32_t bytes = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    bytes |= static_cast<uint32_t>(beaten[i] < 2 && key[i] != 0) << (8 * i);
  return bytes;
}

// `count` weights from column `c`; with kVector they are kWidth and 16-byte aligned.
template <class T, bool kVector>
__device__ inline void load_weights(const T* w, int count, float (&out)[kWidth]) {
  if constexpr (kVector) {
    constexpr int kLoads = kWidth * sizeof(T) / sizeof(uint4);
    uint4 raw[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) raw[i] = __ldcs(reinterpret_cast<const uint4*>(w) + i);
    const T* values = reinterpret_cast<const T*>(raw);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = widen(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) out[i] = i < count ? widen(w[i]) : 0.0f;
  }
}

// No product here can be contracted into an fma with a sum, so masks equal those of the CPU.
__device__ inline uint32_t key_at(const Problem& p, float w, int64_t row, int64_t col) {
  float score = w;
  if (p.column_scale || p.addend) {
    float factor = p.column_scale ? p.column_scale[col] : 0.0f;
    if (p.addend) {
      const float extra = p.addend[row * p.addend_stride + col];
      factor = p.column_scale ? __fadd_rn(factor, extra) : extra;
    }
    score = __fmul_rn(score, factor);
  }
  if (p.row_scale) score = __fmul_rn(score, p.row_scale[row]);
  const bool allowed = !p.preserve || p.preserve[row * p.preserve_stride + col];
  return allowed ? key_of(score) : 0;
}

template <class T, bool kVector>
__global__ void __launch_bounds__(kThreads) mask_24_kernel(Problem p) {
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWidth;
  if (col >= p.cols) return;
  const int count = p.cols - col < kWidth ? 4 : kWidth;
  for (int64_t row = blockIdx.y; row < p.rows; row += gridDim.y) {
    float w[kWidth];
    load_weights<T, kVector>(static_cast<const T*>(p.w) + row * p.w_stride + col, count, w);
    uint32_t bytes[2] = {0, 0};
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      if (!kVector && g * 4 >= count) break;
      uint32_t key[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) key[i] = key_at(p, w[4 * g + i], row, col + 4 * g + i);
      bytes[g] = keep_two_of_four(key);
    }
    uint8_t* out = p.mask + row * p.cols + col;
    if constexpr (kVector) {
      __stcs(reinterpret_cast<uint2*>(out), make_uint2(bytes[0], bytes[1]));
    } else {
      for (int i = 0; i < count; ++i) out[i] = bytes[i / 4] >> (8 * (i % 4)) & 1;
    }
  }
}

template <class T>
void launch(const Problem& p, bool vector, cudaStream_t stream) {
  const int64_t per_block = static_cast<int64_t>(kThreads) * kWidth;
  const dim3 grid(static_cast<unsigned>((p.cols + per_block - 1) / per_block),
                  static_cast<unsigned>(p.rows < kMaxGridRows ? p.rows : kMaxGridRows));
  if (vector)
    mask_24_kernel<T, true><<<grid, kThreads, 0, stream>>>(p);
  else
    mask_24_kernel<T, false><<<grid, kThreads, 0, stream>>>(p);
}

}  // namespace

cudaError_t launch_mask_24(const TensorView& mask, const TensorView& w, const ScoreTerms& terms,
                           cudaStream_t stream) {
  Problem p{mask.ptr<uint8_t>(),
            w.data,
            terms.column_scale.ptr<float>(),
            terms.row_scale.ptr<float>(),
            terms.addend.ptr<float>(),
            terms.preserve.ptr<uint8_t>(),
            w.shape[0],
            w.shape[1],
            w.stride[0],
            terms.addend.stride[0],
            terms.preserve.stride[0]};
  // Magnitude alone does not care where rows end: a contiguous matrix is one long row, so that
  // narrow matrices fill their blocks too.
  const bool plain = !p.column_scale && !p.row_scale && !p.addend && !p.preserve;
  if (plain && w.contiguous()) {
    p.cols *= p.rows;
    p.rows = 1;
  }
  const int64_t size = w.dtype == DType::f32 ? 4 : 2;
  const bool vector = p.cols % kWidth == 0 && reinterpret_cast<uintptr_t>(p.w) % 16 == 0 &&
                      (p.rows == 1 || p.w_stride * size % 16 == 0) &&
                      reinterpret_cast<uintptr_t>(p.mask) % 8 == 0;
  switch (w.dtype) {
    case DType::f32:
      launch<float>(p, vector, stream);
      break;
    case DType::bf16:
      launch<__nv_bfloat16>(p, vector, stream);
      break;
    case DType::f16:
      launch<__half>(p, vector, stream);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace pyprune
