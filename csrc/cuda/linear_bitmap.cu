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
// int8 values are not taken: at 5 bits an element their bytes arrive 1.8 times as fast, which the
// counts above do not allow, and widening them would come on top.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/bitmap_lanes.h"
#include "cuda/block_sums.h"
#include "cuda/linear_bitmap.h"
#include "cuda/overlap.h"

namespace pyprune {
namespace {

using namespace bitmap_lanes;

constexpr int kMaxWarps = 8;
constexpr int kParts = 3;  // bf16 numbers that an fp32 one is the sum of

// How a warp works.
//   kTokens    rows of x as the tensor cores see them, a power of two, 1 to 16
//   kSegments  see bitmap_lanes.h
//   kTurns     turns on different rows of W that share what a warp holds of x: with 8 rows, 16 rows
//              of W would read about as many bytes of x, though from the second-level cache, as of
//              W
template <int kTokens_, int kSegments_, int kTurns_, int kStages_ = 3, int kBlocks_ = 2,
          bool kLookUp_ = true>
struct Shape {
  static constexpr bool kLookUp = kLookUp_;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kTokens = kTokens_, kSegments = kSegments_, kTurns = kTurns_;
  using L = Lanes<kSegments>;
  static constexpr int kTiles = (kTokens + L::kTokens - 1) / L::kTokens;  // instructions a step
  static_assert((kTurns == 1 || kTurns == 2) && (kStages == 2 || kStages == 3));
  static constexpr int kWarpRows = kTurns * L::kRows;
  // Threads that count the bits of one row and slab, see count_slabs().
  static constexpr int kCounters = 2 * kSegments / kTurns;
};

struct Problem {
  void* y;
  const void* x;
  const uint4* chunks;
  const uint32_t* bitmap;
  const int64_t* row_offsets;
  const float* bias;
  uint32_t values;
  int m, rows, cols, words;  // words of 32 columns
  // A block's warps: along_rows next to each other in rows; along_columns share a row, each having
  // a slab of slab_turns turns.
  int along_rows, along_columns, slab_turns;
  bool prefetch;
};

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// Sixteen bytes, past the first-level cache: they are read once.
__device__ __forceinline__ void copy_chunk(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;"
               :
               : "r"(to), "l"(from)
               : "memory");
}
// The first `bytes` of them and zeros.
__device__ __forceinline__ void copy_part(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kOpen) : "memory");
}

// The constants of expand() where the compiler cannot see them: it knows what a literal, a
// parameter or a shuffle of either is worth, and would rather load it again, 32 times a turn, than
// keep it.
__device__ const Tables kTables = {};

__device__ __forceinline__ Tables load_tables() {
  Tables t;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(t.low) : "l"(&kTables.low));
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(t.spread) : "l"(&kTables.spread));
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(t.twice) : "l"(&kTables.twice));
  return t;
}

__device__ __forceinline__ void load_window(uint32_t at, uint32_t (&w)[3]) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w[0]) : "r"(at) : "memory");
  asm volatile("ld.shared.u32 %0, [%1+4];" : "=r"(w[1]) : "r"(at) : "memory");
  asm volatile("ld.shared.u32 %0, [%1+8];" : "=r"(w[2]) : "r"(at) : "memory");
}

__device__ __forceinline__ void load_pair(uint32_t at, uint32_t (&b)[2]) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(b[0]), "=r"(b[1]) : "r"(at) : "memory");
}

// Set bits of words first, first + step, ... below n (whole vectors where rows are aligned so).
template <int kStep>
__device__ inline int count_words(const uint32_t* row, int first, int n, bool vectors) {
  int sum = 0;
  if (vectors) {
    const uint4* quads = reinterpret_cast<const uint4*>(row);
#pragma unroll 8
    for (int k = first; k < n / 4; k += kStep) {
      const uint4 q = __ldg(quads + k);
      sum += count_bits(q.x) + count_bits(q.y) + count_bits(q.z) + count_bits(q.w);
    }
  } else {
#pragma unroll 8
    for (int k = first; k < n; k += kStep) sum += count_bits(__ldg(row + k));
  }
  return sum;
}

