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
// Measured on an H200 (CUDA graphs, W out of memory, 4096 x 4096 to 28672 x 8192), in shares of the
// bandwidth of copies and as a multiple of cuBLAS's speed on the dense W: one row of x 71 to 100 %
// and 1.7 to 2.1, eight rows 68 to 97 % and 1.6 to 1.9, 16 rows 59 to 87 % and 1.4 to 1.7. More
// rows are not worth it everywhere: 32 have 0.9 to 1.1 times the speed of cuBLAS, 64 have 0.5 to
// 0.9; cuSPARSELt has 0.5 to 0.8 at either. The likely reason, which was not profiled: x. With 64
// rows a block of 128 rows of W fetches 0.9 bytes of x for each byte of W, at 14336 x 4096 29 bytes
// a ns and multiprocessor in all, which is most of what the second-level cache hands out. Larger
// blocks would need less, but leave multiprocessors without one. Not timed since: a lane finds one
// address for all tiles and one piece of x to copy, which took a quarter of the instructions of a
// turn with 32 and 64 rows away (358 to 276 and 481 to 361), and a tenth with one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/block_sums.h"
#include "cuda/device.h"
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
  // Whole tiles of x end within the stage, however few rows x has.
  static_assert(tiles_apart(kTiles, kXRow) <= kTeam * (kValues + kMeta));

  PYPRUNE_HD static constexpr int stage_bytes(int m) {
    return m * kXRow * kPieceBytes + kTeam * (kValues + kMeta);
  }
  PYPRUNE_HD static constexpr int shared_bytes(int m) {
    const int stages = kAcross * kStages * stage_bytes(m);
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
    using D = Deal<S::kValueRow, 32>;
    const int piece = D::piece_of(lane), first = D::row_of(lane);
    const bool column = word + piece / kValuePieces < end;
    const int left = p.rows - row - first;
    const int64_t pitch = static_cast<int64_t>(p.words) * kValuePieces * kPieceBytes;
    const char* from =
        p.values + (row + first) * pitch + (word * kValuePieces + piece) * kPieceBytes;
#pragma unroll
    for (int r = 0; r < S::kWarpRows; r += D::kRowsAtOnce) {
      copy_weights(to + piece_at(r + first, piece, S::kValueRow), from, column && r < left);
      from += D::kRowsAtOnce * pitch;
    }
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
    using D = Deal<S::kXRow, 32 * S::kTeam>;
    const int word = first_word(turn), thread = in_team * 32 + lane;
    const int piece = D::piece_of(thread), first = D::row_of(thread);
    const bool column = word + piece / kXPieces < end;
    const uint32_t to = stage(turn);
    const int64_t pitch = static_cast<int64_t>(p.words) * kXPieces * kPieceBytes;
    const char* from = p.x + first * pitch + (word * kXPieces + piece) * kPieceBytes;
#pragma unroll
    for (int token = 0; token < S::kTiles * kTileTokens; token += D::kRowsAtOnce) {
      // Of one tile few rows may be there. Of more it is cheaper to pass over the last than to ask.
      if (S::kTiles == 1 && token >= p.m) break;
      if (token + first < p.m)
        copy_cached<kPieceBytes>(to + piece_at(token + first, piece, S::kXRow), from, column);
      from += D::kRowsAtOnce * pitch;
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
        const uint32_t a_lane =
            values + piece_at(a_row(lane), a_piece(word, s, lane), S::kValueRow);
#pragma unroll
        for (int h = 0; h < S::kRowTiles; ++h)
          load_matrices(a[h], a_lane + tiles_apart(h * kTileRows / kTileTokens, S::kValueRow));
        const uint32_t b_lane = x + piece_at(b_row(lane), b_piece(word, s, lane), S::kXRow);
#pragma unroll
        for (int j = 0; j < S::kTiles; ++j) {
          // Past the last row of x this is whatever else the stage holds. A row of x is a column of
          // the product: those of no row are not stored.
          uint32_t b[4];
          load_matrices(b, b_lane + tiles_apart(j, S::kXRow));
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

  template <class T>
  __device__ __forceinline__ void run(float (&sum)[S::kRowTiles][S::kTiles][4]) const {
    constexpr int kAhead = S::kStages - 1;
    const int turns = (end - begin + S::kTurnWords - 1) / S::kTurnWords;
#pragma unroll
    for (int turn = 0; turn < kAhead; ++turn) {
      if (turn < turns) {
        copy_w(turn);
        copy_x(turn);
      }
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
  const int team_bytes = S::kStages * S::stage_bytes(p.m);
  const int begin = blockIdx.y * p.words_per_split;
  const Warp<S> w{p,
                  lane,
                  in_team,
                  team,
                  static_cast<int>(blockIdx.x) * S::kRows + in_team * S::kWarpRows,
                  begin,
                  min(begin + p.words_per_split, p.words),
                  address + team * team_bytes};
  wait_for_kernel_before();  // nothing global has been touched yet
  let_next_kernel_begin();
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

// Blocks of a cluster that share the columns of their rows. They pay as long as there are
// multiprocessors without a block (H200, 32 rows of x, 4096 x 4096: 23.3 us with one, 16.7 with
// two, 15.0 with four of four turns each). Beyond one block a multiprocessor they do with turns
// enough to make up for adding the sums, which takes 1.5 us (16 rows of x: 4096 x 4096 8.5 us with
// one, 10.1 with two of four turns; 4096 x 14336 24.5 with one, 23.8 with two of 14; 32 rows 43.1
// with four, 40.0 with eight of seven).
template <class S>
int splits_of(const Problem& p, const Device& device) {
  if (device.major < 9) return 1;
  const int blocks = (p.rows + S::kRows - 1) / S::kRows;
  const int turns = (p.words + S::kTurnWords - 1) / S::kTurnWords;
  const auto pay = [&](int splits) {
    if (splits * blocks <= device.processors) return turns >= 2 * splits;
    return splits * blocks <= S::kBlocks * device.processors && turns >= 6 * splits;
  };
  int splits = 1;
  while (2 * splits <= kMostSplits && pay(2 * splits)) splits *= 2;
  return splits;
}

template <class T, class S>
cudaError_t launch_shape(Problem p, const Device& device, cudaStream_t stream) {
  const auto kernel = linear_24_kernel<T, S>;
  const int bytes = S::shared_bytes(p.m), splits = splits_of<S>(p, device);
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
  if (device.major >= 9) add_overlap(config, attributes);
  return cudaLaunchKernelEx(&config, kernel, p);
}

// Up to kMost rows of x: `Many` where W has so many rows that its blocks occupy three quarters of
// the device, `Few` else, and `Small` where shared memory has no room for either.
template <int kMost, class Many, class Few, class Small, class T>
cudaError_t launch_fitting(const Problem& p, const Device& device, cudaStream_t stream) {
  static_assert(Small::shared_bytes(kMost) <= kLeastBlockShared);
  static_assert(kMost <= kTileTokens * Many::kTiles && kMost <= kTileTokens * Few::kTiles &&
                kMost <= kTileTokens * Small::kTiles);
  const int blocks = (p.rows + Many::kRows - 1) / Many::kRows;
  const bool many = 4 * blocks >= 3 * Many::kBlocks * device.processors;
  if (many && Many::shared_bytes(p.m) <= device.block_shared)
    return launch_shape<T, Many>(p, device, stream);
  if (Few::shared_bytes(p.m) <= device.block_shared) return launch_shape<T, Few>(p, device, stream);
  return launch_shape<T, Small>(p, device, stream);
}

// Each the best, or within 4 % of it, of the shapes that were timed on an H200, three to fourteen
// for a number of rows of x. us, W out of memory:
//
//   rows of x | Many: 14336 x 4096  28672 x 8192 | Few: 4096 x 4096  4096 x 14336
//   ----------|----------------------------------|-------------------------------
//       1     |           18.8          65.5     |         6.2          17.1
//       4     |          below those of 8        |         7.6          17.6
//       8     |           19.0          66.5     |         8.2          19.0
//      16     |           19.9          72.5     |         8.5          23.8
//      32     |           25.7          91.9     |        15.0          38.7
//      64     |           38.6         134.6     |        22.4          60.7
//
// More rows a block means less of x to read, but blocks enough only if W has many rows: for one row
// of x and 4096 x 4096 Many takes 10.8 us.
template <class T>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
  Device device;
  const cudaError_t status = query_device(device);
  if (status != cudaSuccess) return status;
  using Many8 = Shape<1, 2, 2, 4, 2, 2, 2>;
  using Few2 = Shape<1, 1, 1, 8, 4, 2, 2>;
  using Few4 = Shape<1, 1, 1, 8, 2, 3, 3>;
  using Few8 = Shape<1, 1, 2, 4, 2, 3, 3>;
  using Many16 = Shape<2, 1, 4, 2, 2, 3, 2>;
  using Few16 = Shape<2, 1, 2, 4, 2, 3, 2>;
  using Many32 = Shape<4, 2, 4, 2, 2, 4, 1>;
  using Few32 = Shape<4, 2, 4, 2, 2, 2, 2>;
  using Small32 = Shape<4, 2, 4, 1, 2, 3, 1>;  // not timed
  using Many64 = Shape<8, 2, 4, 2, 2, 3, 1>;
  using Few64 = Shape<8, 2, 4, 1, 2, 3, 2>;
  using Small64 = Shape<8, 2, 4, 1, 2, 2, 1>;  // not timed
  if (p.m <= 2) return launch_fitting<2, Many8, Few2, Few2, T>(p, device, stream);
  if (p.m <= 4) return launch_fitting<4, Many8, Few4, Few4, T>(p, device, stream);
  if (p.m <= 8) return launch_fitting<8, Many8, Few8, Few8, T>(p, device, stream);
  if (p.m <= 16) return launch_fitting<16, Many16, Few16, Many16, T>(p, device, stream);
  if (p.m <= 32) return launch_fitting<32, Many32, Few32, Small32, T>(p, device, stream);
  return launch_fitting<64, Many64, Few64, Small64, T>(p, device, stream);
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
                  0};
  if (a.y.dtype == DType::bf16) return launch<__nv_bfloat16>(p, stream);
  if (a.y.dtype == DType::f16) return launch<__half>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pyprune
