// Which weights of a strip the OBS sweep prunes: scores as integer keys, and the three rules that
// choose the smallest of them. All counts are exact and ties go to the lower index.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/cut.h"
#include "cpu/obs_tile.h"
#include "cpu/simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// The bits of a non-negative float order like the float itself, NaN above infinity. Weights that
// must stay pruned get the one key below all others. Differences of keys do not overflow.
constexpr int32_t kPreservedKey = -1;
constexpr int32_t kLargestKey = 0x7ffffffe;

// A vector of keys; comparisons give -1 and 0 per lane.
typedef int32_t Keys __attribute__((vector_size(4 * Vec::kLanes)));
typedef uint32_t UnsignedKeys __attribute__((vector_size(4 * Vec::kLanes)));
typedef int32_t UnalignedKeys __attribute__((vector_size(4 * Vec::kLanes), aligned(4), may_alias));

inline const UnalignedKeys& keys_at(const int32_t* p) {
  return *reinterpret_cast<const UnalignedKeys*>(p);
}
inline UnalignedKeys& keys_at(int32_t* p) { return *reinterpret_cast<UnalignedKeys*>(p); }

inline bool any(const Keys& mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t bits = 0;
  for (int i = 0; i < Vec::kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// keys[c][lane] of the scores |w scale_c|, w as [cols][lanes].
inline void score_keys(const float* w, const float* scale, int64_t cols, int lanes, int32_t* keys) {
  for (int64_t c = 0; c < cols; ++c) {
    const Vec factor = Vec::set1(scale[c]);
    for (int l = 0; l < lanes; l += Vec::kLanes) {
      const Vec score = Vec::abs(Vec::load(w + c * lanes + l) * factor);
      Keys key;
      static_assert(sizeof key == sizeof score, "same lanes");
      std::memcpy(&key, &score, sizeof key);
      keys_at(keys + c * lanes + l) = key < kLargestKey ? key : Keys{} + kLargestKey;
    }
  }
}

// Sets pruned[i] where fewer than `prune` of the group's M keys come before key i.
template <int M>
inline void prune_group(const int32_t* keys, int lanes, int32_t prune, int32_t* pruned) {
  for (int l = 0; l < lanes; l += Vec::kLanes) {
    Keys key[M], rank[M] = {};
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) key[i] = keys_at(keys + i * lanes + l);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
      for (int j = i + 1; j < M; ++j) {
        const Keys before = key[j] < key[i];
        rank[i] -= before;
        rank[j] += before + 1;
      }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) keys_at(pruned + i * lanes + l) = rank[i] < prune;
  }
}

// The same for any group size.
inline void prune_group(const int32_t* keys, int64_t m, int lanes, int32_t prune, int32_t* pruned) {
  if (m == 4) return prune_group<4>(keys, lanes, prune, pruned);
  if (m == 8) return prune_group<8>(keys, lanes, prune, pruned);
  for (int l = 0; l < lanes; l += Vec::kLanes)
    for (int64_t i = 0; i < m; ++i) {
      const Keys key = keys_at(keys + i * lanes + l);
      Keys rank = {};
      for (int64_t j = 0; j < i; ++j) rank -= keys_at(keys + j * lanes + l) <= key;
      for (int64_t j = i + 1; j < m; ++j) rank -= keys_at(keys + j * lanes + l) < key;
      keys_at(pruned + i * lanes + l) = rank < prune;
    }
}

// pruned = key <= bound.
inline void prune_up_to(const int32_t* keys, int64_t cols, int lanes, int32_t bound,
                        int32_t* pruned) {
  for (int64_t i = 0; i < cols * lanes; i += Vec::kLanes)
    keys_at(pruned + i) = keys_at(keys + i) <= bound;
}

// One vector of rows: threshold and ties such that pruning the keys below `threshold` and the
// first `ties` keys equal to it prunes exactly k per lane. The threshold is found bit by bit; a
// lane is done as soon as some value has exactly k keys below it.
inline void row_thresholds(const int32_t* keys, int64_t cols, int lanes, const Keys& k,
                           Keys& threshold, Keys& ties) {
  const Keys none = k <= 0, all = k >= static_cast<int32_t>(cols);
  threshold = all & kLargestKey;
  ties = all & kLargestKey;
  Keys open = ~(none | all);
  for (int bit = 30; bit >= 0; --bit) {
    if (!any(open)) return;
    const Keys trial = threshold | (open & (1 << bit));
    Keys below = {};
    for (int64_t c = 0; c < cols; ++c) below -= keys_at(keys + c * lanes) < trial;
    const Keys accept = open & (below <= k);
    threshold = (accept & trial) | (~accept & threshold);
    open &= below != k;
  }
  Keys below = {};
  for (int64_t c = 0; c < cols; ++c) below -= keys_at(keys + c * lanes) < threshold;
  ties = (open & (k - below)) | (~open & ties);
}

