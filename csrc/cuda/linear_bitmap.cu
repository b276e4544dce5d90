// y = x W^T for a bitmap compressed W [R, C] and up to 64 rows of x: a warp streams the values of a
// few rows of W through shared memory, expands them in registers and lets tensor cores multiply.
//
// The floor. W is read once: 2 nnz + R C / 8 + 8 R bytes, at 50 % 1.125 bytes an element against 2
// of a dense one. 8192 x 4096 at 50 % is 37.8 MB: 9 us at an H200's 4.3 TB/s, 12.6 us at an H100's
// 3.0 TB/s (both measured by copies), against 15.6 and 22.4 us for reading it dense. x and y do not
// count: x is read by every block, but out of the caches.
//
// Bytes in flight. By Little's law 4.3 TB/s over 132 multiprocessors at 0.8 us of loaded latency
// ask for 26 KB each. A warp copies one or two turns ahead of the one it expands, on average 2 KB
// of values each at 50 %; 24 warps make 48 KB, 16 warps and two turns 64 KB. The address of a value
// does not depend on values, only on bits: those are read one more turn ahead, straight into
// registers, where a scan over a row's lanes yields where the next turn's values begin.
//
// Instructions are the limit. To keep up at 50 % a multiprocessor at 1.98 GHz must expand 14.6
// elements a cycle. Shifts, permutations and logic go through units of 64 lanes a cycle: of them a
// step of a turn, 256 elements, takes about 33 for one row of x and 30 for 8, everything in the
// loop included, which alone is 15.5 and 17 elements a cycle. Shared memory serves 32 lanes a
// cycle: six loads of values a step, each 1.4 cycles for one row of x and 2.2 for 8 (conflicts
// counted by tests/ops/bitmap_lanes_emulation.cpp), and five shuffles. Hence as many warps as
// registers allow where x needs few of them.
//
// Measured on an H200 (CUDA graphs, W at 50 % out of memory, 4096 x 4096 to 28672 x 8192), in
// shares of the bandwidth of copies and as a multiple of cuBLAS's speed on the dense W: one row of
// x 39 to 61 % and 1.0 to 1.1, two rows 1.0, four 0.8 to 0.9, eight 0.6 to 0.8, 16 0.6 to 0.7, 32
// 0.4 to 0.6, 64 0.3 to 0.5. So what the format saves is memory. At 70 % of zeros the bytes are
// fewer but not the steps, and little more time is saved: 1.0 to 1.2 at one row. The likely reason,
// which was not profiled: 28672 x 8192 in 102 us are 8.8 elements a cycle and multiprocessor, 29
// cycles a step, in which shared memory is busy for 13 and the units for shifts and permutations
// for 17, and within a warp one waits for the other. From 17 rows on x comes on top, which each
// warp fetches from shared memory anew for every 16 rows of W. Fewer instructions a step would
// help, more bytes in flight would not.
//
// int8 values are not taken: at 5 bits an element their bytes arrive 1.8 times as fast, which the
// counts above do not allow, and widening them would come on top.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/bitmap_warp.h"
#include "cuda/block_sums.h"
#include "cuda/device.h"
#include "cuda/linear_bitmap.h"
#include "cuda/overlap.h"

