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

// Keys of columns [c0, c1) of a row. `next`, if given, is fetched meanwhile: weights as far from
// the cache as the next row, for callers that compute on one row before they read another.
template <class T>
inline void score_keys(const ScoreRow<T>& row, int64_t c0, int64_t c1, int32_t* out,
                       const T* next = nullptr) {
  if (next) {
    const char* const begin = reinterpret_cast<const char*>(next + c0);
    for (int64_t b = 0; b < (c1 - c0) * static_cast<int64_t>(sizeof(T)); b += 64)
      __builtin_prefetch(begin + b, 0, 2);
  }
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
  // Keys are not negative: the sign of k - lo says whether k is below. Summing signs leaves the
  // port that compares and compresses alone; a lane's sum cannot overflow, n is far below 2^35.
  __m512i signs = _mm512_setzero_si512();
  for (; i + 64 <= n; i += 64) {
    uint64_t in = 0;
    for (int v = 0; v < 4; ++v) {
      const __m512i above = _mm512_sub_epi32(_mm512_loadu_si512(keys + i + 16 * v), vlo);
      in |= static_cast<uint64_t>(_mm512_cmple_epu32_mask(above, width)) << (16 * v);
      signs = _mm512_add_epi32(signs, _mm512_srli_epi32(above, 31));
    }
    const int count = __builtin_popcountll(in);
    // A narrow bracket takes 2 or 3 of 64. Compressing those stores whole vectors over one
    // another (560 ns for a row of 4096); picking them one by one, without a branch, takes 350.
    constexpr int kPicked = 6;
    if (count <= kPicked) {
      uint64_t rest = in;
      for (int k = 0; k < kPicked; ++k) {
        out[taken + k] = keys[i + __builtin_ctzll(rest | 1ull << 63)];
        rest &= rest - 1;
      }
    } else {
      for (int v = 0, at = 0; v < 4; ++v) {
        const __mmask16 part = static_cast<__mmask16>(in >> (16 * v));
        _mm512_storeu_si512(out + taken + at, _mm512_maskz_compress_epi32(
                                                  part, _mm512_loadu_si512(keys + i + 16 * v)));
        at += __builtin_popcount(part);
      }
    }
    taken += count;
  }
  under = _mm512_reduce_add_epi32(signs);
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

  // Takes `n` keys, `step` apart and, if there is room, each shifted by a little, so that a period
  // in the columns does not decide the sample.
  SmallOrder(const int32_t* keys, int64_t n, int64_t step) {
    const int64_t shift = step >= 8 ? 7 : 0;
    for (int64_t i = 0; i < n; ++i) key[i] = keys[i * step + (i * 5 & shift)];
    for (int64_t i = n; i < kMax; ++i) key[i] = INT32_MAX;
    n <= kMax / 2 ? count<kMax / 2>(n) : count<kMax>(n);
  }
  // The rank-th smallest, from 1.
  int32_t statistic(int64_t rank) const {
    const int32_t r = static_cast<int32_t>(rank);
    int32_t found = 0;
    for (int i = 0; i < kMax; ++i) found = smaller[i] < r && key[i] > found ? key[i] : found;
    return found;
  }
  int64_t below(int32_t k) const {
    int32_t found = 0;
    for (int i = 0; i < kMax; ++i) found += key[i] < k;
    return found;
  }

 private:
  // Fills smaller[0..kWidth); the rest, if any, is padding that must not look like a low rank.
  template <int kWidth>
  void count(int64_t n) {
    for (int i = kWidth; i < kMax; ++i) smaller[i] = kMax;
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi32(1);
    __m512i mine[kWidth / 16], sum[kWidth / 16];
    for (int v = 0; v < kWidth / 16; ++v) {
      mine[v] = _mm512_loadu_si512(key + 16 * v);
      sum[v] = _mm512_setzero_si512();
    }
    for (int64_t j = 0; j < n; ++j) {
      const __m512i other = _mm512_set1_epi32(key[j]);
      for (int v = 0; v < kWidth / 16; ++v)
        sum[v] =
            _mm512_mask_add_epi32(sum[v], _mm512_cmplt_epi32_mask(other, mine[v]), sum[v], one);
    }
    for (int v = 0; v < kWidth / 16; ++v) _mm512_storeu_si512(smaller + 16 * v, sum[v]);
#else
    for (int i = 0; i < kWidth; ++i) smaller[i] = 0;
    for (int64_t j = 0; j < n; ++j)
      for (int i = 0; i < kWidth; ++i) smaller[i] += key[j] < key[i];
#endif
  }
};

