#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/fragments_24.h"
#include "cuda/linear_24.h"

namespace pyprune {
namespace {

using namespace fragments_24;

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kPairRows = 2 * kTileRows;  // of W a warp: two tiles share what it reads of x

// How a block of eight warps is laid over W for kTiles x 8 rows of x. Few rows of x: more warps
// along the columns, so that a small W still fills the device. Many: more along the rows, because
// every block reads all of its columns of x through the second-level cache.
template <int kTiles>
struct Shape {
  static constexpr int kAlongRows = kTiles <= 2 ? 2 : 4;
  static constexpr int kAlongColumns = kWarps / kAlongRows;
  static constexpr int kRows = kAlongRows * kPairRows;
  static constexpr int kTokens = kTiles * kTileTokens;
  // Pieces of 8 columns x 32 lanes of x that a warp stages a turn.
  static constexpr int kPieces = kAlongColumns * kTiles * 2 / kWarps;
  static constexpr int kStage = kAlongColumns * kTiles * kTileWords;  // words
  // The sums of all warps along the columns but the first.
  static constexpr int kSums = (kAlongColumns - 1) * kAlongRows * 32 * kTiles * 8;
  static constexpr int kShared = 2 * kStage > kSums ? 2 * kStage : kSums;
  // Two blocks a multiprocessor keep some 36 KB of W in flight; 64 rows of x take the registers.
  static constexpr int kBlocks = kTiles <= 4 ? 2 : 1;
};

struct Problem {
  void* y;
  const void* x;
  const uint4* values;
  const uint2* meta;
  const float* bias;
  float* workspace;
  int m, rows, words;  // words of 64 columns
  int words_per_split;
};

template <class T, int kSelector>
__device__ __forceinline__ void mma_sp(float (&d)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[4], uint32_t e) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(e), "n"(kSelector));
  } else {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(e), "n"(kSelector));
  }
}

__device__ inline void convert(float v, __nv_bfloat16* out) { *out = __float2bfloat16(v); }
__device__ inline void convert(float v, __half* out) { *out = __float2half(v); }

// What a lane reads of 64 columns of a warp's 32 rows: 16 bytes of values and all 8 of metadata
// from each of four rows.
struct Weights {
  uint4 values[4];
  uint2 meta[4];
};

// Rows 8 r + quad of the warp. Rows past the matrix repeat its last one; their sums are not stored.
__device__ inline Weights load_weights(const Problem& p, const int (&row)[4], int word, int place) {
  Weights w;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    // A row of values is 4 vectors a word of columns, a row of metadata one. Read once: no cache
    // need keep them.
    const int64_t at = static_cast<int64_t>(row[r]) * p.words + word;
    w.values[r] = __ldcs(p.values + 4 * at + place);
    w.meta[r] = __ldcs(p.meta + at);
  }
  return w;
}

// Piece k of a warp: 16 bytes of x for a lane, zeros outside.
template <int kTiles>
struct Piece {
  int along, tile, q, token;
  __device__ Piece(int warp, int lane, int k) {
    const int chunk = warp * Shape<kTiles>::kPieces + k;  // 8 tokens x 4 pieces of 8 columns
    along = chunk / (2 * kTiles);
    tile = chunk / 2 % kTiles;
    q = 4 * (chunk % 2) + place_of(lane);
    token = quad_of(lane);
  }
};

template <int kTiles>
__device__ inline void load_x(const Problem& p, int warp, int lane, int first, int end,
                              uint4 (&x)[Shape<kTiles>::kPieces]) {
#pragma unroll
  for (int k = 0; k < Shape<kTiles>::kPieces; ++k) {
    const Piece<kTiles> piece(warp, lane, k);
    const int m = piece.tile * kTileTokens + piece.token, word = first + piece.along;
    x[k] = make_uint4(0, 0, 0, 0);
    if (m < p.m && word < end)
      x[k] = __ldg(static_cast<const uint4*>(p.x) + (static_cast<int64_t>(m) * p.words + word) * 8 +
                   piece.q);
  }
}

