// Exact per-row masks. A block owns a row: its keys stay in registers, read once. The cut, the
// pruned-th smallest key, is found digit by digit: keys that share the digits found so far are
// counted by their next one in shared memory. Where only some of the keys equal to the cut go,
// their column is one more digit: chunks of eight columns are counted, and one thread sorts out the
// last.
#include "cuda/mask_topk.h"
#include "cuda/radix_bins.h"
#include "cuda/score_chunks.h"

namespace pyprune {
namespace {

using namespace score_chunks;

constexpr int kMostThreads = 1024;
constexpr int kFewestThreads = 64;
constexpr int kMostChunks = 4;  // of a thread
static_assert(kMostThreads * kMostChunks * kChunk == kMaskTopkColumns, "a block takes a row");
static_assert(kMaskTopkColumns / kChunk <= kMostBins, "a bin for each chunk");

// digits: 3, or 2 where the keys' last ten bits are zero. bins: of the larger of the first digit's
// and the chunks' numbers, a multiple of 32.
template <class T, int kChunks>
__global__ void __launch_bounds__(kMostThreads)
    mask_topk_kernel(Matrix m, uint32_t pruned, int digits, int bins) {
  extern __shared__ uint32_t counts[];  // twice `bins`
  __shared__ LineCounts lines;
  const int64_t row = blockIdx.x;
  const int chunks = static_cast<int>(m.chunks_per_row());
  uint32_t raw[kChunks][kRaw<T>];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = c * blockDim.x + threadIdx.x;
    if (chunk < chunks) load_weights<T>(m, row, static_cast<int64_t>(chunk) * kChunk, raw[c]);
  }
  for (int i = threadIdx.x; i < kHighestBins; i += blockDim.x) counts[i] = 0;
  uint32_t key[kChunks][kChunk];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = c * blockDim.x + threadIdx.x;
    const int64_t col = static_cast<int64_t>(chunk) * kChunk;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) key[c][i] = kPadding;
    if (chunk < chunks) {
      float scale[kChunk], score[kChunk];
      load_column_scale(m, col, scale);
      scores_of<T>(m, row, col, raw[c], scale, score);
      keys_of(m, row, col, score, key[c]);
    }
  }
  __syncthreads();
  // Padding counts as the highest keys: no cut ever reaches them.
  uint32_t* now = counts;
  uint32_t* next = counts + bins;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) atomicAdd(&now[key[c][i] >> digit_of(0).shift], 1u);
  __syncthreads();
  Place place = find_place(now, next, kHighestBins, pruned, lines);
  uint32_t prefix = place.digit;
#pragma unroll
  for (int step = 1; step < kDigits; ++step) {
    if (step >= digits) break;
    uint32_t* counted = next;
    next = now;
    now = counted;
    const Digit digit = digit_of(step);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (key[c][i] >> (digit.shift + digit.bits) == prefix)
          atomicAdd(&now[key[c][i] >> digit.shift & ((1u << digit.bits) - 1)], 1u);
    __syncthreads();
    place = find_place(now, next, 1 << digit.bits, place.rank, lines);
    prefix = prefix << digit.bits | place.digit;
  }
  const uint32_t cut = digits == kDigits ? prefix : prefix << digit_of(kDigits - 1).bits;
  // Keys equal to the cut go up to the `place.rank`-th: in the chunks before `last` all of them, in
  // `last` as many as are left.
  int last = bins;
  uint32_t left = 0;
  if (place.rank < place.count) {
    for (int i = chunks + threadIdx.x; i < (chunks + kLanes - 1) / kLanes * kLanes; i += blockDim.x)
      next[i] = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = c * blockDim.x + threadIdx.x;
      uint32_t equal = 0;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) equal += key[c][i] == cut;
      if (chunk < chunks) next[chunk] = equal;
    }
    __syncthreads();
    place = find_place(next, now, (chunks + kLanes - 1) / kLanes * kLanes, place.rank, lines);
    last = static_cast<int>(place.digit);
    left = place.rank;
  }
  const int32_t forbidden = m.preserve ? 0 : -1;  // the highest key that must go
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int chunk = c * blockDim.x + threadIdx.x;
    if (chunk >= chunks) break;
    const int32_t from = static_cast<int32_t>(cut) - (chunk > last);
    uint2 bytes = keys_above(key[c], max(from, forbidden));
    if (chunk == last && static_cast<int32_t>(cut) > forbidden) {
      uint32_t words[2] = {bytes.x, bytes.y}, seen = 0;
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (key[c][i] == cut && ++seen > left) words[i / 4] |= 1u << (8 * (i % 4));
      bytes = make_uint2(words[0], words[1]);
    }
    store_mask(m, row, static_cast<int64_t>(chunk) * kChunk, bytes);
  }
}

template <class T>
cudaError_t launch(const Matrix& m, uint32_t pruned, cudaStream_t stream) {
  const int chunks = static_cast<int>(m.chunks_per_row());
  const int wanted = (chunks + kMostChunks - 1) / kMostChunks;
  const int threads = max(kFewestThreads, (wanted + kLanes - 1) / kLanes * kLanes);
  const int per_thread = (chunks + threads - 1) / threads;
  const int bins = max(kHighestBins, (chunks + kLanes - 1) / kLanes * kLanes);
  const size_t shared = 2 * sizeof(uint32_t) * bins;
  // 16-bit numbers leave the last digit of their magnitude's fp32 bits empty.
  const bool short_keys =
      sizeof(T) == 2 && !m.column_scale && !m.row_scale && !m.addend && !m.preserve;
  const int digits = short_keys ? kDigits - 1 : kDigits;
  const dim3 grid(static_cast<unsigned>(m.rows)), block(threads);
  if (per_thread == 1)
    mask_topk_kernel<T, 1><<<grid, block, shared, stream>>>(m, pruned, digits, bins);
  else if (per_thread == 2)
    mask_topk_kernel<T, 2><<<grid, block, shared, stream>>>(m, pruned, digits, bins);
  else
    mask_topk_kernel<T, kMostChunks><<<grid, block, shared, stream>>>(m, pruned, digits, bins);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_mask_topk(const TensorView& mask, const TensorView& w, int64_t pruned,
                             const ScoreTerms& terms, cudaStream_t stream) {
  const Matrix m = matrix_of(mask, w, terms);
  cudaError_t status = cudaErrorInvalidValue;
  with_type(w.dtype, [&](auto type) {
    status = launch<decltype(type)>(m, static_cast<uint32_t>(pruned), stream);
  });
  return status;
}

}  // namespace pyprune
