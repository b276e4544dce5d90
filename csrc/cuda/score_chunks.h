// Scores of eight consecutive columns at a time, for the selection kernels.
//
//   score = |w[i,j] * (column_scale[j] + addend[i,j]) * row_scale[i]|
//
// in fp32, rounded after every operation and in this order, so that every backend finds the same
// ties: nothing here can be contracted into an fma. An absent factor is replaced by one that
// changes nothing (1, or 0 in the sum).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/byte_permute.h"
#include "score_terms.h"

namespace pyprune {
namespace score_chunks {

constexpr int kChunk = 8;

// One matrix and the terms of its scores. Strides in elements.
struct Matrix {
  const void* w;
  const float *column_scale, *row_scale, *addend;
  const uint8_t* preserve;
  uint8_t* mask;
  int64_t rows, cols, w_stride, addend_stride, preserve_stride;
  // Every chunk is whole and starts where a vector load of each tensor may.
  bool vector;

  __host__ __device__ int64_t chunks_per_row() const { return (cols + kChunk - 1) / kChunk; }
};

template <class T>
constexpr int kRaw = kChunk * sizeof(T) / 4;  // words that hold a chunk of weights

inline bool aligned(const void* p, int64_t stride_bytes, int bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride_bytes % bytes == 0;
}

inline Matrix matrix_of(const TensorView& mask, const TensorView& w, const ScoreTerms& terms) {
  Matrix m{w.data,
           terms.column_scale.ptr<float>(),
           terms.row_scale.ptr<float>(),
           terms.addend.ptr<float>(),
           terms.preserve.ptr<uint8_t>(),
           mask.ptr<uint8_t>(),
           w.shape[0],
           w.shape[1],
           w.stride[0],
           terms.addend.stride[0],
           terms.preserve.stride[0],
           false};
  const int64_t size = w.dtype == DType::f32 ? 4 : 2;
  m.vector = m.cols % kChunk == 0 && aligned(m.w, m.rows > 1 ? m.w_stride * size : 0, 16) &&
             aligned(m.mask, 0, 8) && aligned(m.column_scale, 0, 16) &&
             aligned(m.addend, m.rows > 1 ? m.addend_stride * 4 : 0, 16) &&
             aligned(m.preserve, m.rows > 1 ? m.preserve_stride : 0, 8);
  return m;
}

// Whether the score is the weight's magnitude and the matrix one run of memory: where its rows end
// then does not matter.
inline bool is_one_run(const Matrix& m, const TensorView& w) {
  return !m.column_scale && !m.row_scale && !m.addend && !m.preserve && w.contiguous();
}

__device__ inline int columns_in_chunk(const Matrix& m, int64_t col) {
  return m.cols - col < kChunk ? static_cast<int>(m.cols - col) : kChunk;
}

// The weights' bits; zero past the last column.
template <class T>
__device__ inline void load_weights(const Matrix& m, int64_t row, int64_t col,
                                    uint32_t (&raw)[kRaw<T>]) {
  const T* at = static_cast<const T*>(m.w) + row * m.w_stride + col;
  if (m.vector) {
#pragma unroll
    for (int i = 0; i < kRaw<T> / 4; ++i) {
      const uint4 words = __ldcs(reinterpret_cast<const uint4*>(at) + i);
      raw[4 * i] = words.x;
      raw[4 * i + 1] = words.y;
      raw[4 * i + 2] = words.z;
      raw[4 * i + 3] = words.w;
    }
    return;
  }
  const int count = columns_in_chunk(m, col);
#pragma unroll
  for (int i = 0; i < kRaw<T>; ++i) {
    if constexpr (sizeof(T) == 4) {
      raw[i] = i < count ? reinterpret_cast<const uint32_t*>(at)[i] : 0;
    } else {
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(at);
      raw[i] = 2 * i < count ? bits[2 * i] : 0;
      if (2 * i + 1 < count) raw[i] |= static_cast<uint32_t>(bits[2 * i + 1]) << 16;
    }
  }
}

__device__ inline float weight_of(const uint32_t (&raw)[kRaw<float>], int i, float) {
  return __uint_as_float(raw[i]);
}
__device__ inline float weight_of(const uint32_t (&raw)[kRaw<__half>], int i, __nv_bfloat16) {
  return __uint_as_float(i % 2 ? raw[i / 2] & 0xffff0000u : raw[i / 2] << 16);
}
__device__ inline float weight_of(const uint32_t (&raw)[kRaw<__half>], int i, __half) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(raw[i / 2] >> (16 * (i % 2)))));
}

// `values[0..8)` = the fp32 numbers from `at`; `otherwise` where there are none.
__device__ inline void load_terms(const Matrix& m, const float* at, int64_t col, float otherwise,
                                  float (&values)[kChunk]) {
  if (at && m.vector) {
#pragma unroll
    for (int i = 0; i < kChunk / 4; ++i) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(at) + i);
      values[4 * i] = four.x;
      values[4 * i + 1] = four.y;
      values[4 * i + 2] = four.z;
      values[4 * i + 3] = four.w;
    }
    return;
  }
  const int count = at ? columns_in_chunk(m, col) : 0;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) values[i] = i < count ? at[i] : otherwise;
}

