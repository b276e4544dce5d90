// Pruning scores as order-preserving integer keys, and the selection steps that work on them.
//
//   score = |w[i,j] * (column_scale[j] + addend[i,j]) * row_scale[i]|     in fp32, in this order
//
// A non-negative float compares like its bit pattern, so a key is the pattern plus one. All NaNs
// share one key above infinity, and 0 is left for positions that must stay pruned. Everything here
// lives in PYPRUNE_ISA: each instruction set gets its own copy.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/simd.h"
#include "score_terms.h"

namespace pyprune {

namespace PYPRUNE_ISA {

constexpr uint32_t kNanBits = 0x7f800001u;  // the lowest of them: all others are lowered to it
constexpr int32_t kForbiddenKey = 0;
constexpr int32_t kMaxKey = static_cast<int32_t>(kNanBits) + 1;

// Keys are made in pieces this long: 16 KiB of them stay in the first-level cache.
constexpr int64_t kPiece = 4096;
// Key buffers end with this much slack so that a whole vector may be stored at their last element.
constexpr int64_t kSlack = 16;

// Uninitialised memory owned by one call. std::vector would emit symbols that the three
// instruction sets share.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::malloc(n * sizeof(T) + 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

inline int64_t thread_index() { return omp_get_thread_num(); }

// One row of a weight matrix with its terms.
template <class T>
struct ScoreRow {
  const T* w;
  const float* column_scale;
  const float* addend;
  const uint8_t* preserve;
  float row_scale;
  bool has_row_scale;
};

template <class T>
inline ScoreRow<T> score_row(const TensorView& w, const ScoreTerms& t, int64_t i) {
  const auto at = [i](const TensorView& v) { return i * v.stride[0]; };
  return {w.ptr<T>() + at(w),
          t.column_scale.ptr<float>(),
          t.addend.data ? t.addend.ptr<float>() + at(t.addend) : nullptr,
          t.preserve.data ? t.preserve.ptr<uint8_t>() + at(t.preserve) : nullptr,
          t.row_scale.data ? t.row_scale.ptr<float>()[i] : 1.0f,
          t.row_scale.data != nullptr};
}

inline int32_t key_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits &= 0x7fffffffu;
  if (bits > kNanBits) bits = kNanBits;
  return static_cast<int32_t>(bits) + 1;
}

// Stores the keys of one vector of scores; `preserve` is null or has a byte a lane.
inline void store_keys(Vec score, const uint8_t* preserve, int32_t* out) {
#if defined(__AVX512F__)
  __m512i bits = _mm512_and_si512(_mm512_castps_si512(score.v), _mm512_set1_epi32(0x7fffffff));
  bits = _mm512_min_epu32(bits, _mm512_set1_epi32(kNanBits));
  bits = _mm512_add_epi32(bits, _mm512_set1_epi32(1));
  if (preserve) {
    const __m128i p = _mm_loadu_si128(reinterpret_cast<const __m128i*>(preserve));
    bits = _mm512_maskz_mov_epi32(_mm_test_epi8_mask(p, p), bits);
  }
  _mm512_storeu_si512(out, bits);
#elif defined(__AVX2__)
  __m256i bits = _mm256_and_si256(_mm256_castps_si256(score.v), _mm256_set1_epi32(0x7fffffff));
  bits = _mm256_min_epu32(bits, _mm256_set1_epi32(kNanBits));
  bits = _mm256_add_epi32(bits, _mm256_set1_epi32(1));
  if (preserve) {
    const __m256i p =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(preserve)));
    bits = _mm256_andnot_si256(_mm256_cmpeq_epi32(p, _mm256_setzero_si256()), bits);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), bits);
#else
  for (int i = 0; i < Vec::kLanes; ++i) out[i] = key_of(score.v[i]);
  if (preserve)
    for (int i = 0; i < Vec::kLanes; ++i) out[i] = preserve[i] ? out[i] : kForbiddenKey;
#endif
}