template <int kTiles>
__device__ inline void store_x(int warp, int lane, const uint4 (&x)[Shape<kTiles>::kPieces],
                               uint32_t* stage) {
#pragma unroll
  for (int k = 0; k < Shape<kTiles>::kPieces; ++k) {
    const Piece<kTiles> piece(warp, lane, k);
    int word[4];
    x_words(piece.token, piece.q, word);
    uint32_t* tile = stage + (piece.along * kTiles + piece.tile) * kTileWords;
    tile[word[0]] = x[k].x;
    tile[word[1]] = x[k].y;
    tile[word[2]] = x[k].z;
    tile[word[3]] = x[k].w;
  }
}

template <class T, int kTiles>
__device__ inline void multiply(const Weights& w, const uint32_t* stage, int lane,
                                float (&sum)[2][kTiles][4]) {
  uint32_t e[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t row[2] = {w.meta[2 * h].x, w.meta[2 * h].y};
    const uint32_t row8[2] = {w.meta[2 * h + 1].x, w.meta[2 * h + 1].y};
    e[h] = metadata(row, row8, place_of(lane));
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    uint32_t a[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint4 u = w.values[2 * h], v = w.values[2 * h + 1];
      const uint32_t row[4] = {u.x, u.y, u.z, u.w}, row8[4] = {v.x, v.y, v.z, v.w};
      a_registers(row, row8, s, a[h]);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      uint32_t b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = stage[j * kTileWords + b_word(s, i, lane)];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (s == 0)
          mma_sp<T, 0>(sum[h][j], a[h], b, e[h]);
        else
          mma_sp<T, 1>(sum[h][j], a[h], b, e[h]);
      }
    }
  }
}

// Adds the sums of the warps along the columns, in their order, into the first one's registers.
template <int kTiles>
__device__ inline void add_warps(int along_rows, int along_columns, int lane, float* shared,
                                 float (&sum)[2][kTiles][4]) {
  using S = Shape<kTiles>;
  const auto slot = [&](int k, int i) {
    return ((k * S::kAlongRows + along_rows) * kTiles * 8 + i) * 32 + lane;
  };
  __syncthreads();  // the last stage of x has been read
  if (along_columns > 0)
#pragma unroll
    for (int i = 0; i < kTiles * 8; ++i)
      shared[slot(along_columns - 1, i)] = sum[i / 4 / kTiles][i / 4 % kTiles][i % 4];
  __syncthreads();
  if (along_columns == 0)
#pragma unroll
    for (int k = 0; k < S::kAlongColumns - 1; ++k)
#pragma unroll
      for (int i = 0; i < kTiles * 8; ++i)
        sum[i / 4 / kTiles][i / 4 % kTiles][i % 4] += shared[slot(k, i)];
}

template <class T, int kTiles>
__global__ void __launch_bounds__(kThreads, Shape<kTiles>::kBlocks) linear_24_kernel(Problem p) {
  using S = Shape<kTiles>;
  __shared__ uint32_t shared[S::kShared];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int along_rows = warp % S::kAlongRows, along_columns = warp / S::kAlongRows;
  const int r0 = blockIdx.x * S::kRows + along_rows * kPairRows;
  int row[4];
#pragma unroll
  for (int r = 0; r < 4; ++r) row[r] = min(r0 + 8 * r + quad_of(lane), p.rows - 1);

  const int begin = blockIdx.y * p.words_per_split;
  const int end = min(begin + p.words_per_split, p.words);
  float sum[2][kTiles][4] = {};
  uint4 x[S::kPieces];
  load_x<kTiles>(p, warp, lane, begin, end, x);
  // A warp past the last word reads that one again and meets zeros of x.
  const int last = end - 1;
  Weights w = load_weights(p, row, min(begin + along_columns, last), place_of(lane));
  store_x<kTiles>(warp, lane, x, shared);
  __syncthreads();
  int buffer = 0;
  for (int first = begin; first < end; first += S::kAlongColumns) {
    const int next = first + S::kAlongColumns;
    load_x<kTiles>(p, warp, lane, next, end, x);
    const Weights w_next = load_weights(p, row, min(next + along_columns, last), place_of(lane));
    multiply<T, kTiles>(w, shared + buffer * S::kStage + along_columns * kTiles * kTileWords, lane,
                        sum);
    buffer ^= 1;
    store_x<kTiles>(warp, lane, x, shared + buffer * S::kStage);
    w = w_next;
    __syncthreads();
  }
  add_warps<kTiles>(along_rows, along_columns, lane, reinterpret_cast<float*>(shared), sum);
  if (along_columns > 0) return;

  // Register i of a tile: row quad + 8 (i / 2), token 2 place + i % 2.
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = r0 + kTileRows * h + quad_of(lane) + 8 * (i / 2);
        const int m = kTileTokens * j + 2 * place_of(lane) + i % 2;
        if (r >= p.rows || m >= p.m) continue;
        const int64_t at = static_cast<int64_t>(m) * p.rows + r;
        if (p.workspace)
          p.workspace[static_cast<int64_t>(blockIdx.y) * p.m * p.rows + at] = sum[h][j][i];
        else
          convert(sum[h][j][i] + (p.bias ? p.bias[r] : 0.0f), static_cast<T*>(p.y) + at);
      }
}

