// Bitmap packing and unpacking. A block owns a row. It first turns the row's bitmap into the number
// of values before each word; after that its warps are on their own, each with 512 columns at a
// time. Values pass through shared memory, so that global memory sees whole aligned vectors on both
// sides whatever a row's first value is.
#include <cstdint>

#include "cuda/pack_bitmap.h"
#include "cuda/radix_bins.h"

namespace pyprune {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kChunk = 8;  // columns that a lane takes: a byte of bitmap
constexpr int kVector = 16;

// A piece of a row is what its prefix counts have room for.
constexpr int kWordsPerThread = 4;
constexpr int kPieceWords = kThreads * kWordsPerThread;
constexpr int kSteps = 2;  // a warp's 256 columns
constexpr int kSegmentWords = kSteps * kLanes * kChunk / 32;
constexpr int kSegmentColumns = 32 * kSegmentWords;

template <class Bits>
struct Elements {
  static constexpr int kWords = kChunk * sizeof(Bits) / 4;
  uint32_t words[kWords];

  __device__ Bits get(int i) const {
    if constexpr (sizeof(Bits) == 4) return words[i];
    return static_cast<Bits>(words[i / 2] >> (16 * (i % 2)));
  }
  // Into an element that is zero.
  __device__ void put(int i, Bits value) {
    if constexpr (sizeof(Bits) == 4)
      words[i] = value;
    else
      words[i / 2] |= static_cast<uint32_t>(value) << (16 * (i % 2));
  }
  __device__ void load(const Bits* at, int count, bool vector) {
    if (vector) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 four = __ldcg(reinterpret_cast<const uint4*>(at) + i);
        words[4 * i] = four.x;
        words[4 * i + 1] = four.y;
        words[4 * i + 2] = four.z;
        words[4 * i + 3] = four.w;
      }
      return;
    }
    clear();
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < count) put(i, at[i]);
  }
  __device__ void store(Bits* at, int count, bool vector) const {
    if (vector) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i)
        __stcs(reinterpret_cast<uint4*>(at) + i,
               make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]));
      return;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < count) at[i] = get(i);
  }
  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
  }
};

__device__ inline int count_at(int64_t cols, int64_t col) {
  return cols - col < kChunk ? (col < cols ? static_cast<int>(cols - col) : 0) : kChunk;
}

// Sum of what the block's threads have, in all of them. `shared` is free again after a barrier.
__device__ inline uint32_t block_sum(uint32_t value, uint32_t (&shared)[kWarps]) {
  value = __reduce_add_sync(kAllLanes, value);
  if (threadIdx.x % kLanes == 0) shared[threadIdx.x / kLanes] = value;
  __syncthreads();
  uint32_t sum = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) sum += shared[i];
  return sum;
}

struct Rows {
  uint8_t* bitmap;
  int64_t* row_offsets;
  const void* w;
  const uint8_t* mask;
  unsigned long long* done;
  int64_t rows, cols, w_stride;
  bool vector;  // of w, or of the mask where there is one
};

// row_offsets holds the rows' counts, one place up: makes them offsets. The block that comes last.
__device__ inline void sum_up_counts(int64_t* row_offsets, int64_t rows,
                                     unsigned long long (&warps)[kWarps]) {
  constexpr int kRows = 4;  // a thread
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  unsigned long long before = 0;
  for (int64_t start = 0; start < rows; start += kThreads * kRows) {
    unsigned long long count[kRows], own = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = start + threadIdx.x * kRows + i;
      count[i] = row < rows ? __ldcg(row_offsets + row + 1) : 0;
      own += count[i];
    }
    const unsigned long long upto = sum_up_to_lane(own, lane);
    if (lane == kLanes - 1) warps[warp] = upto;
    __syncthreads();
    unsigned long long at = before + upto - own;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) at += warps[i];
      before += warps[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = start + threadIdx.x * kRows + i;
      at += count[i];
      if (row < rows) row_offsets[row + 1] = static_cast<int64_t>(at);
    }
  }
  if (threadIdx.x == 0) row_offsets[0] = 0;
}

