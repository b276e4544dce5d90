// Which weights of a strip the OBS sweep prunes: scores as integer keys, and the three rules that
// choose the smallest of them. All counts are exact and ties go to the lower index.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// The bits of a non-negative float order like the float itself, NaN above infinity. Weights that
// must stay pruned get the one key below all others.
constexpr int32_t kPreservedKey = -1;
constexpr int32_t kLargestKey = 0x7fffffff;

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
      alignas(64) float score[Vec::kLanes];
      Vec::abs(Vec::load(w + c * lanes + l) * factor).store(score);
      std::memcpy(keys + c * lanes + l, score, sizeof score);
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

// Radix select of one key over many strips, three digits of the keys shifted up by one (so that
// the preserved key is digit 0). The caller adds up the counts of all strips between digits.
class DigitSelect {
 public:
  static constexpr int kDigits = 3;
  // Four interleaved tables: neighbouring keys often share a digit, and incrementing one counter
  // twice in a row waits for the store.
  static constexpr int kTables = 4;
  static constexpr int kBins = 2049;  // the top digit of kLargestKey + 1 is 2048
  static constexpr int kCounters = kBins * kTables;

  DigitSelect() = default;
  // wanted: 1-based rank of the key, 0 for none.
  explicit DigitSelect(int64_t wanted) : wanted_(wanted) {}

  // Adds the current digit of the keys of lanes < rows that share the digits found so far.
  void count(int digit, const int32_t* keys, int64_t cols, int lanes, int rows,
             int32_t* counters) const {
    for (int64_t c = 0; c < cols; ++c)
      if (digit == 0)
        count_all(keys + c * lanes, rows, counters);
      else
        count_sharing(digit, keys + c * lanes, rows, counters);
  }

  // Finds the digit of the wanted key in the summed counters.
  void narrow(int digit, const int32_t* counters) {
    for (uint32_t bin = 0;; ++bin) {
      equal_ = 0;
      for (int t = 0; t < kTables; ++t) equal_ += counters[bin * kTables + t];
      if (wanted_ <= equal_) {
        prefix_ = prefix_ << (digit ? kShift[digit - 1] - kShift[digit] : 0) | bin;
        return;
      }
      wanted_ -= equal_;
    }
  }

  // After the last digit: the key, how many equal it, and how many of those are wanted.
  int32_t key() const { return wanted_ > 0 ? static_cast<int32_t>(prefix_ - 1) : 0; }
  int64_t equal() const { return equal_; }
  int64_t wanted() const { return wanted_; }

 private:
  static constexpr int kShift[kDigits] = {20, 9, 0};

  static void count_all(const int32_t* keys, int rows, int32_t* counters) {
    for (int l = 0; l < rows; ++l)
      ++counters[((static_cast<uint32_t>(keys[l]) + 1) >> kShift[0]) * kTables + l % kTables];
  }

  // Few keys share the prefix: whole vectors without one are passed over.
  void count_sharing(int digit, const int32_t* keys, int rows, int32_t* counters) const {
    const int above = kShift[digit - 1], here = kShift[digit];
    const uint32_t low = (prefix_ << above) - 1;
    for (int l0 = 0; l0 < rows; l0 += Vec::kLanes) {
      if (!any((((UnsignedKeys)keys_at(keys + l0) - low) >> above) == 0)) continue;
      for (int l = l0; l < rows && l < l0 + Vec::kLanes; ++l) {
        const uint32_t offset = static_cast<uint32_t>(keys[l]) - low;
        if (offset >> above == 0) ++counters[(offset >> here) * kTables];
      }
    }
  }

  uint32_t prefix_ = 0;  // the digits found so far
  int64_t wanted_ = 0;   // 1-based rank of the key among those that share the prefix
  int64_t equal_ = 0;
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
