// Exact masks over several matrices. Three passes over the weights count their keys' digits, eleven
// bits, then ten and ten of the keys that share the digits before; a fourth writes the masks. No
// score is stored and nothing is read back.
//
// Where only some of the keys equal to the cut go, it is the first ones: the last pass then numbers
// its tiles in the order in which they start, and each looks back at how many such keys the tiles
// before it hold (decoupled look-back: Merrill and Garland 2016, Single-pass Parallel Prefix Scan
// with Decoupled Look-back).
#include <algorithm>

#include "cuda/mask_global.h"
#include "cuda/radix_bins.h"
#include "cuda/score_chunks.h"

namespace pyprune {
namespace {

using namespace score_chunks;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kLanes;
constexpr int kTileChunks = 4;  // of a thread
constexpr int kTile = kThreads * kTileChunks;
constexpr int kCountBlocksPerProcessor = 4;
constexpr int kNarrowThreads = 1024;

// What the passes hand on, on the device.
struct State {
  uint64_t rank;    // of the cut among the keys that share `prefix`, from 1
  uint64_t equal;   // how many keys share it
  uint64_t prefix;  // the digits found so far, in the end the cut
  uint64_t ticket;  // tiles that have started
};

using Count = unsigned long long;

struct Workspace {
  Count* counts;  // [kHighestBins]
  State* state;
  Count* tiles;  // a word for each tile
};

constexpr int64_t kStateWords = sizeof(State) / sizeof(uint64_t);

Workspace workspace_of(uint64_t* words) {
  return {reinterpret_cast<Count*>(words), reinterpret_cast<State*>(words + kHighestBins),
          reinterpret_cast<Count*>(words + kHighestBins + kStateWords)};
}

__device__ inline void locate(const Matrix& m, uint32_t chunk, uint32_t per_row, int64_t& row,
                              int64_t& col) {
  row = m.rows == 1 ? 0 : chunk / per_row;
  col = static_cast<int64_t>(chunk - static_cast<uint32_t>(row) * per_row) * kChunk;
}

template <class T>
__device__ inline void load_keys(const Matrix& m, int64_t row, int64_t col,
                                 const uint32_t (&raw)[kRaw<T>], uint32_t (&key)[kChunk]) {
  float scale[kChunk], score[kChunk];
  load_column_scale(m, col, scale);
  scores_of<T>(m, row, col, raw, scale, score);
  keys_of(m, row, col, score, key);
}

// Counts the digit `step` of the keys that share the digits before it.
template <class T>
__global__ void __launch_bounds__(kThreads, 3)
    global_count_kernel(Matrix m, uint32_t chunks, Count* counts, const State* state, int step) {
  __shared__ uint32_t bins[kHighestBins];
  for (int i = threadIdx.x; i < kHighestBins; i += kThreads) bins[i] = 0;
  __syncthreads();
  const Digit digit = digit_of(step);
  const int above = digit.shift + digit.bits;
  const uint32_t mask = (1u << digit.bits) - 1;
  const uint32_t prefix = static_cast<uint32_t>(state->prefix);
  const uint32_t per_row = static_cast<uint32_t>(m.chunks_per_row());
  constexpr int kUnroll = sizeof(T) == 2 ? 4 : 2;
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * kThreads;
  for (uint64_t first = static_cast<uint64_t>(blockIdx.x) * kThreads + threadIdx.x; first < chunks;
       first += kUnroll * stride) {
    uint32_t raw[kUnroll][kRaw<T>];
    int64_t row[kUnroll], col[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const uint64_t chunk = first + u * stride;
      if (chunk >= chunks) break;
      locate(m, static_cast<uint32_t>(chunk), per_row, row[u], col[u]);
      load_weights<T>(m, row[u], col[u], raw[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * stride >= chunks) break;
      uint32_t key[kChunk];
      load_keys<T>(m, row[u], col[u], raw[u], key);
      // Past the last column lies kPadding: the highest bin, which no rank reaches.
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (key[i] >> above == prefix) atomicAdd(&bins[key[i] >> digit.shift & mask], 1u);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kHighestBins; i += kThreads)
    if (bins[i]) atomicAdd(&counts[i], static_cast<Count>(bins[i]));
}

__global__ void global_start_kernel(State* state, Count rank) { state->rank = rank; }

// One block: takes the digit in which the rank lies, and clears the counts for the next.
__global__ void __launch_bounds__(kNarrowThreads)
    global_narrow_kernel(Count* counts, State* state, int step, int unused_bits) {
  constexpr int kPerThread = kHighestBins / kNarrowThreads;
  __shared__ Count warps[kNarrowThreads / kLanes];
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const Count rank = state->rank;
  const Count prefix = state->prefix;
  Count own[kPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    own[i] = counts[threadIdx.x * kPerThread + i];
    sum += own[i];
    counts[threadIdx.x * kPerThread + i] = 0;
  }
  const Count upto = sum_up_to_lane(sum, lane);
  if (lane == kLanes - 1) warps[warp] = upto;
  __syncthreads();  // everyone has read the state too
  Count below = upto - sum;
  for (int i = 0; i < warp; ++i) below += warps[i];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    if (below < rank && rank <= below + own[i]) {
      const Count digit = threadIdx.x * kPerThread + i;
      state->rank = rank - below;
      state->equal = own[i];
      state->prefix = (prefix << digit_of(step).bits | digit) << unused_bits;
    }
    below += own[i];
  }
}

// How a tile tells later ones what it holds.
constexpr Count kOwn = Count{1} << 62;   // its own keys equal to the cut
constexpr Count kUpTo = Count{2} << 62;  // those of all tiles up to it
constexpr Count kCountMask = kOwn - 1;

// Keys equal to the cut in the tiles before `tile`; one whole warp.
__device__ inline Count look_back(Count* tiles, uint32_t tile, uint32_t own) {
  const int lane = threadIdx.x % kLanes;
  if (lane == 0) atomicExch(&tiles[tile], tile == 0 ? kUpTo | own : kOwn | own);
  Count before = 0;
  int64_t last = static_cast<int64_t>(tile) - 1;
  while (last >= 0) {
    const int64_t at = last - lane;
    Count word = kUpTo;  // before the first: nothing
    if (at >= 0) do {
        word = atomicAdd(&tiles[at], Count{0});
      } while (word < kOwn);
    __syncwarp();
    const unsigned known = __ballot_sync(kAllLanes, word >= kUpTo);
    const int stop = known ? __ffs(known) - 1 : kLanes;
    Count sum = lane <= stop ? word & kCountMask : 0;
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) sum += __shfl_xor_sync(kAllLanes, sum, d);
    before += sum;
    if (known) break;
    last -= kLanes;
  }
  if (lane == 0 && tile > 0) atomicExch(&tiles[tile], kUpTo | (before + own));
  return before;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    global_mask_kernel(Matrix m, uint32_t chunks, uint32_t first_tile, State* state, Count* tiles) {
  __shared__ uint32_t sums[kWarps], tile_of_block;
  __shared__ Count before_tile;
  __shared__ uint8_t equal_in[kTile];
  const int32_t cut = static_cast<int32_t>(state->prefix);
  const Count rank = state->rank;
  const bool split = rank < state->equal;  // some of the keys equal to the cut stay
  if (split) {
    if (threadIdx.x == 0)
      tile_of_block = static_cast<uint32_t>(
          atomicAdd(reinterpret_cast<Count*>(&state->ticket), Count{1}) - first_tile);
    __syncthreads();
  }
  const uint32_t tile = split ? tile_of_block : blockIdx.x;
  const uint32_t per_row = static_cast<uint32_t>(m.chunks_per_row());
  uint32_t raw[kTileChunks][kRaw<T>], key[kTileChunks][kChunk];
  int64_t row[kTileChunks], col[kTileChunks];
  const uint64_t first = static_cast<uint64_t>(tile) * kTile + threadIdx.x;
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) {
    const uint64_t chunk = first + c * kThreads;
    if (chunk >= chunks) break;
    locate(m, static_cast<uint32_t>(chunk), per_row, row[c], col[c]);
    load_weights<T>(m, row[c], col[c], raw[c]);
  }
  uint32_t equal = 0;
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) {
    uint32_t here = 0;
    if (first + c * kThreads < chunks) {
      load_keys<T>(m, row[c], col[c], raw[c], key[c]);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) here += key[c][i] == static_cast<uint32_t>(cut);
    }
    if (split) equal_in[c * kThreads + threadIdx.x] = static_cast<uint8_t>(here);
    equal += here;
  }
  // All keys equal to the cut go, or with `split` those that are among the first `quota` of the
  // tile.
  Count quota = kCountMask;
  if (split) {
    const uint32_t warp_sum = __reduce_add_sync(kAllLanes, equal);
    if (threadIdx.x % kLanes == 0) sums[threadIdx.x / kLanes] = warp_sum;
    __syncthreads();
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) own += sums[i];
    if (threadIdx.x < kLanes) {
      const Count before = look_back(tiles, first_tile + tile, own);
      if (threadIdx.x == 0) before_tile = before;
    }
    __syncthreads();
    quota = before_tile < rank ? rank - before_tile : 0;
    if (quota >= own) quota = kCountMask;
  }
  const int32_t forbidden = m.preserve ? 0 : -1;