// What a score's column factor is without its addend.
__device__ inline void load_column_scale(const Matrix& m, int64_t col, float (&scale)[kChunk]) {
  load_terms(m, m.column_scale ? m.column_scale + col : nullptr, col, m.addend ? 0.0f : 1.0f,
             scale);
}

template <class T>
__device__ inline void scores_of(const Matrix& m, int64_t row, int64_t col,
                                 const uint32_t (&raw)[kRaw<T>], const float (&scale)[kChunk],
                                 float (&score)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) score[i] = weight_of(raw, i, T());
  if (m.addend) {
    float extra[kChunk];
    load_terms(m, m.addend + row * m.addend_stride + col, col, 0.0f, extra);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) score[i] = __fmul_rn(score[i], __fadd_rn(scale[i], extra[i]));
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) score[i] = __fmul_rn(score[i], scale[i]);
  }
  if (m.row_scale) {
    const float by_row = __ldg(m.row_scale + row);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) score[i] = __fmul_rn(score[i], by_row);
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) score[i] = fabsf(score[i]);
}

// One byte a column, 1 = may be kept. Only where the matrix has `preserve`.
__device__ inline uint2 load_allowed(const Matrix& m, int64_t row, int64_t col) {
  const uint8_t* at = m.preserve + row * m.preserve_stride + col;
  if (m.vector) return __ldcs(reinterpret_cast<const uint2*>(at));
  uint32_t words[2] = {0, 0};
  const int count = columns_in_chunk(m, col);
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i < count) words[i / 4] |= static_cast<uint32_t>(at[i]) << (8 * (i % 4));
  return make_uint2(words[0], words[1]);
}

__device__ inline bool is_allowed(uint2 allowed, int i) {
  return (i < 4 ? allowed.x : allowed.y) >> (8 * (i % 4)) & 1;
}

// Order-preserving keys: the score's bits, one key for all NaNs. Where the matrix has `preserve`,
// 0 is for what must stay pruned and the others are one higher. kPadding past the last column.
// kNaN lies above infinity and below the quiet NaNs, which are all that a product can be, and ends
// in ten zeros as the keys of 16-bit weights do.
constexpr uint32_t kInfinity = 0x7f800000u, kNaN = 0x7f800400u, kPadding = 0x7fffffffu;

__device__ inline void keys_of(const Matrix& m, int64_t row, int64_t col,
                               const float (&score)[kChunk], uint32_t (&key)[kChunk]) {
#pragma unroll
  for (int i = 0; i < kChunk; ++i) key[i] = min(__float_as_uint(score[i]), kNaN);
  if (m.preserve) {
    const uint2 allowed = load_allowed(m, row, col);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) key[i] = is_allowed(allowed, i) ? key[i] + 1 : 0;
  }
  if (!m.vector) {
    const int count = columns_in_chunk(m, col);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i >= count) key[i] = kPadding;
  }
}

// Four bytes, 1 where the number's sign bit is clear.
__device__ inline uint32_t positive_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  // A selector's top bit copies the byte's sign over the whole byte.
  const uint32_t low = permute_bytes(a, b, 0x00fb), high = permute_bytes(c, d, 0x00fb);
  return ~permute_bytes(low, high, 0x5410) & 0x01010101u;
}

// The mask bytes of a chunk: keys above `cut`, which is signed so that -1 keeps them all.
__device__ inline uint2 keys_above(const uint32_t (&key)[kChunk], int32_t cut) {
  uint32_t d[kChunk];  // keys have 31 bits: the difference's sign says which is higher
#pragma unroll
  for (int i = 0; i < kChunk; ++i) d[i] = key[i] - static_cast<uint32_t>(cut) - 1;
  return make_uint2(positive_bytes(d[0], d[1], d[2], d[3]), positive_bytes(d[4], d[5], d[6], d[7]));
}

__device__ inline void store_mask(const Matrix& m, int64_t row, int64_t col, uint2 bytes) {
  uint8_t* at = m.mask + row * m.cols + col;
  if (m.vector) {
    __stcs(reinterpret_cast<uint2*>(at), bytes);
    return;
  }
  const int count = columns_in_chunk(m, col);
#pragma unroll
  for (int i = 0; i < kChunk; ++i)
    if (i < count) at[i] = (i < 4 ? bytes.x : bytes.y) >> (8 * (i % 4)) & 1;
}

// `visit(T())` with T the type of w's elements; false if it is none that the kernels take.
template <class Visit>
bool with_type(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::f32:
      visit(float());
      return true;
    case DType::bf16:
      visit(__nv_bfloat16());
      return true;
    case DType::f16:
      visit(__half());
      return true;
    default:
      return false;
  }
}

}  // namespace score_chunks
}  // namespace pyprune