// Asks the second-level cache for the block's bits and its first values. Offsets may be read that
// are about to change: they are held within the values.
__device__ inline void prefetch_rows(const Problem& p, int64_t block_row, int rows) {
  constexpr uint32_t kMostBytes = 64 * 1024;
  if (threadIdx.x != 0) return;
  const int64_t end_row = min(block_row + rows, p.rows + int64_t{0});
  const uint32_t bits = static_cast<uint32_t>(end_row - block_row) * p.words * 4;
  prefetch_bytes(p.bitmap + block_row * p.words, p.words % 4 == 0 ? min(bits, kMostBytes) : 0);
  const int64_t chunks = p.values / kChunkValues;
  const int64_t begin =
      max(min(__ldcg(p.row_offsets + block_row) / kChunkValues, chunks), int64_t{0});
  const int64_t end = max(min(__ldcg(p.row_offsets + end_row) / kChunkValues, chunks), begin);
  prefetch_bytes(p.chunks + begin,
                 static_cast<uint32_t>(min((end - begin) * kChunkBytes, int64_t{kMostBytes})));
}

// counts[row * along_columns + slab] = stored values of each of the block's rows in each slab, so
// that every warp of a row knows where its own begin. A thread or a few have one row and slab each.
template <class S>
__device__ inline void count_slabs(const Problem& p, int64_t block_row, int* counts) {
  const int pair = threadIdx.x / S::kCounters, counter = threadIdx.x % S::kCounters;
  const int64_t row = min(block_row + pair / p.along_columns, p.rows - int64_t{1});
  const int slab = pair % p.along_columns;
  const int slab_words = p.slab_turns * S::L::kWords;
  const int begin = min(slab * slab_words, p.words), end = min(begin + slab_words, p.words);
  int sum = count_words<S::kCounters>(p.bitmap + row * p.words + begin, counter, end - begin,
                                      p.words % 4 == 0);
#pragma unroll
  for (int d = 1; d < S::kCounters; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (counter == 0) counts[pair] = sum;
}

// v and that of the lane `d` below among kWidth, where there is one: the shuffle says so itself.
template <int kWidth>
__device__ __forceinline__ uint32_t add_from_below(uint32_t v, int d) {
  asm volatile(
      "{\n\t.reg .pred p;\n\t.reg .u32 r;\n\t"
      "shfl.sync.up.b32 r|p, %0, %1, %2, 0xffffffff;\n\t@p add.u32 %0, %0, r;\n\t}"
      : "+r"(v)
      : "r"(d), "n"((32 - kWidth) << 8));
  return v;
}

// A turn's bits as a lane has them: its words, and at which byte of the warp's stages the values of
// each begin.
struct Bits {
  uint32_t word[2];
  uint32_t before;
};

template <class T, class X, class S>
struct Warp {
  using L = typename S::L;

  const Problem& p;
  const int lane, place;
  const int first_turn, items;  // an item is a turn on one of kTurns groups of rows
  const int end_word;
  const uint32_t shared;             // its address
  const uint32_t first_stage;        // where in it the warp's turns are, in bytes
  uint32_t stage;                    // and the one to fill next
  uint32_t row_words[S::kTurns][2];  // where the bits of this lane's rows begin, its place included
  uint32_t position[S::kTurns][2];   // the number of their next value
  const uint32_t nibble_selectors;   // of the lane's number

  // The bits of an item; none past the last. kTurn: which of the groups of rows it is on.
  template <int kTurn>
  __device__ __forceinline__ uint2 load_words(int item) const {
    const int word = (first_turn + item / S::kTurns) * L::kWords;
    if (word + place >= end_word) return make_uint2(0, 0);
    return make_uint2(__ldg(p.bitmap + (row_words[kTurn][0] + word)),
                      __ldg(p.bitmap + (row_words[kTurn][1] + word)));
  }

  // Starts copying the chunks that `count` values from number `at` lie in to `row`. Offsets that
  // contradict the bits must not lead outside the values, whose last chunk may be partly filled.
  __device__ __forceinline__ void copy_values(uint32_t row, uint32_t at, uint32_t count) const {
    const uint32_t first = at / kChunkValues;
    const uint32_t chunks = chunks_of(at % kChunkValues, count);
    const uint4* from = p.chunks + (first + place);
    uint32_t to = shared + row + place * kChunkBytes;
    asm volatile("" : "+l"(from), "+r"(to));  // else they are computed anew for every copy
    const int own = static_cast<int>(chunks) - place;
    if (first + chunks <= p.values / kChunkValues) {
#pragma unroll
      for (int k = 0; k < L::kCopies; ++k)
        if (own > k * L::kAcross)
          copy_chunk(to + k * L::kAcross * kChunkBytes, from + k * L::kAcross);
    } else {
#pragma unroll 1
      for (int k = 0; k < L::kCopies; ++k)
        if (own > k * L::kAcross)
          copy_part(to + k * L::kAcross * kChunkBytes, from + k * L::kAcross,
                    chunk_bytes(first + place + k * L::kAcross, p.values));
    }
  }

  // Finds where an item's values are and starts copying them.
  template <int kTurn>
  __device__ __forceinline__ Bits fetch(uint2 words) {
    const uint32_t own = pack_counts(count_bits(words.x), count_bits(words.y));
    uint32_t sum = own;
#pragma unroll
    for (int d = 1; d < L::kAcross; d *= 2) sum = add_from_below<L::kAcross>(sum, d);
    const uint32_t all = __shfl_sync(~0u, sum, L::kAcross - 1, L::kAcross);
    uint32_t start[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t& at = position[kTurn][half];
      const uint32_t row = stage + L::row_of(lane, half) * L::kRowBytes;
      start[half] = row - first_stage + 2 * (at % kChunkValues);
      copy_values(row, at, unpack_count(all, half));
      at += unpack_count(all, half);
    }
    close_copies();
    stage = stage == first_stage + (S::kStages - 1) * L::kTurnBytes ? first_stage
                                                                    : stage + L::kTurnBytes;
    return {{words.x, words.y}, 2 * (sum - own) + pack_counts(start[0], start[1])};
  }

  // The B fragments of a turn's columns: of every step and tile four elements of this lane's row of
  // x, zeros outside.
  __device__ __forceinline__ void load_x(int turn, uint32_t (&x)[kSteps][S::kTiles][2]) const {
    if constexpr (!std::is_same_v<X, float>) {
      // All of it inside, as but for the last turn of some widths: no address needs a question.
      if ((turn + 1) * L::kColumns <= p.cols && p.m == S::kTokens) {
#pragma unroll
        for (int tile = 0; tile < S::kTiles; ++tile) {
          const int token = tile * L::kTokens + L::token_of(lane);
          const X* from = static_cast<const X*>(p.x) + static_cast<int64_t>(token) * p.cols +
                          turn * L::kColumns + L::column_of(0, place);
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            const uint2 v = __ldg(reinterpret_cast<const uint2*>(from + L::column_of(step, 0)));
            x[step][tile][0] = v.x;
            x[step][tile][1] = v.y;
          }
        }
        return;
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) {
        const int token = tile * L::kTokens + L::token_of(lane);
        const int column = turn * L::kColumns + L::column_of(step, place);
        uint32_t (&b)[2] = x[step][tile];
        b[0] = b[1] = 0;
        if constexpr (std::is_same_v<X, float>) {
          const int row = token / kParts, part = token % kParts;
          if (row < p.m && column < p.cols) {
            const float4 v = __ldg(reinterpret_cast<const float4*>(
                static_cast<const float*>(p.x) + static_cast<int64_t>(row) * p.cols + column));
            b[0] = bf16_part(v.x, part) | bf16_part(v.y, part) << 16;
            b[1] = bf16_part(v.z, part) | bf16_part(v.w, part) << 16;
          }
        } else if (token < p.m && column < p.cols) {
          const uint2 v = __ldg(reinterpret_cast<const uint2*>(
              static_cast<const X*>(p.x) + static_cast<int64_t>(token) * p.cols + column));
          b[0] = v.x;
          b[1] = v.y;
        }
      }
  }

  // The A fragment of a step.
  __device__ __forceinline__ void expand_step(const Tables& tables, const Bits& bits, int step,
                                              uint32_t (&a)[4]) const {
    const int owner = L::owner_of(step, place), shift = L::shift_of(step, place);
    const uint32_t before = __shfl_sync(~0u, bits.before, owner, L::kAcross);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = __shfl_sync(~0u, bits.word[half], owner, L::kAcross);
      const uint32_t at = position_of(word, shift, unpack_count(before, half));
      const uint32_t bits = word >> shift;
      uint32_t w[3];
      load_window(shared + first_stage + (at & ~3u), w);
      uint32_t selectors;
      if constexpr (S::kLookUp)
        selectors = __shfl_sync(~0u, nibble_selectors, bits);  // of its five low bits
      else
        selectors = selectors_of(tables, bits);
      uint32_t pair[2];
      expand(tables, selectors, w, at, bits, pair);
      a[half] = pair[0];
      a[2 + half] = pair[1];
    }
  }

  __device__ __forceinline__ void multiply(const Tables& tables, const Bits& bits,
                                           const uint32_t (&x)[kSteps][S::kTiles][2],
                                           float (&sum)[S::kTiles][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      expand_step(tables, bits, step, a);
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) mma<T>(sum[tile], a, x[step][tile]);
    }
  }

  template <int kTurn>
  __device__ __forceinline__ void turn(const Tables& tables, int item, uint2& words,
                                       Bits (&bits)[S::kStages],
                                       const uint32_t (&x)[kSteps][S::kTiles][2],
                                       float (&sum)[S::kTiles][4]) {
    constexpr int kAhead = S::kStages - 1;
    bits[kAhead] = fetch<(kTurn + kAhead) % S::kTurns>(words);
    words = load_words<(kTurn + kAhead + 1) % S::kTurns>(item + kAhead + 1);
    wait_copies<kAhead>();
    __syncwarp();  // what other lanes have copied is there
    multiply(tables, bits[0], x, sum);
    __syncwarp();  // all lanes have read it: the next copies may overwrite it
#pragma unroll
    for (int i = 0; i < kAhead; ++i) bits[i] = bits[i + 1];
  }

  __device__ __forceinline__ void run(float (&sum)[S::kTurns][S::kTiles][4]) {
    constexpr int kSecond = 1 % S::kTurns;
    const Tables tables = load_tables();
    Bits bits[S::kStages];
    const uint2 words0 = load_words<0>(0);
    uint2 words = load_words<kSecond>(1);
    if constexpr (S::kStages == 2) {
      bits[0] = fetch<0>(words0);
    } else {
      const uint2 words1 = words;
      words = load_words<0>(2);
      bits[0] = fetch<0>(words0);
      bits[1] = fetch<kSecond>(words1);
    }
    for (int item = 0; item < items; item += S::kTurns) {
      uint32_t x[kSteps][S::kTiles][2];
      load_x(first_turn + item / S::kTurns, x);
      turn<0>(tables, item, words, bits, x, sum[0]);
      if constexpr (S::kTurns > 1) turn<1>(tables, item + 1, words, bits, x, sum[1]);
    }
    wait_copies<0>();
  }
};

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
  if (p.prefetch) prefetch_rows(p, block_row, p.along_rows * S::kWarpRows);
  wait_for_kernel_before();
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
                  min(end * L::kWords, p.words),
                  static_cast<uint32_t>(__cvta_generic_to_shared(shared)),
                  first_stage,
                  first_stage,
                  {},
                  {},
                  selectors_of(Tables(), lane)};
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
  using S = Shape<kTiles * kTileColumns, 1, 1, 2>;
  using L = typename S::L;
  static constexpr int kThreads = 32 * kMaxWarps;
  static constexpr int kRows = kMaxWarps * L::kRows;
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
      copy_part(to + token * kXRow + wide_x_piece(token, piece) * kChunkBytes, from,
                inside ? kChunkBytes : 0);
    }
  }
};