// Keys of columns [c0, c1) of a row.
template <class T>
inline void score_keys(const ScoreRow<T>& row, int64_t c0, int64_t c1, int32_t* out) {
  const bool factor = row.column_scale || row.addend;
  int64_t c = c0;
  for (; c + Vec::kLanes <= c1; c += Vec::kLanes) {
    Vec s = Vec::load(row.w + c);
    if (factor) {
      Vec f = row.column_scale ? Vec::load(row.column_scale + c) : Vec::load(row.addend + c);
      if (row.column_scale && row.addend) f = f + Vec::load(row.addend + c);
      s = s * f;
    }
    if (row.has_row_scale) s = s * Vec::set1(row.row_scale);
    store_keys(s, row.preserve ? row.preserve + c : nullptr, out + (c - c0));
  }
  for (; c < c1; ++c) {
    float s = to_float(row.w[c]);
    if (factor) {
      float f = row.column_scale ? row.column_scale[c] : row.addend[c];
      if (row.column_scale && row.addend) f += row.addend[c];
      s *= f;
    }
    if (row.has_row_scale) s *= row.row_scale;
    const bool allowed = !row.preserve || row.preserve[c];
    out[c - c0] = allowed ? key_of(s) : kForbiddenKey;
  }
}

// Copies the keys within [lo, hi], in order, to `out` and returns how many; adds the number of keys
// below lo to `below`. `out` needs kSlack elements more than it receives.
inline int64_t gather_range(const int32_t* keys, int64_t n, int32_t lo, int32_t hi, int32_t* out,
                            int64_t& below) {
  int64_t taken = 0, under = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i vlo = _mm512_set1_epi32(lo);
  const __m512i width = _mm512_set1_epi32(hi - lo);
  for (; i + 16 <= n; i += 16) {
    const __m512i k = _mm512_loadu_si512(keys + i);
    const __mmask16 in = _mm512_cmple_epu32_mask(_mm512_sub_epi32(k, vlo), width);
    under += __builtin_popcount(_mm512_cmplt_epi32_mask(k, vlo));
    _mm512_storeu_si512(out + taken, _mm512_maskz_compress_epi32(in, k));
    taken += __builtin_popcount(in);
  }
#endif
  for (; i < n; ++i) {
    const int32_t k = keys[i];
    out[taken] = k;
    taken += (k >= lo) & (k <= hi);
    under += k < lo;
  }
  below += under;
  return taken;
}

// How many of at most 64 keys are smaller than each of them: their order, without a sort.
struct SmallOrder {
  static constexpr int kMax = 64;
  int32_t key[kMax], smaller[kMax];

  // Takes `n` keys, `step` apart and each shifted by a little, so that a period in the columns does
  // not decide the sample.
  SmallOrder(const int32_t* keys, int64_t n, int64_t step) {
    for (int i = 0; i < kMax; ++i) key[i] = INT32_MAX;
    for (int64_t i = 0; i < n; ++i) key[i] = keys[i * step + i * 5 % step];
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi32(1);
    __m512i mine[4], count[4];
    for (int v = 0; v < 4; ++v) {
      mine[v] = _mm512_loadu_si512(key + 16 * v);
      count[v] = _mm512_setzero_si512();
    }
    for (int64_t j = 0; j < n; ++j) {
      const __m512i other = _mm512_set1_epi32(key[j]);
      for (int v = 0; v < 4; ++v)
        count[v] =
            _mm512_mask_add_epi32(count[v], _mm512_cmplt_epi32_mask(other, mine[v]), count[v], one);
    }
    for (int v = 0; v < 4; ++v) _mm512_storeu_si512(smaller + 16 * v, count[v]);
#else
    for (int i = 0; i < kMax; ++i) smaller[i] = 0;
    for (int64_t j = 0; j < n; ++j)
      for (int i = 0; i < kMax; ++i) smaller[i] += key[j] < key[i];
#endif
  }
  // The rank-th smallest, from 1.
  int32_t statistic(int64_t rank) const {
    const int32_t r = static_cast<int32_t>(rank);
    int32_t found = 0;
    for (int i = 0; i < kMax; ++i) found = smaller[i] < r && key[i] > found ? key[i] : found;
    return found;
  }
  int64_t below(int32_t k) const {
    int32_t count = 0;
    for (int i = 0; i < kMax; ++i) count += key[i] < k;
    return count;
  }
};

// What to prune of a set of keys: those below `key`, and the first `ties` of those equal to it
// (kAllTies: every one, which spares looking for them).
constexpr int64_t kAllTies = INT64_MAX;
struct Cut {
  int32_t key;
  int64_t ties;
};

// Brackets the wanted key between two order statistics of a regular sample of 64 keys. One in four
// of the keys falls inside; the wanted one does in 19 of 20 cases when the order is random.
inline void sample_bracket(const int32_t* keys, int64_t n, int64_t rank, int32_t& p, int32_t& q) {
  constexpr int64_t kSample = SmallOrder::kMax, kMargin = 8;
  const SmallOrder sample(keys, kSample, n / kSample);
  const int64_t at = rank * kSample / n + 1;
  if (at - kMargin >= 1) p = sample.statistic(at - kMargin);
  if (at + kMargin <= kSample) q = sample.statistic(at + kMargin);
}

