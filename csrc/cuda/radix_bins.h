// Counting keys by digit in a block's shared memory, and finding the digit that holds a rank.
#pragma once

#include <cstdint>

namespace pyprune {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Count>
__device__ inline Count sum_up_to_lane(Count value, int lane) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    const Count below = __shfl_up_sync(kAllLanes, value, d);
    if (lane >= d) value += below;
  }
  return value;
}

struct Place {
  uint32_t digit;  // whose bin holds the rank
  uint32_t rank;   // among that bin's, from 1
  uint32_t count;  // of that bin
};

// What finding needs beside the bins: a count for each 32 of them.
constexpr int kMostBins = 4096;
struct LineCounts {
  uint32_t count[kMostBins / kLanes];
};

// The bin that holds the `rank`-th key (from 1, at most as many as there are). `bins`, of a
// multiple of 32, must be complete: a barrier lies behind the last count. All threads of the block
// call this together and all get the answer; `zeroed`, as many bins of the next digit's, are zero
// then. Whole warps only. The caller may count into `zeroed` at once, and into `bins` after the
// next call.
__device__ inline Place find_place(const uint32_t* bins, uint32_t* zeroed, int count, uint32_t rank,
                                   LineCounts& lines) {
  const int lane = threadIdx.x % kLanes, line_count = count / kLanes;
  for (int line = threadIdx.x / kLanes; line < line_count; line += blockDim.x / kLanes) {
    const uint32_t sum = __reduce_add_sync(kAllLanes, bins[line * kLanes + lane]);
    if (lane == 0) lines.count[line] = sum;
    zeroed[line * kLanes + lane] = 0;
  }
  __syncthreads();
  // Every warp the same: a lane takes neighbouring lines, then neighbouring bins of one line.
  constexpr int kLines = kMostBins / kLanes / kLanes;
  const int per_lane = (line_count + kLanes - 1) / kLanes;
  uint32_t own[kLines], sum = 0;
#pragma unroll
  for (int i = 0; i < kLines; ++i) {
    const int line = lane * per_lane + i;
    own[i] = i < per_lane && line < line_count ? lines.count[line] : 0;
    sum += own[i];
  }
  const uint32_t upto = sum_up_to_lane(sum, lane);
  const int owner = __ffs(__ballot_sync(kAllLanes, upto >= rank)) - 1;
  // The owner's line, and what lies below it.
  uint32_t below = upto - sum;
  int line = lane * per_lane;
#pragma unroll
  for (int i = 0; i + 1 < kLines; ++i)
    if (i + 1 < per_lane && below + own[i] < rank && line == lane * per_lane + i) {
      below += own[i];
      ++line;
    }
  below = __shfl_sync(kAllLanes, below, owner);
  line = __shfl_sync(kAllLanes, line, owner);
  const uint32_t bin = bins[line * kLanes + lane];
  const uint32_t bins_upto = below + sum_up_to_lane(bin, lane);
  const int found = __ffs(__ballot_sync(kAllLanes, bins_upto >= rank)) - 1;
  return {static_cast<uint32_t>(line * kLanes + found),
          rank - __shfl_sync(kAllLanes, bins_upto - bin, found),
          __shfl_sync(kAllLanes, bin, found)};
}

// How a key of 31 bits is cut into digits.
struct Digit {
  int shift, bits;
};
constexpr int kDigits = 3;
constexpr int kHighestBins = 1 << 11;
__host__ __device__ constexpr Digit digit_of(int step) {
  return step == 0 ? Digit{20, 11} : step == 1 ? Digit{10, 10} : Digit{0, 10};
}

}  // namespace pyprune