template <class T, int kTiles>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) linear_bitmap_wide_kernel(const Problem p) {
  using W = Wide<kTiles>;
  using S = typename W::S;
  using L = typename W::L;
  extern __shared__ __align__(16) char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = L::place_of(lane);
  const int64_t block_row = static_cast<int64_t>(blockIdx.x) * W::kRows;
  if (p.prefetch && blockIdx.y == 0) prefetch_rows(p, block_row, W::kRows);
  wait_for_kernel_before();
  let_next_kernel_begin();
  const int turns = (p.words + L::kWords - 1) / L::kWords;
  const int begin = min(static_cast<int>(blockIdx.y) * p.slab_turns, turns);
  const int end = min(begin + p.slab_turns, turns);
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t first_stage = warp * S::kStages * L::kTurnBytes;
  Warp<T, T, S> w{
      p,       lane,        place,       begin, end - begin, min(end * L::kWords, p.words),
      address, first_stage, first_stage, {},    {},          selectors_of(Tables(), lane)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = block_row + warp * L::kRows + L::row_of(lane, half);
    // Rows past the matrix repeat its last one; their sums are not stored.
    const int r = static_cast<int>(min(row, p.rows - int64_t{1}));
    // The lanes of a row count what lies in front of the block's columns.
    const uint32_t* bits = p.bitmap + static_cast<int64_t>(r) * p.words;
    int before = count_words<L::kAcross>(bits, place, begin * L::kWords, p.words % 4 == 0);
#pragma unroll
    for (int d = 1; d < L::kAcross; d *= 2) before += __shfl_xor_sync(~0u, before, d);
    w.row_words[0][half] = static_cast<uint32_t>(r) * p.words + place;
    w.position[0][half] = static_cast<uint32_t>(__ldg(p.row_offsets + r)) + before;
  }

  const Tables tables = load_tables();
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
      w.expand_step(tables, bits, step, a);
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

// Eight warps a block where shared memory has room for them, four where it has not (compute
// capability 12.0: 99 KB).
template <class S>
size_t shared_bytes(int warps) {
  return static_cast<size_t>(warps) * S::kStages * S::L::kTurnBytes + S::L::kPadBytes;
}

template <class T, class X, class S>
cudaError_t launch(Problem p, cudaStream_t stream, bool overlap = true) {
  int device, most, major;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const int warps =
      shared_bytes<S>(kMaxWarps) <= static_cast<size_t>(most) ? kMaxWarps : kMaxWarps / 2;
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  p.prefetch = overlap && major >= 9;
  p.along_rows = S::kSegments < warps ? S::kSegments : warps;
  p.along_columns = warps / p.along_rows;
  const int turns = (p.words + S::L::kWords - 1) / S::L::kWords;
  p.slab_turns = (turns + p.along_columns - 1) / p.along_columns;
  const auto kernel = linear_bitmap_kernel<T, X, S>;
  const size_t bytes = shared_bytes<S>(warps);
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(bytes));
  if (status != cudaSuccess) return status;
  // Room for two blocks; what is left caches x.
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
  if (p.prefetch) add_overlap(config, attributes);
  return cudaLaunchKernelEx(&config, kernel, p);
}

