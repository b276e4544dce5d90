// N:M masks. A thread owns eight or sixteen columns: it keeps their scales in registers and walks
// down the rows, several of them in flight, so that nothing but weights and mask bytes moves.
//
// The n-th highest score of a group comes from a sorting network of minima and maxima; what is not
// below it is kept. Comparing with it is a subtraction and its sign bit: subtractions leave the
// pipe that compares and selects, which is the busy one, to the network.
#include <algorithm>

#include "cuda/mask_nm.h"
#include "cuda/score_chunks.h"

namespace pyprune {
namespace {

using namespace score_chunks;

constexpr int kThreads = 256;
// Bytes of weights that a thread has in flight.
constexpr int kBytesInFlight = 64;
template <int M>
constexpr int kColumns = M > kChunk ? M : kChunk;  // of a thread
template <class T, int M>
constexpr int kRowsInFlight = kBytesInFlight / (kColumns<M> * static_cast<int>(sizeof(T)));
// A forbidden column's score, below all others.
constexpr float kForbidden = -1.0f;
// Blocks that a multiprocessor is to hold at once.
template <int M, bool kSimple>
constexpr int kHeld = (kSimple ? 4 : 3) - (M > kChunk ? 1 : 0);
// How often one after another: rarely, for a thread loads its columns' scales once, and no more
// than so many times what is held, for a last few would leave the others idle.
constexpr int kWaves = 2;

__device__ inline void order(float& low, float& high) {
  const float smaller = fminf(low, high);
  high = fmaxf(low, high);
  low = smaller;
}

// Batcher's odd-even merge sort of kCount numbers (Knuth, The Art of Computer Programming 3, 5.2.2,
// algorithm M), ascending.
template <int kCount>
__device__ inline void sort(float (&v)[kCount]) {
#pragma unroll
  for (int p = 1; p < kCount; p *= 2)
#pragma unroll
    for (int k = p; k >= 1; k /= 2)
#pragma unroll
      for (int i = 0; i + k < kCount; ++i)
        if (i % (2 * k) >= k % p && (i - k % p) % (2 * k) < k && i / (2 * p) == (i + k) / (2 * p))
          order(v[i], v[i + k]);
}

// The n-th highest of M numbers. kHalf: n is M / 2, for which two sorted halves need no merging:
// the upper half of all is the elementwise maximum of one and the other reversed.
template <int M, bool kHalf>
__device__ inline float nth_highest(const float (&score)[M], int n) {
  if constexpr (kHalf) {
    float a[M / 2], b[M / 2];
#pragma unroll
    for (int i = 0; i < M / 2; ++i) {
      a[i] = score[i];
      b[i] = score[M / 2 + i];
    }
    sort(a);
    sort(b);
    float cut = fmaxf(a[0], b[M / 2 - 1]);
#pragma unroll
    for (int i = 1; i < M / 2; ++i) cut = fminf(cut, fmaxf(a[i], b[M / 2 - 1 - i]));
    return cut;
  } else {
    float sorted[M];
#pragma unroll
    for (int i = 0; i < M; ++i) sorted[i] = score[i];
    sort(sorted);
    float cut = sorted[0];
#pragma unroll
    for (int i = 1; i < M; ++i) cut = i == M - n ? sorted[i] : cut;
    return cut;
  }
}

// A finite number of the same order for each score, for groups that hold infinities or NaN: bit
// patterns moved down by two, so that all NaNs become the highest finite number.
__device__ inline float finite_score(float score) {
  if (score < 0) return score;
  const int32_t key = static_cast<int32_t>(min(__float_as_uint(score), kInfinity + 1)) - 2;
  return key >= 0 ? __uint_as_float(key) : -__uint_as_float(-key);
}

// Keeps the n highest of every M scores, of equal ones the later. One byte a column. What few
// groups need is asked once for all of them: finite scores, which differences can be taken of.
template <int M, bool kHalf, int kColumns>
__device__ inline void keep_highest(float (&score)[kColumns], int n,
                                    uint32_t (&bytes)[kColumns / 4]) {
  constexpr int kGroups = kColumns / M;
  float sum = fabsf(score[0]);
#pragma unroll
  for (int i = 1; i < kColumns; ++i) sum += fabsf(score[i]);
  if (!(sum <= 3e38f)) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) score[i] = finite_score(score[i]);
  }
  float cut[kGroups];
  int excess[kGroups], any = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    float group[M];
#pragma unroll
    for (int i = 0; i < M; ++i) group[i] = score[g * M + i];
    cut[g] = nth_highest<M, kHalf>(group, n);
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < M / 4; ++i) {
      uint32_t d[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) d[j] = __float_as_uint(__fsub_rn(group[4 * i + j], cut[g]));
      bytes[g * M / 4 + i] = positive_bytes(d[0], d[1], d[2], d[3]);
      count += bytes[g * M / 4 + i];
    }
    excess[g] = static_cast<int>(count * 0x01010101u >> 24) - n;
    any |= excess[g];
  }
  // Scores equal to the cut beyond the quota: the first of them go.
  if (any == 0) return;
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    const int g = 4 * i / M;
    uint32_t d[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) d[j] = __float_as_uint(__fsub_rn(cut[g], score[4 * i + j]));
    uint32_t equal = bytes[i] & positive_bytes(d[0], d[1], d[2], d[3]);
    for (; excess[g] > 0 && equal; --excess[g], equal &= equal - 1)
      bytes[i] ^= equal & (0u - equal);
  }
}

