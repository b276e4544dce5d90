// y = x W^T for a 2:4 compressed W [R, C] and up to 64 rows of x: warps stream W as it is stored
// through shared memory and let sparse tensor cores multiply.
//
// The floor. W is read once: 1.125 bytes an element against 2 of a dense one. 4096 x 4096 is
// 18.9 MB: 4.4 us at an H200's 4.3 TB/s (measured by copies), less than two launches take. So one
// kernel does everything: where a block has but a part of the columns, the blocks of a cluster add
// their sums through each other's shared memory.
//
// Bytes in flight. By Little's law 4.3 TB/s over 132 multiprocessors at 0.8 us of loaded latency
// ask for 26 KB each. A warp copies kStages - 1 turns ahead of the one it multiplies: two blocks of
// eight warps, three turns of 2.3 KB each, have 110 KB under way. Warps on different columns share
// nothing until the end and wait for no one; those on the same columns, a team, share their x.
//
// The rows of x come out of the caches, but through the same wires: a block of kRows rows of W
// reads 16 / (9 kRows) bytes of x for each byte of W and row of x. Hence more rows of W a block for
// more rows of x, and columns divided among the blocks of a cluster where those are then too few.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/block_sums.h"
#include "cuda/fragments_24.h"
#include "cuda/linear_24.h"
#include "cuda/overlap.h"

namespace pyprune {
namespace {

using namespace fragments_24;

// How a block is laid over W.
//   kTiles     tiles of eight rows of x
//   kRowTiles  tiles of sixteen rows of W a warp
//   kTeam      warps next to each other in rows, which share what they read of x
//   kAcross    teams next to each other in columns
//   kWords     words of 64 columns a warp and turn, a multiple of two
//   kStages    turns in shared memory: one being multiplied, the others arriving
//   kBlocks    a multiprocessor, which bounds the registers
template <int kTiles_, int kRowTiles_, int kTeam_, int kAcross_, int kWords_, int kStages_,
          int kBlocks_>
struct Shape {
  static constexpr int kTiles = kTiles_, kRowTiles = kRowTiles_, kTeam = kTeam_;
  static constexpr int kAcross = kAcross_, kWords = kWords_, kStages = kStages_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kTeam * kAcross;
  static constexpr int kWarpRows = kRowTiles * kTileRows;
  static constexpr int kRows = kTeam * kWarpRows;
  static constexpr int kTurnWords = kAcross * kWords;
  // Of a row and turn.
  static constexpr int kValueRow = kWords * kValuePieces;  // pieces
  static constexpr int kXRow = kWords * kXPieces;          // pieces
  static constexpr int kMetaRow = kWords * kMetaBytes;     // bytes
  // Of a warp and turn, in bytes.
  static constexpr int kValues = kWarpRows * kValueRow * kPieceBytes;
  static constexpr int kMeta = kWarpRows * kMetaRow;
  using Sums = BlockSums<kRows, kTiles * kTileTokens, kAcross>;
  static_assert(kWords % 2 == 0 && (kTeam == 1 || kAcross <= 15));  // named barriers

  PYPRUNE_HD static constexpr int stage_bytes(int m) {
    return m * kXRow * kPieceBytes + kTeam * (kValues + kMeta);
  }
  PYPRUNE_HD static constexpr int shared_bytes(int m) {
    const int stages = kAcross * kStages * stage_bytes(m) + kPieceBytes;
    return stages > Sums::kBytes ? stages : Sums::kBytes;
  }
};

struct Problem {
  void* y;
  const char* x;
  const char* values;
  const char* meta;
  const float* bias;
  int m, rows, words;   // words of 64 columns
  int words_per_split;  // a multiple of a turn's
  int early;            // what is asked for before the kernel before this one has ended
};
constexpr int kNothingEarly = 0, kPrefetchEarly = 1, kCopyEarly = 2;

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

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// Sixteen bytes of W, past the first-level cache: they are read once. Zeros unless `inside`.
__device__ __forceinline__ void copy_weights(uint32_t to, const char* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(inside ? 16 : 0)
               : "memory");
}
// Through the first-level cache: what other warps or turns read, too.
template <int kBytes>
__device__ __forceinline__ void copy_cached(uint32_t to, const char* from, bool inside) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
               :
               : "r"(to), "l"(from), "n"(kBytes), "r"(inside ? kBytes : 0)
               : "memory");
}
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kOpen) : "memory");
}

