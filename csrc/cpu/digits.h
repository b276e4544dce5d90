// Selection within a row by the leading digits of its keys: the upper 16 bits, which are the score
// cut off to bf16. A row of them stays in the first or second level of cache where its keys would
// not, and counting those below a pivot takes 2 cycles for 64. So the digit of the cut is found by
// counting, and only the scores that share this digit are looked at in full.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/cut.h"
#include "cpu/score.h"

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int kForbiddenDigit = kForbiddenKey >> 16;
constexpr int kMaxDigit = kMaxKey >> 16;
// Rows are padded to whole blocks with a digit above all others.
constexpr int16_t kPadding = INT16_MAX;

// The digits of one block of keys.
template <TermSet kTerms, class T>
inline void digits_at(const ScoreRow<T>& row, int64_t c, int16_t* out) {
#if defined(__AVX512F__)
  alignas(64) static const uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                 23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i index = _mm512_load_si512(upper);
  for (int v = 0; v < kBlock; v += 32) {
    __m512i digits;
    if constexpr (kTerms == TermSet::any) {
      digits = _mm512_permutex2var_epi16(keys_at<kTerms>(row, c + v), index,
                                         keys_at<kTerms>(row, c + v + 16));
    } else {  // sign and NaN payload are cheaper to drop afterwards, 32 at a time
      digits = _mm512_permutex2var_epi16(_mm512_castps_si512(score_at<kTerms>(row, c + v).v), index,
                                         _mm512_castps_si512(score_at<kTerms>(row, c + v + 16).v));
      digits = _mm512_and_si512(digits, _mm512_set1_epi16(0x7fff));
      digits = _mm512_min_epi16(digits, _mm512_set1_epi16(kMaxDigit));
    }
    _mm512_storeu_si512(out + v, digits);
  }
#elif defined(__AVX2__)
  for (int v = 0; v < kBlock; v += 16) {
    const __m256i a = _mm256_srai_epi32(keys_at<kTerms>(row, c + v), 16);
    const __m256i b = _mm256_srai_epi32(keys_at<kTerms>(row, c + v + 8), 16);
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + v), both);
  }
#elif defined(PYPRUNE_NEON)
  for (int v = 0; v < kBlock; v += Vec::kLanes) {
    const KeyVec keys = keys_at<kTerms>(row, c + v);
    vst1q_s16(out + v, vshrn_high_n_s32(vshrn_n_s32(keys.a, 16), keys.b, 16));
  }
#else
  for (int v = 0; v < kBlock; v += Vec::kLanes) {
    const KeyVec keys = keys_at<kTerms>(row, c + v);
    for (int i = 0; i < Vec::kLanes; ++i) out[v + i] = static_cast<int16_t>(keys.v[i] >> 16);
  }
#endif
}

// Counts the digits below a pivot, a block at a time, 2^21 digits at most: a lane counts to 2^15.
class BelowCounter {
 public:
#if defined(__AVX2__)
  // 256-bit vectors under AVX-512 too: their comparison gives a vector to subtract, where 512 bits
  // give a mask that has to leave for a general register and be counted there.
  explicit BelowCounter(int pivot) : pivot_(_mm256_set1_epi16(static_cast<int16_t>(pivot))) {}
  void add(const int16_t* block) {
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i d = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 16 * v));
      sum_[v] = _mm256_sub_epi16(sum_[v], _mm256_cmpgt_epi16(pivot_, d));
    }
  }
  int64_t total() const {
    const __m256i one = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(sum_[v], one));
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
  }

 private:
  __m256i pivot_, sum_[4] = {};
#else
  explicit BelowCounter(int pivot) : pivot_(static_cast<int16_t>(pivot)) {}
  void add(const int16_t* block) {
    int16_t below = 0;
    for (int i = 0; i < kBlock; ++i) below = static_cast<int16_t>(below + (block[i] < pivot_));
    total_ += below;
  }
  int64_t total() const { return total_; }

 private:
  int16_t pivot_;
  int64_t total_ = 0;
#endif
};

// How many of `n` digits, padded to whole blocks, are below the pivot.
inline int64_t count_below(const int16_t* digits, int64_t n, int pivot) {
  BelowCounter counter(pivot);
  for (int64_t i = 0; i < n; i += kBlock) counter.add(digits + i);
  return counter.total();
}

// The digits of a row of `cols`, padded. Returns how many are below the pivot. The row `ahead`
// elements on is fetched meanwhile.
template <class T>
inline int64_t score_digits(const ScoreRow<T>& row, int64_t cols, int64_t ahead, int pivot,
                            int16_t* out) {
  const int64_t blocks_end = cols / kBlock * kBlock;
  BelowCounter counter(pivot);
  // Counted a while after they were stored: loads of stores that are still under way are slow. The
  // other row is fetched from here, where nothing else is waited for.
  constexpr int64_t kCounted = 16 * kBlock;
  for (int64_t c0 = 0; c0 < blocks_end; c0 += kCounted) {
    const int64_t c1 = c0 + kCounted < blocks_end ? c0 + kCounted : blocks_end;
    with_term_set(row, [&](auto terms) {
      for (int64_t c = c0; c < c1; c += kBlock) digits_at<decltype(terms)::value>(row, c, out + c);
    });
    for (int64_t c = c0; c < c1; c += kBlock) {
      fetch_block(row.w + c, ahead);
      counter.add(out + c);
    }
  }
  if (blocks_end < cols) {
    int32_t rest[kBlock];
    score_rest(row, blocks_end, cols, rest);
    for (int64_t i = 0; i < kBlock; ++i)
      out[blocks_end + i] = blocks_end + i < cols ? static_cast<int16_t>(rest[i] >> 16) : kPadding;
    counter.add(out + blocks_end);
  }
  return counter.total();
}