// y from the sums of the splits, added in their order: the result does not depend on timing.
template <class T>
__global__ void __launch_bounds__(256) add_splits_kernel(Problem p, int splits) {
  const int64_t size = static_cast<int64_t>(p.m) * p.rows;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= size) return;
  float sum = p.bias ? p.bias[at % p.rows] : 0.0f;
  for (int s = 0; s < splits; ++s) sum += p.workspace[s * size + at];
  convert(sum, static_cast<T*>(p.y) + at);
}

template <int kTiles>
int64_t splits_of(int64_t rows, int64_t words, int processors) {
  using S = Shape<kTiles>;
  const int64_t blocks = (rows + S::kRows - 1) / S::kRows;
  const int64_t wanted = (static_cast<int64_t>(S::kBlocks) * processors + blocks - 1) / blocks;
  // At least four turns a block, or filling the pipeline costs more than the split gains.
  const int64_t most = words / (4 * S::kAlongColumns);
  return wanted < most ? wanted : most < 1 ? 1 : most;
}

// Calls f with the number of tiles of eight rows of x, rounded up to a power of two, as a constant.
template <class F>
auto with_tiles(int64_t m, F&& f) {
  if (m <= 8) return f(std::integral_constant<int, 1>());
  if (m <= 16) return f(std::integral_constant<int, 2>());
  if (m <= 32) return f(std::integral_constant<int, 4>());
  return f(std::integral_constant<int, 8>());
}

template <class T>
cudaError_t launch(const Problem& p, int64_t splits, cudaStream_t stream) {
  with_tiles(p.m, [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    const dim3 grid((p.rows + Shape<kTiles>::kRows - 1) / Shape<kTiles>::kRows,
                    static_cast<unsigned>(splits));
    linear_24_kernel<T, kTiles><<<grid, kThreads, 0, stream>>>(p);
  });
  if (splits > 1) {
    const int64_t size = static_cast<int64_t>(p.m) * p.rows;
    add_splits_kernel<T><<<static_cast<unsigned>((size + 255) / 256), 256, 0, stream>>>(
        p, static_cast<int>(splits));
  }
  return cudaGetLastError();
}

}  // namespace

int64_t linear_24_splits(int64_t m, int64_t rows, int64_t cols, int processors) {
  return with_tiles(m, [&](auto tiles) {
    return splits_of<decltype(tiles)::value>(rows, cols / kColumns, processors);
  });
}

cudaError_t launch_linear_24(const Linear24& a, int64_t splits, cudaStream_t stream) {
  const int64_t words = a.x.shape[1] / kColumns;
  const Problem p{a.y.data,
                  a.x.data,
                  a.values.ptr<const uint4>(),
                  a.meta.ptr<const uint2>(),
                  a.bias.ptr<const float>(),
                  splits > 1 ? a.workspace.ptr<float>() : nullptr,
                  static_cast<int>(a.x.shape[0]),
                  static_cast<int>(a.values.shape[0]),
                  static_cast<int>(words),
                  static_cast<int>((words + splits - 1) / splits)};
  if (a.y.dtype == DType::bf16) return launch<__nv_bfloat16>(p, splits, stream);
  if (a.y.dtype == DType::f16) return launch<__half>(p, splits, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pyprune