// What to prune of a set of keys: those below `key`, and the first `ties` of those equal to it
// (kAllTies: every one, which spares looking for them).
constexpr int64_t kAllTies = INT64_MAX;
struct Cut {
  int32_t key;
  int64_t ties;
};

// Brackets the wanted key between two order statistics of a regular sample: of 64 keys, or of 32
// where few are left. A quarter or a third of the keys falls inside; the wanted one does in 19 of
// 20 cases when the order is random.
inline void sample_bracket(const int32_t* keys, int64_t n, int64_t rank, int32_t& p, int32_t& q) {
  const int64_t size = n > 512 ? SmallOrder::kMax : SmallOrder::kMax / 2;
  const int64_t margin = n > 512 ? 8 : 5;
  const SmallOrder sample(keys, size, n / size);
  const int64_t at = rank * size / n + 1;
  if (at - margin >= 1) p = sample.statistic(at - margin);
  if (at + margin <= size) q = sample.statistic(at + margin);
}

// Where the cut of the next row may lie, learnt from the rows before it: rows of one matrix are
// alike. It only decides which keys find_cut looks at first, never what it returns.
struct Guess {
  int32_t key = -1;
  int32_t reach = 1 << 20;  // a factor of 2^(1/8) either way: a tenth of a normal row

  void learn(int32_t cut, bool missed, int64_t inside) {
    constexpr int32_t kMinReach = 1 << 8, kMaxReach = 1 << 24;
    key = cut;
    if (missed && reach < kMaxReach) reach *= 2;
    // Narrow enough once one more sampling pass finishes the row.
    if (!missed && inside > 3 * SmallOrder::kMax && reach > kMinReach) reach -= reach / 8;
  }
};

// The cut that prunes exactly `rank` keys, 1 <= rank <= n. `scratch` holds 2 * (n + kSlack).
//
// Each pass keeps the keys inside a bracket around the wanted one. It comes from the guess, if
// there is one, then from samples; if a pass removed less than half the keys, the next one halves
// the interval of key values instead, so that no input takes more than 31 such passes.
inline Cut find_cut(const int32_t* keys, int64_t n, int64_t rank, int32_t* scratch,
                    Guess* guess = nullptr) {
  int32_t lo = kForbiddenKey, hi = kMaxKey;
  const int32_t* src = keys;
  int32_t *dst = scratch, *other = scratch + n + kSlack;
  bool sample = true, guessed = guess && guess->key >= 0, guess_missed = false;
  int64_t guess_inside = 0;
  for (bool first = true; n > SmallOrder::kMax && lo < hi; first = false) {
    int32_t p = lo, q = hi;
    if (first && guessed) {
      p = guess->key > lo + guess->reach ? guess->key - guess->reach : lo;
      q = guess->key < hi - guess->reach ? guess->key + guess->reach : hi;
    } else if (sample) {
      sample_bracket(src, n, rank, p, q);
    } else {
      p = q = lo + (hi - lo) / 2;
    }
    int64_t below = 0, inside = gather_range(src, n, p, q, dst, below), unused = 0;
    const bool missed = rank <= below || rank > below + inside;
    if (first && guessed) {
      guess_missed = missed;
      guess_inside = inside;
    }
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
    sample = (first && guessed) || 2 * inside <= n;
    n = inside;
    src = dst;
    int32_t* const free_buffer = other;
    other = dst;
    dst = free_buffer;
  }
  Cut cut{lo, rank == n ? kAllTies : rank};
  if (lo < hi) {
    const SmallOrder order(src, n, 1);
    cut.key = order.statistic(rank);
    const int64_t below = order.below(cut.key), equal = order.below(cut.key + 1) - below;
    cut.ties = rank - below == equal ? kAllTies : rank - below;
  }
  if (guess) guess->learn(cut.key, guess_missed, guess_inside);
  return cut;
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

#if defined(__AVX512F__)
// Stores 64 mask bytes. Whole lines go past the caches: a mask is not read again by the kernel that
// writes it, and fetching its lines first would add a third to the traffic of bf16 weights.
inline void store_mask(uint8_t* keep, uint64_t bits) {
  const __m512i bytes = _mm512_maskz_set1_epi8(bits, 1);
  if (reinterpret_cast<uintptr_t>(keep) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(keep), bytes);
  else
    _mm512_storeu_si512(keep, bytes);
}
#endif
// Makes a thread's streamed stores visible before it reports that it is done.
inline void finish_stores() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
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
    store_mask(keep + i, bits);
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