template <class S>
struct Warp {
  const Problem& p;
  const int lane, in_team, team;
  const int row;              // the warp's first of W
  const int begin, end;       // the block's words
  const uint32_t team_stage;  // the team's first stage, in shared memory
  const uint32_t zeros;       // sixteen bytes of them

  __device__ uint32_t stage(int turn) const {
    return team_stage + turn % S::kStages * S::stage_bytes(p.m);
  }
  // A stage holds x, then each warp's values, then each warp's metadata.
  __device__ uint32_t values_at(uint32_t stage) const {
    return stage + p.m * S::kXRow * kPieceBytes + in_team * S::kValues;
  }
  __device__ uint32_t meta_at(uint32_t stage) const {
    return stage + p.m * S::kXRow * kPieceBytes + S::kTeam * S::kValues + in_team * S::kMeta;
  }
  __device__ int first_word(int turn) const {
    return begin + turn * S::kTurnWords + team * S::kWords;
  }

  __device__ __forceinline__ void copy_w(int turn) const {
    const int word = first_word(turn);
    const uint32_t to = values_at(stage(turn)), to_meta = meta_at(stage(turn));
    constexpr int kRowsAtOnce = 32 / S::kValueRow;
    const int piece = lane % S::kValueRow, first = lane / S::kValueRow;
    const bool column = word + piece / kValuePieces < end;
    const int64_t pitch = static_cast<int64_t>(p.words) * kValuePieces * kPieceBytes;
    const char* from =
        p.values + (row + first) * pitch + (word * kValuePieces + piece) * kPieceBytes;
#pragma unroll
    for (int r = 0; r < S::kWarpRows; r += kRowsAtOnce)
      copy_weights(to + piece_at(r + first, piece, S::kValueRow), from + r * pitch,
                   column && row + r + first < p.rows);
    if (p.words % 2 == 0) {
      copy_meta<2>(to_meta, word);
    } else {
      copy_meta<1>(to_meta, word);
    }
  }

  // kAtOnce words a copy: rows of an odd number of words begin between 16-byte boundaries.
  template <int kAtOnce>
  __device__ __forceinline__ void copy_meta(uint32_t to, int word) const {
    constexpr int kRow = S::kWords / kAtOnce, kCopies = S::kWarpRows * kRow;
#pragma unroll
    for (int k = 0; k < kCopies; k += 32) {
      const int i = k + lane, r = i / kRow, w = i % kRow * kAtOnce;
      const bool inside = word + w < end && row + r < p.rows;
      const char* from = p.meta + (static_cast<int64_t>(row + r) * p.words + word + w) * kMetaBytes;
      if (kCopies % 32 && i >= kCopies) break;
      copy_cached<kAtOnce * kMetaBytes>(to + r * S::kMetaRow + w * kMetaBytes, from, inside);
    }
  }

  __device__ __forceinline__ void copy_x(int turn) const {
    const int word = first_word(turn);
    const uint32_t to = stage(turn);
    const int thread = in_team * 32 + lane, pieces = p.m * S::kXRow;
#pragma unroll
    for (int k = 0; k < S::kTiles * kTileTokens * S::kXRow; k += 32 * S::kTeam) {
      const int i = k + thread, token = i / S::kXRow, piece = i % S::kXRow;
      if (i >= pieces) break;
      const char* from =
          p.x + ((static_cast<int64_t>(token) * p.words + word) * kXPieces + piece) * kPieceBytes;
      copy_cached<kPieceBytes>(to + piece_at(token, piece, S::kXRow), from,
                               word + piece / kXPieces < end);
    }
  }