template <class T, int M, bool kHalf, bool kSimple>
__global__ void __launch_bounds__(kThreads, kHeld<M, kSimple>) mask_nm_kernel(Matrix given, int n) {
  const Matrix m = known<kSimple>(given);
  constexpr int kChunks = kColumns<M> / kChunk, kRows = kRowsInFlight<T, M>;
  const int64_t col = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kColumns<M>;
  if (col >= m.cols) return;
  float scale[kChunks][kChunk];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) load_column_scale(m, col + c * kChunk, scale[c]);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  const T* from = static_cast<const T*>(m.w) + row * m.w_stride + col;
  uint8_t* to = m.mask + row * m.cols + col;
  const int64_t from_step = step * m.w_stride, to_step = step * m.cols;
  while (row < m.rows) {
    uint32_t raw[kRows][kChunks][kRaw<T>];
#pragma unroll
    for (int r = 0; r < kRows; ++r, from += from_step)
      if (row + r * step < m.rows)
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
          load_weights<T>(m, from + c * kChunk, col + c * kChunk, raw[r][c]);
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += step, to += to_step) {
      if (row >= m.rows) break;
      float score[kChunks * kChunk];
      uint2 allowed[kChunks];
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float part[kChunk];
        scores_of<T, kSimple>(m, row, col + c * kChunk, raw[r][c], scale[c], part);
        if (m.preserve) {
          allowed[c] = load_allowed(m, row, col + c * kChunk);
#pragma unroll
          for (int i = 0; i < kChunk; ++i)
            part[i] = is_allowed(allowed[c], i) ? part[i] : kForbidden;
        }
#pragma unroll
        for (int i = 0; i < kChunk; ++i) score[c * kChunk + i] = part[i];
      }
      uint32_t bytes[kChunks * kChunk / 4];
      keep_highest<M, kHalf>(score, n, bytes);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        uint2 kept = make_uint2(bytes[2 * c], bytes[2 * c + 1]);
        if (m.preserve) kept = make_uint2(kept.x & allowed[c].x, kept.y & allowed[c].y);
        store_mask(m, to + c * kChunk, col + c * kChunk, kept);
      }
    }
  }
}

template <class T, int M, bool kHalf, bool kSimple>
cudaError_t launch(const Matrix& m, int n, int processors, cudaStream_t stream) {
  const int64_t across = (m.cols + kColumns<M> - 1) / kColumns<M>;
  const int64_t blocks_x = (across + kThreads - 1) / kThreads;
  // Narrow matrices share a block among rows; wide ones cut a row into parts of one length.
  const int64_t x = (across + blocks_x - 1) / blocks_x, y = kThreads / x;
  // As many turns of kRowsInFlight for every thread, none of them with fewer rows.
  const int64_t wanted = std::max<int64_t>(processors * kHeld<M, kSimple> * kWaves / blocks_x, 1);
  const int64_t rows = y * kRowsInFlight<T, M>, turns = (m.rows + rows - 1) / rows;
  const int64_t each = (turns + wanted - 1) / wanted;
  const int64_t blocks_y = std::min<int64_t>((turns + each - 1) / each, 65535);
  const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y));
  const dim3 grid(static_cast<unsigned>(blocks_x), static_cast<unsigned>(blocks_y));
  mask_nm_kernel<T, M, kHalf, kSimple><<<grid, block, 0, stream>>>(m, n);
  return cudaGetLastError();
}

template <class T, int M, bool kHalf>
cudaError_t launch(const Matrix& m, int n, cudaStream_t stream) {
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return is_simple(m) ? launch<T, M, kHalf, true>(m, n, processors, stream)
                      : launch<T, M, kHalf, false>(m, n, processors, stream);
}

}  // namespace

cudaError_t launch_mask_nm(const TensorView& mask, const TensorView& w, int64_t n, int64_t m,
                           const ScoreTerms& terms, cudaStream_t stream) {
  Matrix matrix = matrix_of(mask, w, terms);
  if (is_one_run(matrix, w)) {
    // Rows of any length will do: one that threads divide well, and vectors where 8 divides it.
    const int64_t numel = matrix.rows * matrix.cols;
    int64_t cols = int64_t{kThreads} * kChunk;
    while (numel % cols) cols /= 2;
    matrix.rows = numel / cols;
    matrix.cols = matrix.w_stride = cols;
    matrix.vector = cols % kChunk == 0 && aligned(matrix.w, 0, 16) && aligned(matrix.mask, 0, 8);
  }
  cudaError_t status = cudaErrorInvalidValue;
  with_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    const int count = static_cast<int>(n);
    if (m == 4 && n == 2) status = launch<T, 4, true>(matrix, count, stream);
    if (m == 4 && n != 2) status = launch<T, 4, false>(matrix, count, stream);
    if (m == 8 && n == 4) status = launch<T, 8, true>(matrix, count, stream);
    if (m == 8 && n != 4) status = launch<T, 8, false>(matrix, count, stream);
    if (m == 16 && n == 8) status = launch<T, 16, true>(matrix, count, stream);
  });
  return status;
}

}  // namespace pyprune
