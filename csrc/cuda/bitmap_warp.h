// What a warp does in the bitmap products: it finds where the values of a turn lie, copies them to
// shared memory, expands them in registers and multiplies. linear_bitmap.cu has the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/bitmap_lanes.h"

namespace pyprune::bitmap_warp {

using namespace bitmap_lanes;

constexpr int kMaxWarps = 8;
constexpr int kParts = 3;  // bf16 numbers that an fp32 one is the sum of

// How a warp works.
//   kTokens    rows of x as the tensor cores see them, a power of two, 1 to 16
//   kSegments  see bitmap_lanes.h
//   kTurns     turns on different rows of W that share what a warp holds of x: with 8 rows, 16 rows
//              of W would read about as many bytes of x, though from the second-level cache, as of
//              W
//   kStages    turns in shared memory: one being expanded, the others arriving
//   kBlocks    a multiprocessor, which bounds the registers
template <int kTokens_, int kSegments_, int kTurns_, int kStages_, int kBlocks_>
struct Shape {
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kTokens = kTokens_, kSegments = kSegments_, kTurns = kTurns_;
  using L = Lanes<kSegments>;
  static constexpr int kTiles = (kTokens + L::kTokens - 1) / L::kTokens;  // instructions a step
  static_assert((kTurns == 1 || kTurns == 2) && (kStages == 2 || kStages == 3));
  static constexpr int kWarpRows = kTurns * L::kRows;
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
// The same or, reading nothing, zeros.
__device__ __forceinline__ void copy_or_clear(uint32_t to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(inside ? kChunkBytes : 0)
               : "memory");
}
// The first `values` of eight 16-bit values and zeros, one by one. An asynchronous copy of fewer
// than 16 bytes would do it, too, but the hardware makes it of a read of all 16 (the length is in
// the low bits of the address), which compute-sanitizer reports if they leave the allocation.
__device__ __forceinline__ void copy_values_singly(uint32_t to, const void* from, uint32_t values) {
  const uint16_t* v = static_cast<const uint16_t*>(from);
#pragma unroll 1
  for (uint32_t i = 0; i < kChunkValues; ++i) {
    const uint16_t value = i < values ? __ldg(v + i) : uint16_t{0};
    asm volatile("st.shared.u16 [%0], %1;" : : "r"(to + 2 * i), "h"(value) : "memory");
  }
}
__device__ __forceinline__ void close_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kOpen>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kOpen) : "memory");
}

// kSpread where the compiler cannot see it: it knows what a literal, a parameter or a shuffle of
// either is worth, and would rather load it again, 16 times a turn, than keep it.
__device__ const uint32_t kHiddenSpread = kSpread;

__device__ __forceinline__ uint32_t load_spread() {
  uint32_t spread;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(spread) : "l"(&kHiddenSpread));
  return spread;
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

// counts[row * along_columns + slab] = stored values of each of the block's rows in each slab, so
// that every warp of a row knows where its own begin. A thread or a few have one row and slab each.
template <class S>
__device__ inline void count_slabs(const Problem& p, int64_t block_row, int* counts) {
  constexpr int kCounters = 2 * S::kSegments / S::kTurns;  // threads for one row and slab
  const int pair = threadIdx.x / kCounters, counter = threadIdx.x % kCounters;
  const int64_t row = min(block_row + pair / p.along_columns, p.rows - int64_t{1});
  const int slab = pair % p.along_columns;
  const int begin = S::L::words_before(slab * p.slab_turns, p.words);
  const int end = S::L::words_before((slab + 1) * p.slab_turns, p.words);
  int sum = count_words<kCounters>(p.bitmap + row * p.words + begin, counter, end - begin,
                                   p.words % 4 == 0);
#pragma unroll
  for (int d = 1; d < kCounters; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
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

  // Starts copying the chunks that `count` values from number `at` lie in to `row`.
  //
  // No read leaves the values, whatever row_offsets and bits say: `at` is any number of 32 bits,
  // but a chunk is read whole only if its number is below that of the first that is not whole; of
  // this one the values alone are read, and past it nothing. (Nor does a copy leave the row:
  // `count` was counted in the bits, so it is no more than the row's columns.)
  __device__ __forceinline__ void copy_values(uint32_t row, uint32_t at, uint32_t count) const {
    const uint32_t first = at / kChunkValues;
    const uint32_t chunks = chunks_of(at % kChunkValues, count);
    const uint4* from = p.chunks + (first + place);
    uint32_t to = shared + row + place * kChunkBytes;
    asm volatile("" : "+l"(from), "+r"(to));  // else they are computed anew for every copy
    const int own = static_cast<int>(chunks) - place;
    if (chunks_whole(first, chunks, p.values)) {
#pragma unroll
      for (int k = 0; k < L::kCopies; ++k)
        if (own > k * L::kAcross)
          copy_chunk(to + k * L::kAcross * kChunkBytes, from + k * L::kAcross);
    } else {
#pragma unroll 1
      for (int k = 0; k < L::kCopies * L::kAcross && own > k; k += L::kAcross) {
        const uint32_t held = chunk_values(first + place + k, p.values);
        if (held == kChunkValues)
          copy_chunk(to + k * kChunkBytes, from + k);
        else
          copy_values_singly(to + k * kChunkBytes, from + k, held);
      }
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
  __device__ __forceinline__ void expand_step(uint32_t spread, const Bits& bits, int step,
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
      const uint32_t selectors = __shfl_sync(~0u, nibble_selectors, bits);  // of its five low bits
      uint32_t pair[2];
      expand(spread, selectors, w, at, bits, pair);
      a[half] = pair[0];
      a[2 + half] = pair[1];
    }
  }

  __device__ __forceinline__ void multiply(uint32_t spread, const Bits& bits,
                                           const uint32_t (&x)[kSteps][S::kTiles][2],
                                           float (&sum)[S::kTiles][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      expand_step(spread, bits, step, a);
#pragma unroll
      for (int tile = 0; tile < S::kTiles; ++tile) mma<T>(sum[tile], a, x[step][tile]);
    }
  }

  template <int kTurn>
  __device__ __forceinline__ void turn(uint32_t spread, int item, uint2& words,
                                       Bits (&bits)[S::kStages],
                                       const uint32_t (&x)[kSteps][S::kTiles][2],
                                       float (&sum)[S::kTiles][4]) {
    constexpr int kAhead = S::kStages - 1;
    bits[kAhead] = fetch<(kTurn + kAhead) % S::kTurns>(words);
    words = load_words<(kTurn + kAhead + 1) % S::kTurns>(item + kAhead + 1);
    wait_copies<kAhead>();
    __syncwarp();  // what other lanes have copied is there
    multiply(spread, bits[0], x, sum);
    __syncwarp();  // all lanes have read it: the next copies may overwrite it
#pragma unroll
    for (int i = 0; i < kAhead; ++i) bits[i] = bits[i + 1];
  }

  __device__ __forceinline__ void run(float (&sum)[S::kTurns][S::kTiles][4]) {
    constexpr int kSecond = 1 % S::kTurns;
    const uint32_t spread = load_spread();
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
      turn<0>(spread, item, words, bits, x, sum[0]);
      if constexpr (S::kTurns > 1) turn<1>(spread, item + 1, words, bits, x, sum[1]);
    }
    wait_copies<0>();
  }
};

}  // namespace pyprune::bitmap_warp