// pruned = key < threshold, or among the first `ties` keys equal to it, per lane in column order.
inline void prune_below(const int32_t* keys, int64_t cols, int lanes, const Keys& threshold,
                        const Keys& ties, int32_t* pruned) {
  Keys seen = {};
  for (int64_t c = 0; c < cols; ++c) {
    const Keys key = keys_at(keys + c * lanes), tie = key == threshold;
    keys_at(pruned + c * lanes) = (key < threshold) | (tie & (seen < ties));
    seen -= tie;
  }
}

// The cut of one block of columns over all its strips, found by a team of threads. A sample
// brackets it, for every thread to work out rather than wait for; each strip copies out its keys
// within the bracket, and the cut is searched among those.
class BlockCut {
 public:
  // Keys that a strip adds to the sample.
  static constexpr int kSampled = 64;

  // `keys`: strips of up to `strip_keys`, `rows` rows in all.
  BlockCut(const Deal& deal, int64_t strip_keys)
      : deal_(deal),
        stride_(strip_keys + kSlack),
        sample_(deal.strips * kSampled),
        inside_(deal, stride_),
        joined_(deal.strips * stride_),
        scratch_(2 * deal.strips * stride_),
        sample_scratch_(deal.threads, 2 * (deal.strips * kSampled + kSlack)),
        count_(deal.strips),
        below_(deal.strips) {}

  // Strip s: `rows` of its `lanes` rows are there. The keys of the others become the largest.
  void add(int64_t s, int32_t* keys, int64_t cols, int lanes, int rows) const {
    for (int64_t c = 0; rows < lanes && c < cols; ++c)
      std::fill(keys + c * lanes + rows, keys + (c + 1) * lanes, kLargestKey);
    // Rows and columns with no small period in common with what is in them.
    for (int i = 0; i < kSampled; ++i)
      sample_[s * kSampled + i] = keys[i * 53 % cols * lanes + i * 37 % rows];
  }

  // By the whole team, each thread when it has added its strips: the cut that prunes the `wanted`
  // smallest of `total` keys. keys_of(s) are those of strip s, `strip_keys` of them.
  template <class F>
  Cut find(int64_t wanted, int64_t total, int64_t strip_keys, F&& keys_of) {
    if (wanted <= 0) return {kPreservedKey, 0};
#pragma omp barrier
    for (Bracket in = bracket(wanted, total);; in = next_) {
      deal_.for_mine(0, deal_.strips, [&](int64_t s) {
        below_[s] = 0;
        count_[s] = gather_range(keys_of(s), strip_keys, in.lo, in.hi, inside_[s], below_[s]);
      });
#pragma omp barrier
      if (omp_get_thread_num() == 0) narrow(wanted, in);
#pragma omp barrier
      if (found_) return cut_;
    }
  }

 private:
  struct Bracket {
    int32_t lo, hi;
  };

  const Deal deal_;
  const int64_t stride_;
  Buffer<int32_t> sample_;
  PerStrip<int32_t> inside_;
  Buffer<int32_t> joined_, scratch_;
  PerThread<int32_t> sample_scratch_;
  Buffer<int64_t> count_, below_;
  // What narrow() leaves for all threads.
  bool found_ = false;
  Cut cut_{kPreservedKey, 0};
  Bracket next_{kPreservedKey, kLargestKey};

  // Between the order statistics 3.5 standard deviations of the wanted one's rank to either side.
  Bracket bracket(int64_t wanted, int64_t total) const {
    Bracket out{kPreservedKey, kLargestKey};
    const int64_t n = deal_.strips * kSampled;
    const double share = static_cast<double>(wanted) / static_cast<double>(total);
    const int64_t rank = static_cast<int64_t>(share * static_cast<double>(n)) + 1;
    const int64_t margin =
        static_cast<int64_t>(3.5 * std::sqrt(static_cast<double>(n) * share * (1 - share))) + 2;
    int32_t* scratch = sample_scratch_.mine();
    if (rank > margin) out.lo = find_cut(sample_, n, rank - margin, scratch, kLargestKey).key;
    if (rank + margin <= n) out.hi = find_cut(sample_, n, rank + margin, scratch, kLargestKey).key;
    return out;
  }

  // The cut among the keys inside, or, where the sample misled, a bracket that cannot miss.
  void narrow(int64_t wanted, Bracket in) {
    int64_t below = 0, inside = 0;
    for (int64_t s = 0; s < deal_.strips; ++s) {
      std::copy_n(inside_[s], count_[s], joined_ + inside);
      inside += count_[s];
      below += below_[s];
    }
    found_ = below < wanted && wanted <= below + inside;
    if (found_)
      cut_ = find_cut(joined_, inside, wanted - below, scratch_, kLargestKey);
    else if (wanted <= below)
      next_ = {kPreservedKey, in.lo - 1};
    else
      next_ = {in.hi + 1, kLargestKey};
  }
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