#pragma unroll
  for (int c = 0; c < kTileChunks; ++c) {
    if (first + c * kThreads >= chunks) break;
    Count left = quota;
    if (quota != 0 && quota != kCountMask) {  // at most one tile of all
      for (uint32_t i = 0; i < c * kThreads + threadIdx.x; ++i)
        left = left > equal_in[i] ? left - equal_in[i] : 0;
    }
    uint2 bytes = keys_above(key[c], max(cut - (left == 0), forbidden));
    if (left != 0 && left < kChunk && cut > forbidden) {
      uint32_t words[2] = {bytes.x, bytes.y};
      Count seen = 0;
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (key[c][i] == static_cast<uint32_t>(cut) && ++seen > left)
          words[i / 4] |= 1u << (8 * (i % 4));
      bytes = make_uint2(words[0], words[1]);
    }
    store_mask(m, row[c], col[c], bytes);
  }
}

struct Part {
  Matrix matrix;
  uint32_t chunks, tiles;
};

// A matrix as the kernels walk it.
Part part_of(const GlobalMaskCuda& g) {
  Matrix m = matrix_of(g.mask, g.w, g.terms);
  if (is_one_run(m, g.w)) {
    m.cols *= m.rows;
    m.rows = 1;
    m.vector = m.cols % kChunk == 0 && aligned(m.w, 0, 16) && aligned(m.mask, 0, 8);
  }
  const int64_t chunks = m.rows * m.chunks_per_row();
  return {m, static_cast<uint32_t>(chunks), static_cast<uint32_t>((chunks + kTile - 1) / kTile)};
}