template <class Bits, bool kMask>
__global__ void __launch_bounds__(kThreads) bitmap_rows_kernel(Rows p) {
  __shared__ uint32_t sums[kWarps];
  __shared__ unsigned long long wide_sums[kWarps];
  __shared__ bool last;
  constexpr int kUnroll = 4;
  const int64_t row = blockIdx.x, bytes = (p.cols + kChunk - 1) / kChunk;
  const Bits* w = static_cast<const Bits*>(p.w) + row * p.w_stride;
  const uint8_t* mask = p.mask + row * p.cols;
  uint32_t kept = 0;
  for (int64_t first = threadIdx.x; first < bytes; first += kUnroll * kThreads) {
    Elements<Bits> x[kUnroll];
    uint2 m[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t byte = first + u * kThreads, col = byte * kChunk;
      if (byte >= bytes) break;
      const int count = count_at(p.cols, col);
      if constexpr (!kMask) {
        x[u].load(w + col, count, p.vector);
      } else if (p.vector) {
        m[u] = __ldcs(reinterpret_cast<const uint2*>(mask + col));
      } else {
        uint32_t words[2] = {0, 0};
        for (int i = 0; i < count; ++i)
          words[i / 4] |= static_cast<uint32_t>(mask[col + i] != 0) << (8 * (i % 4));
        m[u] = make_uint2(words[0], words[1]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t byte = first + u * kThreads;
      if (byte >= bytes) break;
      uint32_t bits = 0;
      if constexpr (kMask) {
        // Bytes of 0 and 1: the product moves them side by side.
        bits = m[u].x * 0x01020408u >> 24 | m[u].y * 0x01020408u >> 24 << 4;
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i)
          if (x[u].get(i) != 0) bits |= 1u << i;
      }
      p.bitmap[row * bytes + byte] = static_cast<uint8_t>(bits);
      kept += __popc(bits & 255);
    }
  }
  const uint32_t count = block_sum(kept, sums);
  if (threadIdx.x == 0) {
    p.row_offsets[row + 1] = count;
    __threadfence();  // the count is there before the row is said to be done
    last = atomicAdd(p.done, 1ull) + 1 == static_cast<unsigned long long>(p.rows);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  sum_up_counts(p.row_offsets, p.rows, wide_sums);
}

struct Values {
  void *w, *values;
  const uint8_t* bitmap;
  const int64_t* row_offsets;
  int64_t rows, cols, w_stride, count;
  bool vector;        // of w
  bool bitmap_words;  // rows of the bitmap are whole aligned words
};

__device__ inline uint32_t bitmap_word(const Values& p, const uint8_t* row, int64_t bytes,
                                       int64_t word) {
  if (p.bitmap_words) return __ldg(reinterpret_cast<const uint32_t*>(row) + word);
  uint32_t bits = 0;
  for (int i = 0; i < 4; ++i)
    if (4 * word + i < bytes) bits |= static_cast<uint32_t>(row[4 * word + i]) << (8 * i);
  return bits;
}

template <class Bits>
struct Shared {
  static constexpr int kPerVector = kVector / sizeof(Bits);
  uint32_t word[kPieceWords], before[kPieceWords + 1];
  uint32_t warps[kWarps];
  // A warp's values, as far into a vector as they are in global memory.
  alignas(16) Bits stage[kWarps][kSegmentColumns + kPerVector];
};

// The warp's values, `count` from `first` >= 0, between global memory and its stage. kOut: to
// global. Nothing is read past `total`, whatever `first` and `count` say: the stage then keeps what
// it held.
template <class Bits, bool kOut>
__device__ inline void move_values(Bits* values, Bits* stage, int64_t first, int count,
                                   int64_t total) {
  constexpr int kPerVector = kVector / sizeof(Bits);
  const int lane = threadIdx.x % kLanes;
  const int skip = static_cast<int>(first % kPerVector);
  int end = skip + count;
  if constexpr (!kOut)
    end = static_cast<int>(min(int64_t{end}, max(total - first + skip, int64_t{0})));
  Bits* at = values + (first - skip);
  for (int i = lane * kPerVector; i < end; i += kLanes * kPerVector) {
    // Reading may take what lies around the warp's values, writing may not.
    const bool whole =
        kOut ? i >= skip && i + kPerVector <= end : first - skip + i + kPerVector <= total;
    if (whole) {
      const uint4* from = reinterpret_cast<const uint4*>(kOut ? stage + i : at + i);
      uint4* to = reinterpret_cast<uint4*>(kOut ? at + i : stage + i);
      if constexpr (kOut)
        __stcs(to, *from);
      else
        *to = __ldcs(from);
    } else {
      for (int k = max(i, skip); k < min(i + kPerVector, end); ++k) {
        if constexpr (kOut)
          at[k] = stage[k];
        else
          stage[k] = at[k];
      }
    }
  }
}

template <class Bits, bool kPack>
__global__ void __launch_bounds__(kThreads) bitmap_values_kernel(Values p) {
  __shared__ Shared<Bits> shared;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  // Packing follows a pass that read the matrix from its first row to its last: what it read last
  // may still be in the L2.
  const int64_t row = kPack ? p.rows - 1 - blockIdx.x : blockIdx.x;
  const int64_t bytes = (p.cols + kChunk - 1) / kChunk, words = (bytes + 3) / 4;
  const uint8_t* bitmap = p.bitmap + row * bytes;
  Bits* w = static_cast<Bits*>(p.w) + row * p.w_stride;
  Bits* stage = shared.stage[warp];
  int64_t begin = __ldg(p.row_offsets + row);
  if constexpr (!kPack) begin = min(max(begin, int64_t{0}), p.count);
  for (int64_t piece = 0; piece < words; piece += kPieceWords) {
    const int here = static_cast<int>(words - piece < kPieceWords ? words - piece : kPieceWords);
    const int per_thread = (here + kThreads - 1) / kThreads;
    uint32_t own = 0;
    for (int i = 0; i < per_thread; ++i) {
      const int word = threadIdx.x * per_thread + i;
      const uint32_t bits = word < here ? bitmap_word(p, bitmap, bytes, piece + word) : 0;
      if (word < here) shared.word[word] = bits;
      own += __popc(bits);
    }
    const uint32_t upto = sum_up_to_lane(own, lane);
    if (lane == kLanes - 1) shared.warps[warp] = upto;
    __syncthreads();
    uint32_t before = upto - own, total = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      if (i < warp) before += shared.warps[i];
      total += shared.warps[i];
    }
    for (int i = 0; i < per_thread; ++i) {
      const int word = threadIdx.x * per_thread + i;
      if (word >= here) break;
      shared.before[word] = before;
      before += __popc(shared.word[word]);
    }
    if (threadIdx.x == 0) shared.before[here] = total;
    __syncthreads();
    for (int start = warp * kSegmentWords; start < here; start += kWarps * kSegmentWords) {
      const int end = min(start + kSegmentWords, here);
      const uint32_t first = shared.before[start];
      const int count = static_cast<int>(shared.before[end] - first);
      const int64_t at = begin + first;
      const int skip = static_cast<int>(at % Shared<Bits>::kPerVector);
      Elements<Bits> x[kSteps];
      if constexpr (kPack) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const int64_t col = (piece + start) * 32 + (s * kLanes + lane) * kChunk;
          const int columns = count_at(p.cols, col);
          if (columns > 0) x[s].load(w + col, columns, p.vector);
        }
      } else {
        move_values<Bits, false>(static_cast<Bits*>(p.values), stage, at, count, p.count);
        __syncwarp();
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int word = start + s * (kLanes * kChunk / 32) + lane / 4, shift = lane % 4 * 8;
        const int64_t col = (piece + start) * 32 + (s * kLanes + lane) * kChunk;
        const int columns = count_at(p.cols, col);
        if (columns <= 0) break;
        const uint32_t all = shared.word[word], bits = all >> shift;
        int place = skip + static_cast<int>(shared.before[word] - first) +
                    __popc(all & ((1u << shift) - 1));
        if constexpr (!kPack) x[s].clear();
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          if (!(bits >> i & 1)) continue;
          if constexpr (kPack)
            stage[place] = x[s].get(i);
          else
            x[s].put(i, stage[place]);
          ++place;
        }
        if constexpr (!kPack) x[s].store(w + col, columns, p.vector);
      }
      __syncwarp();
      if constexpr (kPack) {
        move_values<Bits, true>(static_cast<Bits*>(p.values), stage, at, count, p.count);
        __syncwarp();
      }
    }
    begin += total;
    __syncthreads();  // the counts of this piece are read
  }
}