  // What the team's lanes have copied is there, and no one reads what was there before it. The
  // barrier's number is a constant, or the kernel would be given all sixteen.
  template <int kTry = 0>
  __device__ __forceinline__ void meet_team() const {
    if constexpr (S::kTeam == 1) {
      __syncwarp();
    } else if constexpr (kTry < S::kAcross) {
      if (team == kTry)
        asm volatile("bar.sync %0, %1;" : : "n"(1 + kTry), "n"(32 * S::kTeam) : "memory");
      else
        meet_team<kTry + 1>();
    }
  }

  template <class T>
  __device__ __forceinline__ void multiply(int turn,
                                           float (&sum)[S::kRowTiles][S::kTiles][4]) const {
    const uint32_t x = stage(turn), values = values_at(x), meta = meta_at(x);
#pragma unroll
    for (int word = 0; word < S::kWords; ++word) {
      uint32_t e[S::kRowTiles];
#pragma unroll
      for (int h = 0; h < S::kRowTiles; ++h) {
        const uint32_t at =
            meta + (h * kTileRows + quad_of(lane)) * S::kMetaRow + meta_byte(word, lane);
        uint16_t low, high;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(low) : "r"(at) : "memory");
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(high) : "r"(at + 8 * S::kMetaRow) : "memory");
        e[h] = low | static_cast<uint32_t>(high) << 16;
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        uint32_t a[S::kRowTiles][4];
#pragma unroll
        for (int h = 0; h < S::kRowTiles; ++h)
          load_matrices(a[h], values + piece_at(h * kTileRows + a_row(lane), a_piece(word, s, lane),
                                                S::kValueRow));
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j) {
          const int token = j * kTileTokens + b_row(lane);
          uint32_t b[4];
          load_matrices(
              b, token < p.m ? x + piece_at(token, b_piece(word, s, lane), S::kXRow) : zeros);
#pragma unroll
          for (int h = 0; h < S::kRowTiles; ++h) {
            if (s == 0)
              mma_sp<T, 0>(sum[h][j], a[h], b, e[h]);
            else
              mma_sp<T, 1>(sum[h][j], a[h], b, e[h]);
          }
        }
      }
    }
  }

  // Asks the second-level cache for the beginning of the block's rows. What it fetches may change
  // until it is read: copies read the cache, not memory.
  __device__ void prefetch() const {
    constexpr int kBytes = 64 * 1024;  // a block
    const int block_row = row - in_team * S::kWarpRows;
    int words = kBytes / S::kRows / (kValuePieces * kPieceBytes);
    words = min(words, end - begin) & ~1;
    const int r = threadIdx.x;
    if (r < S::kRows && block_row + r < p.rows && words > 0) {
      const int64_t word = static_cast<int64_t>(block_row + r) * p.words + begin;
      prefetch_bytes(p.values + word * kValuePieces * kPieceBytes,
                     words * kValuePieces * kPieceBytes);
      if (p.words % 2 == 0) prefetch_bytes(p.meta + word * kMetaBytes, words * kMetaBytes);
    }
  }

  template <class T>
  __device__ __forceinline__ void run(float (&sum)[S::kRowTiles][S::kTiles][4]) const {
    constexpr int kAhead = S::kStages - 1;
    const int turns = (end - begin + S::kTurnWords - 1) / S::kTurnWords;
    if (p.early == kPrefetchEarly) prefetch();
    if (p.early != kCopyEarly) wait_for_kernel_before();
    for (int turn = 0; turn < kAhead && turn < turns; ++turn) copy_w(turn);
    if (p.early == kCopyEarly) wait_for_kernel_before();
    let_next_kernel_begin();
#pragma unroll
    for (int turn = 0; turn < kAhead; ++turn) {
      if (turn < turns) copy_x(turn);
      close_copies();
    }
    for (int turn = 0; turn < turns; ++turn) {
      wait_copies<kAhead - 1>();
      meet_team();
      if (turn + kAhead < turns) {
        copy_w(turn + kAhead);
        copy_x(turn + kAhead);
      }
      close_copies();
      multiply<T>(turn, sum);
    }
    wait_copies<0>();
  }
};

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) linear_24_kernel(const Problem p) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int in_team = warp % S::kTeam, team = warp / S::kTeam;
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const int team_bytes = S::kStages * S::stage_bytes(p.m), zeros = S::kAcross * team_bytes;
  const int begin = blockIdx.y * p.words_per_split;
  const Warp<S> w{p,
                  lane,
                  in_team,
                  team,
                  static_cast<int>(blockIdx.x) * S::kRows + in_team * S::kWarpRows,
                  begin,
                  min(begin + p.words_per_split, p.words),
                  address + team * team_bytes,
                  address + zeros};
  if (threadIdx.x < kPieceBytes / 4) reinterpret_cast<uint32_t*>(shared + zeros)[threadIdx.x] = 0;
  __syncthreads();
  float sum[S::kRowTiles][S::kTiles][4] = {};
  w.template run<T>(sum);
  __syncthreads();  // the last stages have been read
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int h = 0; h < S::kRowTiles; ++h)
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int m = j * kTileTokens + product_token(lane, i);
        const int r = in_team * S::kWarpRows + h * kTileRows + product_row(lane, i);
        sums[team * S::Sums::kPart + m * S::Sums::kPitch + r] = sum[h][j][i];
      }
  __syncthreads();
  S::Sums::template store<T>(sums, static_cast<T*>(p.y), p.bias,
                             static_cast<int64_t>(blockIdx.x) * S::kRows, p.rows, p.m);
}