template <class T>
void count(const std::vector<Part>& parts, const Workspace& space, int step, int processors,
           cudaStream_t stream) {
  for (const Part& part : parts) {
    const uint32_t most = static_cast<uint32_t>(processors * kCountBlocksPerProcessor);
    const uint32_t wanted = (part.chunks + kThreads - 1) / kThreads;
    const uint32_t blocks = wanted < most ? wanted : most;
    global_count_kernel<T><<<blocks, kThreads, 0, stream>>>(part.matrix, part.chunks, space.counts,
                                                            space.state, step);
  }
}

template <class T>
void launch(const std::vector<Part>& parts, const Workspace& space, int digits, int processors,
            cudaStream_t stream) {
  for (int step = 0; step < digits; ++step) {
    count<T>(parts, space, step, processors, stream);
    const int unused = step + 1 == digits && digits < kDigits ? digit_of(kDigits - 1).bits : 0;
    global_narrow_kernel<<<1, kNarrowThreads, 0, stream>>>(space.counts, space.state, step, unused);
  }
  uint32_t first_tile = 0;
  for (const Part& part : parts) {
    global_mask_kernel<T><<<part.tiles, kThreads, 0, stream>>>(part.matrix, part.chunks, first_tile,
                                                               space.state, space.tiles);
    first_tile += part.tiles;
  }
}

}  // namespace

int64_t mask_global_workspace(const std::vector<GlobalMaskCuda>& matrices) {
  int64_t words = kHighestBins + kStateWords;
  for (const GlobalMaskCuda& g : matrices) words += part_of(g).tiles;
  return words;
}

cudaError_t launch_mask_global(const std::vector<GlobalMaskCuda>& matrices, int64_t pruned,
                               uint64_t* workspace, cudaStream_t stream) {
  int device, processors;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  std::vector<Part> parts;
  bool short_keys = matrices[0].w.dtype != DType::f32;
  for (const GlobalMaskCuda& g : matrices) {
    parts.push_back(part_of(g));
    const Matrix& m = parts.back().matrix;
    if (m.column_scale || m.row_scale || m.addend || m.preserve) short_keys = false;
  }
  const Workspace space = workspace_of(workspace);
  status = cudaMemsetAsync(workspace, 0, 8 * mask_global_workspace(matrices), stream);
  if (status != cudaSuccess) return status;
  global_start_kernel<<<1, 1, 0, stream>>>(space.state, static_cast<Count>(pruned));
  const int digits = short_keys ? kDigits - 1 : kDigits;
  const bool known = with_type(matrices[0].w.dtype, [&](auto type) {
    launch<decltype(type)>(parts, space, digits, processors, stream);
  });
  return known ? cudaGetLastError() : cudaErrorInvalidValue;
}

}  // namespace pyprune