// How a pass of find_cut chooses the interval of key values that it keeps.
enum class Bracket { near_guess, sampled, halved };

// Around a guess: a factor of 2^(1/8) either way, which holds one key in ten of a normal row.
constexpr int32_t kGuessReach = 1 << 20;
constexpr int32_t kNoGuess = -1;

// The cut that prunes exactly `rank` keys, 1 <= rank <= n. `scratch` holds 2 * (n + kSlack).
// `guess` is a key that the cut may be close to, such as the cut of a similar row.
//
// Each pass keeps the keys inside a bracket around the wanted one. It comes from the guess or from
// a sample; if that pass removed less than half the keys, the next one halves the interval of key
// values instead, so that no input takes more than 31 such passes.
inline Cut find_cut(const int32_t* keys, int64_t n, int64_t rank, int32_t* scratch,
                    int32_t guess = kNoGuess) {
  int32_t lo = kForbiddenKey, hi = kMaxKey;
  const int32_t* src = keys;
  int32_t *dst = scratch, *other = scratch + n + kSlack;
  Bracket bracket = guess == kNoGuess ? Bracket::sampled : Bracket::near_guess;
  while (n > SmallOrder::kMax && lo < hi) {
    int32_t p = lo, q = hi;
    if (bracket == Bracket::sampled) {
      sample_bracket(src, n, rank, p, q);
    } else if (bracket == Bracket::halved) {
      p = q = lo + (hi - lo) / 2;
    } else {
      p = guess > lo + kGuessReach ? guess - kGuessReach : lo;
      q = guess < hi - kGuessReach ? guess + kGuessReach : hi;
    }
    int64_t below = 0, inside = gather_range(src, n, p, q, dst, below), unused = 0;
    const bool missed = rank <= below || rank > below + inside;
    if (rank <= below) {
      hi = p - 1;
    } else if (missed) {
      rank -= below + inside;
      lo = q + 1;
    } else {
      rank -= below;
      lo = p;
      hi = q;
    }
    if (missed) inside = gather_range(src, n, lo, hi, dst, unused);
    const bool was_guess = bracket == Bracket::near_guess;
    bracket = was_guess || 2 * inside <= n ? Bracket::sampled : Bracket::halved;
    n = inside;
    src = dst;
    int32_t* const free_buffer = other;
    other = dst;
    dst = free_buffer;
  }
  if (lo == hi) return {lo, rank == n ? kAllTies : rank};
  const SmallOrder order(src, n, 1);
  const int32_t key = order.statistic(rank);
  const int64_t ties = rank - order.below(key);
  return {key, ties == order.below(key + 1) - order.below(key) ? kAllTies : ties};
}

// Position just after the `ties`-th key equal to `key`, or n if there are fewer.
inline int64_t after_tie(const int32_t* keys, int64_t n, int32_t key, int64_t ties) {
  int64_t i = 0;
  if (ties <= 0) return 0;
  if (ties >= n) return n;
#if defined(__AVX512F__)
  const __m512i k = _mm512_set1_epi32(key);
  for (; i + 16 <= n; i += 16) {
    const int equal = __builtin_popcount(_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(keys + i), k));
    if (equal >= ties) break;
    ties -= equal;
  }
#endif
  for (; i < n; ++i)
    if (keys[i] == key && --ties == 0) return i + 1;
  return n;
}

// keep[i] = keys[i] > bound
inline void keep_above(const int32_t* keys, int64_t n, int32_t bound, uint8_t* keep) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i b = _mm512_set1_epi32(bound);
  for (; i + 64 <= n; i += 64) {
    uint64_t bits = 0;
    for (int v = 0; v < 4; ++v)
      bits |=
          static_cast<uint64_t>(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + i + 16 * v), b))
          << (16 * v);
    _mm512_storeu_si512(keep + i, _mm512_maskz_set1_epi8(bits, 1));
  }
#endif
  for (; i < n; ++i) keep[i] = keys[i] > bound;
}

// Writes the mask of a cut, True = kept. A key that must stay pruned never survives, even where the
// quota is smaller than their number.
inline void write_mask(const int32_t* keys, int64_t n, Cut cut, uint8_t* keep) {
  const int64_t split = after_tie(keys, n, cut.key, cut.ties);
  keep_above(keys, split, cut.key, keep);
  const int32_t least = cut.key > kForbiddenKey ? cut.key : kForbiddenKey + 1;
  keep_above(keys + split, n - split, least - 1, keep + split);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