// Blocks of a cluster that share the columns of their rows: as many as give each multiprocessor
// its kBlocks, as long as each has two turns of its own.
template <class S>
int splits_of(const Problem& p, int processors, int major) {
  if (major < 9) return 1;
  const int blocks = (p.rows + S::kRows - 1) / S::kRows;
  int splits = 1;
  while (2 * splits <= kMostSplits && 2 * splits * blocks <= S::kBlocks * processors &&
         p.words >= 2 * splits * 2 * S::kTurnWords)
    splits *= 2;
  return splits;
}

template <class T, class S>
cudaError_t launch_shape(Problem p, int splits, bool overlap, cudaStream_t stream) {
  const auto kernel = linear_24_kernel<T, S>;
  const int bytes = S::shared_bytes(p.m);
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  const int turns = (p.words + S::kTurnWords - 1) / S::kTurnWords;
  p.words_per_split = (turns + splits - 1) / splits * S::kTurnWords;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((p.rows + S::kRows - 1) / S::kRows, splits);
  config.blockDim = dim3(S::kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  add_cluster(config, attributes);
  if (overlap) add_overlap(config, attributes);
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class T>
cudaError_t launch(Problem p, cudaStream_t stream) {
  int device, processors, major;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  const bool overlap = major >= 9;
  p.early = overlap ? kPrefetchEarly : kNothingEarly;
  const auto with = [&](auto shape) {
    using S = decltype(shape);
    return launch_shape<T, S>(p, splits_of<S>(p, processors, major), overlap, stream);
  };
  if (p.m <= 2) return with(Shape<1, 1, 1, 8, 2, 4, 2>());
  if (p.m <= 8) return with(Shape<1, 1, 2, 4, 2, 3, 3>());
  if (p.m <= 16) return with(Shape<2, 1, 4, 2, 2, 3, 2>());
  if (p.m <= 32) return with(Shape<4, 2, 4, 2, 2, 2, 2>());
  return with(Shape<8, 2, 4, 1, 2, 3, 2>());
}

}  // namespace

cudaError_t launch_linear_24(const Linear24& a, cudaStream_t stream) {
  const Problem p{a.y.data,
                  a.x.ptr<const char>(),
                  a.values.ptr<const char>(),
                  a.meta.ptr<const char>(),
                  a.bias.ptr<const float>(),
                  static_cast<int>(a.x.shape[0]),
                  static_cast<int>(a.values.shape[0]),
                  static_cast<int>(a.x.shape[1] / kColumns),
                  0,
                  0};
  if (a.y.dtype == DType::bf16) return launch<__nv_bfloat16>(p, stream);
  if (a.y.dtype == DType::f16) return launch<__half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pyprune