namespace pyprune {
namespace {

using namespace bitmap_warp;

// The sums of all warps and segments, in a fixed order: the result does not depend on timing.
template <class X, class S>
__device__ inline void store_sums(const Problem& p, int64_t block_row, const float* sums) {
  using L = typename S::L;
  constexpr int kTile = kTileRows * kTileColumns;
  constexpr int kOfX = std::is_same_v<X, float> ? kParts : 1;
  const int block_rows = p.along_rows * S::kWarpRows;
  for (int i = threadIdx.x; i < block_rows * p.m; i += blockDim.x) {
    const int r = i % block_rows, m = i / block_rows;
    if (block_row + r >= p.rows) continue;
    const int along = r / S::kWarpRows, turn = r % S::kWarpRows / L::kRows, row = r % L::kRows;
    float total = p.bias ? p.bias[block_row + r] : 0.0f;
    for (int w = 0; w < p.along_columns; ++w)
#pragma unroll
      for (int part = 0; part < kOfX; ++part) {
        const int token = m * kOfX + part;
        const float* tile = sums + (((w * p.along_rows + along) * S::kTurns + turn) * S::kTiles +
                                    token / L::kTokens) *
                                       kTile;
#pragma unroll
        for (int s = 0; s < S::kSegments; ++s)
          total += tile[L::product_row(row, s) * kTileColumns +
                        L::product_column(token % L::kTokens, s)];
      }
    convert(total, static_cast<X*>(p.y) + static_cast<int64_t>(m) * p.rows + block_row + r);
  }
}

template <class T, class X, class S>
__global__ void __launch_bounds__(32 * kMaxWarps, S::kBlocks)
    linear_bitmap_kernel(const Problem p) {
  using L = typename S::L;
  extern __shared__ __align__(16) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int along_rows = warp % p.along_rows, along_columns = warp / p.along_rows;
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * p.along_rows * S::kWarpRows;
  wait_for_kernel_before();  // nothing global has been touched yet
  let_next_kernel_begin();
  const int turns = (p.words + L::kWords - 1) / L::kWords;
  const int begin = min(along_columns * p.slab_turns, turns);
  const int end = min(begin + p.slab_turns, turns);

  const uint32_t first_stage = warp * S::kStages * L::kTurnBytes;
  Warp<T, X, S> w{p,
                  lane,
                  L::place_of(lane),
                  begin,
                  (end - begin) * S::kTurns,
                  L::words_before(end, p.words),
                  static_cast<uint32_t>(__cvta_generic_to_shared(shared)),
                  first_stage,
                  first_stage,
                  {},
                  {},
                  selectors_of(lane)};
  int row[S::kTurns][2];  // this lane's, in the block
#pragma unroll
  for (int turn = 0; turn < S::kTurns; ++turn)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[turn][half] = along_rows * S::kWarpRows + turn * L::kRows + L::row_of(lane, half);
      // Rows past the matrix repeat its last one; their sums are not stored.
      const int r = static_cast<int>(min(block_row + row[turn][half], p.rows - int64_t{1}));
      w.row_words[turn][half] = static_cast<uint32_t>(r) * p.words + w.place;
      w.position[turn][half] = static_cast<uint32_t>(__ldg(p.row_offsets + r));
    }
  if (p.along_columns > 1) {
    int* counts = reinterpret_cast<int*>(shared);
    count_slabs<S>(p, block_row, counts);
    __syncthreads();
#pragma unroll
    for (int turn = 0; turn < S::kTurns; ++turn)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        for (int slab = 0; slab < along_columns; ++slab)
          w.position[turn][half] += counts[row[turn][half] * p.along_columns + slab];
    __syncthreads();  // the counts have been read: copies may overwrite them
  }

  float sum[S::kTurns][S::kTiles][4] = {};
  w.run(sum);
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int turn = 0; turn < S::kTurns; ++turn)
#pragma unroll
    for (int tile = 0; tile < S::kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[((warp * S::kTurns + turn) * S::kTiles + tile) * kTileRows * kTileColumns +
             product_row_of(lane, i) * kTileColumns + product_column_of(lane, i)] =
            sum[turn][tile][i];
  __syncthreads();
  store_sums<X, S>(p, block_row, sums);
}

// More rows of x than sixteen: what a block reads of x then outweighs what it reads of W. So its
// warps lie next to each other in rows, 128 of them, and share the turn's columns of x in shared
// memory. Where that leaves too few blocks, those of a cluster divide the columns.
template <int kTiles>
struct Wide {
  using S = Shape<kTiles * kTileColumns, 1, 1, 2, 2>;
  using L = typename S::L;
  static constexpr int kThreads = 32 * kMaxWarps;
  static constexpr int kRows = kMaxWarps * S::kWarpRows;
  static constexpr int kXRow = 2 * L::kColumns;  // bytes
  static constexpr int kPieces = kXRow / kChunkBytes;
  static constexpr int kXStage = kTiles * kTileColumns * kXRow;
  static constexpr int kX = kMaxWarps * S::kStages * L::kTurnBytes + L::kPadBytes;  // its address
  static constexpr int kStageBytes = kX + S::kStages * kXStage;
  using Sums = BlockSums<kRows, kTiles * kTileColumns, 1>;
  static constexpr int kBytes = kStageBytes > Sums::kBytes ? kStageBytes : Sums::kBytes;

