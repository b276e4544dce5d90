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

// Of a block, and chunks of a thread: the general kernel's terms need more registers than 1024
// threads leave each other.
template <bool kSimple>
constexpr int kMostThreads = kSimple ? 1024 : 512;
template <bool kSimple>
constexpr int kMostChunks = kMaskTopkColumns / kChunk / kMostThreads<kSimple>;
constexpr int kFewestThreads = 64;
static_assert(kMaskTopkColumns / kChunk <= kMostBins, "a bin for each chunk");

// digits: 3, or 2 where the keys' last ten bits are zero. bins: of the larger of the first digit's
// and the chunks' numbers, a multiple of 32.
template <class T, int kChunks, bool kSimple>
__global__ void __launch_bounds__(kMostThreads<kSimple>, 1)
    mask_topk_kernel(Matrix given, uint32_t pruned, int digits, int bins) {
  const Matrix m = known<kSimple>(given);
  extern __shared__ uint32_t counts[];  // twice `bins`
  __shared__ LineCounts lines;
  const int64_t row = blockIdx.x;
  const int chunks = static_cast<int>(m.chunks_per_row());
  // All weights of a thread are on their way before the first is used, if there are registers.
  constexpr int kAhead = kSimple ? kChunks : 1;
  uint32_t raw[kAhead][kRaw<T>];
#pragma unroll
  for (int c = 0; c < kAhead; ++c) {
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
      if (c >= kAhead) load_weights<T>(m, row, col, raw[c % kAhead]);
      float scale[kChunk], score[kChunk];
      load_column_scale(m, col, scale);
      scores_of<T, kSimple>(m, row, col, raw[c % kAhead], scale, score);
      keys_of(m, row, col, score, key[c]);
    }
  }
  __syncthreads();
  // Padding counts as the highest keys: no cut ever reaches them.
  const Counters count(counts);
  int now = 0, next = bins;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) count.add(key[c][i] >> digit_of(0).shift);
  __syncthreads();
  Place place = find_place(counts + now, counts + next, kHighestBins, pruned, lines);
  uint32_t prefix = place.digit;
#pragma unroll
  for (int step = 1; step < kDigits; ++step) {
    if (step >= digits) break;
    now = bins - now;
    next = bins - next;
    const Digit digit = digit_of(step);
    const int above = digit.shift + digit.bits;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        count.add(key[c][i] - (prefix << above), 1u << above, digit.shift, now);
    __syncthreads();
    place = find_place(counts + now, counts + next, 1 << digit.bits, place.rank, lines);
    prefix = prefix << digit.bits | place.digit;
  }
  const uint32_t cut = digits == kDigits ? prefix : prefix << digit_of(kDigits - 1).bits;
  // Keys equal to the cut go up to the `place.rank`-th: in the chunks before `last` all of them, in
  // `last` as many as are left.
  int last = bins;
  uint32_t left = 0;
  if (place.rank < place.count) {
    uint32_t* equals = counts + next;
    for (int i = chunks + threadIdx.x; i < (chunks + kLanes - 1) / kLanes * kLanes; i += blockDim.x)
      equals[i] = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = c * blockDim.x + threadIdx.x;
      uint32_t equal = 0;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) equal += key[c][i] == cut;
      if (chunk < chunks) equals[chunk] = equal;
    }
    __syncthreads();
    place = find_place(equals, counts + now, (chunks + kLanes - 1) / kLanes * kLanes, place.rank,
                       lines);
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

template <class T, bool kSimple>
cudaError_t launch(const Matrix& m, uint32_t pruned, cudaStream_t stream) {
  const int chunks = static_cast<int>(m.chunks_per_row());
  const int wanted = (chunks + kMostChunks<kSimple> - 1) / kMostChunks<kSimple>;
  const int threads = max(kFewestThreads, (wanted + kLanes - 1) / kLanes * kLanes);
  const int per_thread = (chunks + threads - 1) / threads;
  const int bins = max(kHighestBins, (chunks + kLanes - 1) / kLanes * kLanes);
  const size_t shared = 2 * sizeof(uint32_t) * bins;
  // 16-bit numbers leave the last digit of their magnitude's fp32 bits empty.
  const bool short_keys =
      sizeof(T) == 2 && !m.column_scale && !m.row_scale && !m.addend && !m.preserve;
  const int digits = short_keys ? kDigits - 1 : kDigits;
  const dim3 grid(static_cast<unsigned>(m.rows)), block(threads);
  const auto kernel = per_thread == 1   ? mask_topk_kernel<T, 1, kSimple>
                      : per_thread == 2 ? mask_topk_kernel<T, 2, kSimple>
                                        : mask_topk_kernel<T, kMostChunks<kSimple>, kSimple>;
  kernel<<<grid, block, shared, stream>>>(m, pruned, digits, bins);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_mask_topk(const TensorView& mask, const TensorView& w, int64_t pruned,
                             const ScoreTerms& terms, cudaStream_t stream) {
  const Matrix m = matrix_of(mask, w, terms);
  cudaError_t status = cudaErrorInvalidValue;
  with_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    const auto count = static_cast<uint32_t>(pruned);
    status = is_simple(m) ? launch<T, true>(m, count, stream) : launch<T, false>(m, count, stream);
  });
  return status;
}

}  // namespace pyprune