// splits 0: as many blocks share a row's columns as fill the device, each with four turns or more.
template <class T, int kTiles>
cudaError_t launch_wide(Problem p, cudaStream_t stream, bool overlap = true, int splits = 0) {
  using W = Wide<kTiles>;
  int device, processors, major;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status != cudaSuccess) return status;
  const auto kernel = linear_bitmap_wide_kernel<T, kTiles>;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, W::kBytes);
  if (status != cudaSuccess) return status;
  const int blocks = (p.rows + W::kRows - 1) / W::kRows;
  const int turns = (p.words + W::L::kWords - 1) / W::L::kWords;
  if (splits == 0) {
    splits = 1;
    while (major >= 9 && 2 * splits <= kMostSplits && 2 * splits * blocks <= 2 * processors &&
           turns >= 4 * 2 * splits)
      splits *= 2;
  }
  p.prefetch = overlap && major >= 9;
  p.slab_turns = (turns + splits - 1) / splits;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, splits);
  config.blockDim = dim3(W::kThreads);
  config.dynamicSmemBytes = W::kBytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  add_cluster(config, attributes);
  if (p.prefetch) add_overlap(config, attributes);
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class T>
cudaError_t launch_16_bit(const Problem& p, cudaStream_t stream) {
  if (p.m <= 1) return launch<T, T, Shape<1, 8, 1, 2, 3>>(p, stream);
  if (p.m <= 2) return launch<T, T, Shape<2, 4, 1, 2, 3>>(p, stream);
  if (p.m <= 4) return launch<T, T, Shape<4, 2, 1, 2, 3>>(p, stream);
  if (p.m <= 8) return launch<T, T, Shape<8, 1, 2>>(p, stream);
  if (p.m <= 16) return launch<T, T, Shape<16, 1, 2>>(p, stream);
  if (p.m <= 32) return launch_wide<T, 4>(p, stream);
  return launch_wide<T, 8>(p, stream);
}

cudaError_t launch_fp32(const Problem& p, cudaStream_t stream) {
  const int tokens = kParts * p.m;
  if (tokens <= 4) return launch<__nv_bfloat16, float, Shape<4, 2, 1>>(p, stream);
  if (tokens <= 8) return launch<__nv_bfloat16, float, Shape<8, 1, 2>>(p, stream);
  return launch<__nv_bfloat16, float, Shape<16, 1, 2>>(p, stream);
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
  if (a.x.dtype == DType::bf16) return launch_16_bit<__nv_bfloat16>(p, stream);
  if (a.x.dtype == DType::f16) return launch_16_bit<__half>(p, stream);
  if (a.x.dtype == DType::f32) return launch_fp32(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace pyprune