  // Starts copying a turn's columns of x, zeros outside.
  template <class X>
  __device__ static __forceinline__ void copy_x(const Problem& p, uint32_t to, int turn) {
#pragma unroll
    for (int k = 0; k < kTiles * kTileColumns * kPieces; k += kThreads) {
      const int i = k + threadIdx.x, token = i / kPieces, piece = i % kPieces;
      const int column = turn * L::kColumns + piece * kChunkBytes / 2;
      const bool inside = token < p.m && column < p.cols;
      const X* from = static_cast<const X*>(p.x);
      if (inside) from += static_cast<int64_t>(token) * p.cols + column;
      copy_or_clear(to + token * kXRow + wide_x_piece(token, piece) * kChunkBytes, from, inside);
    }
  }
};

template <class T, int kTiles>
__global__ void __launch_bounds__(Wide<kTiles>::kThreads, Wide<kTiles>::S::kBlocks)
    linear_bitmap_wide_kernel(const Problem p) {
  using W = Wide<kTiles>;
  using S = typename W::S;
  using L = typename W::L;
  extern __shared__ __align__(16) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = L::place_of(lane);
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * W::kRows;
  wait_for_kernel_before();  // nothing global has been touched yet
  let_next_kernel_begin();
  const int turns = (p.words + L::kWords - 1) / L::kWords;
  const int begin = min(static_cast<int>(blockIdx.y) * p.slab_turns, turns);
  const int end = min(begin + p.slab_turns, turns);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t first_stage = warp * S::kStages * L::kTurnBytes;
  Warp<T, T, S> w{
      p,       lane,        place,       begin, end - begin, L::words_before(end, p.words),
      address, first_stage, first_stage, {},    {},          selectors_of(lane)};
  const int words_before = L::words_before(begin, p.words);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = block_row + warp * L::kRows + L::row_of(lane, half);
    // Rows past the matrix repeat its last one; their sums are not stored.
    const int r = static_cast<int>(min(row, p.rows - int64_t{1}));
    // The lanes of a row count what lies in front of the block's columns.
    const uint32_t* bits = p.bitmap + static_cast<int64_t>(r) * p.words;
    int before = count_words<L::kAcross>(bits, place, words_before, p.words % 4 == 0);
#pragma unroll
    for (int d = 1; d < L::kAcross; d *= 2) before += __shfl_xor_sync(~0u, before, d);
    w.row_words[0][half] = static_cast<uint32_t>(r) * p.words + place;
    w.position[0][half] = static_cast<uint32_t>(__ldg(p.row_offsets + r)) + before;
  }

  const uint32_t spread = load_spread();
  float sum[kTiles][4] = {};
  uint2 words = w.template load_words<0>(0);
  W::template copy_x<T>(p, address + W::kX, begin);
  Bits bits = w.template fetch<0>(words);
  words = w.template load_words<0>(1);
  // Of a row of x the lane's four columns of the first step.
  const uint32_t x_lane = address + W::kX + L::token_of(lane) * W::kXRow + place % 2 * 8;
  for (int item = 0; item < w.items; ++item) {
    wait_copies<0>();
    __syncthreads();  // all warps' copies are there, and the stage before this has been read
    const uint32_t x_stage = item % 2 * W::kXStage;
    W::template copy_x<T>(p, address + W::kX + (W::kXStage - x_stage), begin + item + 1);
    const Bits next = w.template fetch<0>(words);
    words = w.template load_words<0>(item + 2);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      w.expand_step(spread, bits, step, a);
      const uint32_t x =
          x_lane + x_stage +
          wide_x_piece(L::token_of(lane), 2 * step + place / 2) * static_cast<int>(kChunkBytes);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        uint32_t b[2];
        load_pair(x + tile * kTileColumns * W::kXRow, b);
        mma<T>(sum[tile], a, b);
      }
    }
    bits = next;
  }
  wait_copies<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[(tile * kTileColumns + product_column_of(lane, i)) * W::Sums::kPitch + warp * L::kRows +
           product_row_of(lane, i)] = sum[tile][i];
  __syncthreads();
  W::Sums::template store<T>(sums, static_cast<T*>(p.y), p.bias, block_row, p.rows, p.m);
}