int64_t element_bytes(const TensorView& t) { return t.dtype == DType::f32 ? 4 : 2; }

bool starts_at(const void* p, int64_t stride_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0 && stride_bytes % bytes == 0;
}

bool whole_vectors(const TensorView& w) {
  const int64_t stride = w.shape[0] > 1 ? w.stride[0] * element_bytes(w) : 0;
  return w.shape[1] % kChunk == 0 && starts_at(w.data, stride, kVector);
}

}  // namespace

cudaError_t launch_bitmap_rows(const BitmapRowsCuda& args, cudaStream_t stream) {
  Rows p{args.bitmap.ptr<uint8_t>(),
         args.row_offsets.ptr<int64_t>(),
         args.w.data,
         args.mask.ptr<uint8_t>(),
         args.state.ptr<unsigned long long>(),
         args.w.shape[0],
         args.w.shape[1],
         args.w.stride[0],
         false};
  p.vector = p.mask ? p.cols % kChunk == 0 && starts_at(p.mask, 0, kChunk) : whole_vectors(args.w);
  const unsigned blocks = static_cast<unsigned>(p.rows);
  if (p.mask)
    bitmap_rows_kernel<uint16_t, true><<<blocks, kThreads, 0, stream>>>(p);
  else if (args.w.dtype == DType::f32)
    bitmap_rows_kernel<uint32_t, false><<<blocks, kThreads, 0, stream>>>(p);
  else
    bitmap_rows_kernel<uint16_t, false><<<blocks, kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_bitmap_values(const BitmapValuesCuda& args, cudaStream_t stream) {
  const int64_t bytes = (args.w.shape[1] + kChunk - 1) / kChunk;
  const Values p{args.w.data,
                 args.values.data,
                 args.bitmap.ptr<uint8_t>(),
                 args.row_offsets.ptr<int64_t>(),
                 args.w.shape[0],
                 args.w.shape[1],
                 args.w.stride[0],
                 args.values.shape[0],
                 whole_vectors(args.w),
                 starts_at(args.bitmap.data, bytes, 4)};
  const unsigned blocks = static_cast<unsigned>(p.rows);
  if (args.w.dtype == DType::f32) {
    if (args.pack)
      bitmap_values_kernel<uint32_t, true><<<blocks, kThreads, 0, stream>>>(p);
    else
      bitmap_values_kernel<uint32_t, false><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    if (args.pack)
      bitmap_values_kernel<uint16_t, true><<<blocks, kThreads, 0, stream>>>(p);
    else
      bitmap_values_kernel<uint16_t, false><<<blocks, kThreads, 0, stream>>>(p);
  }
  return cudaGetLastError();
}

}  // namespace pyprune