// A bit for each of a block's digits: above, or equal to, the given one.
#if defined(__AVX512F__)
inline uint64_t bits_of(__mmask32 low, __mmask32 high) {
  return low | static_cast<uint64_t>(high) << 32;
}
inline uint64_t above_bits(const int16_t* digits, int digit) {
  const __m512i d = _mm512_set1_epi16(static_cast<int16_t>(digit));
  return bits_of(_mm512_cmpgt_epi16_mask(_mm512_loadu_si512(digits), d),
                 _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(digits + 32), d));
}
inline uint64_t equal_bits(const int16_t* digits, int digit) {
  const __m512i d = _mm512_set1_epi16(static_cast<int16_t>(digit));
  return bits_of(_mm512_cmpeq_epi16_mask(_mm512_loadu_si512(digits), d),
                 _mm512_cmpeq_epi16_mask(_mm512_loadu_si512(digits + 32), d));
}
#elif defined(__AVX2__)
inline uint64_t above_bits(const int16_t* digits, int digit) {
  const __m256i d = _mm256_set1_epi16(static_cast<int16_t>(digit));
  const auto above = [&](int i) { return _mm256_cmpgt_epi16(load32_bytes(digits + i), d); };
  return bits_of_words(above(0), above(16)) | bits_of_words(above(32), above(48)) << 32;
}
inline uint64_t equal_bits(const int16_t* digits, int digit) {
  const __m256i d = _mm256_set1_epi16(static_cast<int16_t>(digit));
  const auto equal = [&](int i) { return _mm256_cmpeq_epi16(load32_bytes(digits + i), d); };
  return bits_of_words(equal(0), equal(16)) | bits_of_words(equal(32), equal(48)) << 32;
}
#else
// Gathers the lowest bits of 64 bytes that are 0 or 1: the product moves byte i's bit to 56 + i.
inline uint64_t bits_of(const uint8_t* flags) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, flags + 8 * i, 8);
    bits |= (eight * 0x0102040810204080ull >> 56) << (8 * i);
  }
  return bits;
}
inline uint64_t above_bits(const int16_t* digits, int digit) {
  uint8_t flags[kBlock];
  for (int i = 0; i < kBlock; ++i) flags[i] = digits[i] > digit;
  return bits_of(flags);
}
inline uint64_t equal_bits(const int16_t* digits, int digit) {
  uint8_t flags[kBlock];
  for (int i = 0; i < kBlock; ++i) flags[i] = digits[i] == digit;
  return bits_of(flags);
}
#endif

// Where the next row's digit may lie, learnt from the rows before it: rows of one matrix are alike.
// It only decides which pivots are tried first, never what is found.
struct DigitGuess {
  int digit = kMaxDigit / 2;
  float density = 0;  // keys per digit around the cut; 0: nothing is known yet
};

// The cut's digit: `below` keys have a lower one and `equal` have this one.
struct DigitCut {
  int digit;
  int64_t below, equal;
};

// The digit of the rank-th smallest key, 1 <= rank <= n, given how many digits are below the guess.
//
// Pivots close in from both sides. From a guess they step by what the density says is missing,
// then interpolate; after a few of these the interval is halved, so that no input takes more than
// kPatience + 15 passes.
inline DigitCut find_digit(const int16_t* digits, int64_t n, int64_t rank, int64_t below,
                           DigitGuess& guess) {
  constexpr int kPatience = 8;
  // counts below lo < rank <= counts below hi
  int lo = kForbiddenDigit, hi = kMaxDigit + 1, pivot = guess.digit;
  int64_t below_lo = 0, below_hi = n;
  bool lo_counted = false, hi_counted = false;
  for (int pass = 1;; ++pass) {
    if (below < rank) {
      lo = pivot, below_lo = below, lo_counted = true;
    } else {
      hi = pivot, below_hi = below, hi_counted = true;
    }
    if (hi - lo == 1) break;
    if (guess.density <= 0 || pass > kPatience) {
      pivot = lo + (hi - lo) / 2;
    } else if (lo_counted && hi_counted) {
      const float share = (static_cast<float>(rank - below_lo) - 0.5f) / (below_hi - below_lo);
      pivot = lo + static_cast<int>(share * (hi - lo) + 0.5f);
    } else {
      const float missing = (static_cast<float>(rank - below) - 0.5f) / guess.density;
      const float step = static_cast<float>(pass) * (missing < 0 ? missing - 1 : missing + 1);
      constexpr float kFarthest = kMaxDigit;
      pivot += static_cast<int>(step < -kFarthest  ? -kFarthest
                                : step > kFarthest ? kFarthest
                                                   : step);
    }
    pivot = pivot <= lo ? lo + 1 : pivot >= hi ? hi - 1 : pivot;
    below = count_below(digits, n, pivot);
  }
  const DigitCut cut{lo, below_lo, below_hi - below_lo};
  guess.digit = lo;
  guess.density = guess.density > 0 ? guess.density + (cut.equal - guess.density) / 8 : cut.equal;
  return cut;
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