template <class S>
int shared_bytes(int warps) {
  return warps * S::kStages * S::L::kTurnBytes + S::L::kPadBytes;
}

template <class T, class X, class S>
cudaError_t launch(Problem p, const Device& device, cudaStream_t stream) {
  // Four warps where shared memory has no room for eight.
  const int warps = shared_bytes<S>(kMaxWarps) <= device.block_shared ? kMaxWarps : kMaxWarps / 2;
  p.along_rows = S::kSegments < warps ? S::kSegments : warps;
  p.along_columns = warps / p.along_rows;
  const int turns = (p.words + S::L::kWords - 1) / S::L::kWords;
  p.slab_turns = (turns + p.along_columns - 1) / p.along_columns;
  const auto kernel = linear_bitmap_kernel<T, X, S>;
  const int bytes = shared_bytes<S>(warps);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  // Room for all blocks; what is left caches x.
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                cudaSharedmemCarveoutMaxShared);
  if (status != cudaSuccess) return status;
  const int block_rows = p.along_rows * S::kWarpRows;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((p.rows + block_rows - 1) / block_rows);
  config.blockDim = dim3(32 * warps);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[1];
  config.attrs = attributes;
  if (device.major >= 9) add_overlap(config, attributes);
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class T, int kTiles>
cudaError_t launch_wide(Problem p, const Device& device, cudaStream_t stream) {
  using W = Wide<kTiles>;
  const auto kernel = linear_bitmap_wide_kernel<T, kTiles>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, W::kBytes);
  if (status != cudaSuccess) return status;
  const int blocks = (p.rows + W::kRows - 1) / W::kRows;
  const int turns = (p.words + W::L::kWords - 1) / W::L::kWords;
  // As many blocks share a row's columns as fill the device, each with four turns or more.
  int splits = 1;
  while (device.major >= 9 && 2 * splits <= kMostSplits &&
         2 * splits * blocks <= 2 * device.processors && turns >= 4 * 2 * splits)
    splits *= 2;
  p.slab_turns = (turns + splits - 1) / splits;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, splits);
  config.blockDim = dim3(W::kThreads);
  config.dynamicSmemBytes = W::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  add_cluster(config, attributes);
  if (device.major >= 9) add_overlap(config, attributes);
  return cudaLaunchKernelEx(&config, kernel, p);
}

// Whether W has so few rows that two blocks of 16 a multiprocessor have all of them. Then the third
// stage is worth more than the third block (H200, 50 %, us, third stage / third block):
//
//   rows of x | 4096 x 4096  4096 x 14336 | 14336 x 4096    28672 x 8192
//   ----------|---------------------------|------------------------------
//       1     | 11.4 / 12.7   31.1 / 39.2 | 35.0 / 29.0   119.3 / 102.0
//       2     | 12.9 / 15.2               |               133.1 / 113.7
//       4     | 14.2 / 16.7   36.9 / 50.3 | 43.2 / 36.2   142.8 / 124.8
//
// With 8 rows of x the third block leaves too few registers. There W of few rows takes 15.2
// and 41.2 us, W of many 46.7 and 142.1 with two turns that share x instead of one (47.0 and
// 154.3).
inline bool few_rows(const Problem& p, const Device& device) {
  return p.rows <= 16 * 2 * device.processors;
}

template <class T, int kTokens, int kSegments>
cudaError_t launch_narrow(const Problem& p, const Device& device, cudaStream_t stream) {
  if (few_rows(p, device))
    return launch<T, T, Shape<kTokens, kSegments, 1, 3, 2>>(p, device, stream);
  return launch<T, T, Shape<kTokens, kSegments, 1, 2, 3>>(p, device, stream);
}

template <class T>
cudaError_t launch_16_bit(Problem p, const Device& device, cudaStream_t stream) {
  if (p.m <= 1) return launch_narrow<T, 1, 8>(p, device, stream);
  if (p.m <= 2) return launch_narrow<T, 2, 4>(p, device, stream);
  if (p.m <= 4) return launch_narrow<T, 4, 2>(p, device, stream);
  if (p.m <= 8) {
    if (few_rows(p, device)) return launch<T, T, Shape<8, 2, 1, 3, 2>>(p, device, stream);
    return launch<T, T, Shape<8, 2, 2, 3, 2>>(p, device, stream);
  }
  if (p.m <= 16) {  // 4096 x 4096 18.5 us, wide 28.7; 14336 x 4096 56.6, wide 50.4
    if (few_rows(p, device)) return launch<T, T, Shape<16, 1, 2, 3, 2>>(p, device, stream);
    return launch_wide<T, 2>(p, device, stream);
  }
  if (p.m <= 32) return launch_wide<T, 4>(p, device, stream);
  if (Wide<8>::kBytes <= device.block_shared) return launch_wide<T, 8>(p, device, stream);
  // 32 rows and the rest.
  static_assert(Wide<4>::kBytes <= kLeastBlockShared);
  constexpr int kFirst = 32;
  Problem rest = p;
  rest.m -= kFirst;
  rest.x = static_cast<const T*>(p.x) + int64_t{kFirst} * p.cols;
  rest.y = static_cast<T*>(p.y) + int64_t{kFirst} * p.rows;
  p.m = kFirst;
  const cudaError_t status = launch_wide<T, 4>(p, device, stream);
  return status != cudaSuccess ? status : launch_16_bit<T>(rest, device, stream);
}

cudaError_t launch_fp32(const Problem& p, const Device& device, cudaStream_t stream) {
  using T = __nv_bfloat16;
  const int tokens = kParts * p.m;
  if (tokens <= 4) return launch<T, float, Shape<4, 2, 1, 3, 2>>(p, device, stream);
  if (tokens <= 8) return launch<T, float, Shape<8, 1, 2, 3, 2>>(p, device, stream);
  return launch<T, float, Shape<16, 1, 2, 3, 2>>(p, device, stream);
}

}  // namespace

int64_t linear_bitmap_rows(DType x) { return x == DType::f32 ? 16 / kParts : 64; }

cudaError_t launch_linear_bitmap(const LinearBitmap& a, cudaStream_t stream) {
  Problem p = {};
  p.y = a.y.data;
  p.x = a.x.data;
  p.chunks = a.values.ptr<const uint4>();
  p.values = static_cast<uint32_t>(a.values.numel());
  p.bitmap = a.bitmap.ptr<const uint32_t>();
  p.row_offsets = a.row_offsets.ptr<const int64_t>();
  p.bias = a.bias.ptr<const float>();
  p.m = static_cast<int>(a.x.shape[0]);
  p.cols = static_cast<int>(a.x.shape[1]);
  p.rows = static_cast<int>(a.bitmap.shape[0]);
  p.words = p.cols / 32;
  if (p.m < 1 || p.m > linear_bitmap_rows(a.x.dtype)) return cudaErrorInvalidValue;
  // Numbers of values and of bitmap words have 32 bits.
  if (a.values.numel() > INT32_MAX || a.bitmap.numel() / 4 > INT32_MAX)
    return cudaErrorInvalidValue;
  Device device;
  const cudaError_t status = query_device(device);
  if (status != cudaSuccess) return status;
  if (a.x.dtype == DType::bf16) return launch_16_bit<__nv_bfloat16>(p, device, stream);
  if (a.x.dtype == DType::f16) return launch_16_bit<__half>(p, device, stream);
  if (a.x.dtype == DType::f32) return launch_fp32(p, device, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pyprune
