// Selection on keys: the cut that prunes an exact number of them, and masks from a cut.
#pragma once

#include "cpu/expand.h"
#include "cpu/score.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Copies the keys within [lo, hi], in order, to `out` and returns how many; adds the number of keys
// below lo to `below`. `out` needs kSlack elements more than it receives.
inline int64_t gather_range(const int32_t* keys, int64_t n, int32_t lo, int32_t hi, int32_t* out,
                            int64_t& below) {
  int64_t taken = 0, under = 0, i = 0;
#if defined(__AVX512F__)
  const __m512i vlo = _mm512_set1_epi32(lo);
  const __m512i width = _mm512_set1_epi32(hi - lo);
  // Keys are not below -1: the sign of k - lo says whether k is below. Summing signs leaves the
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
        _mm512_storeu_si512(out + taken + at,
                            compress_dwords(part, _mm512_loadu_si512(keys + i + 16 * v)));
        at += __builtin_popcount(part);
      }
    }
    taken += count;
  }
  under = _mm512_reduce_add_epi32(signs);
#elif defined(__AVX2__)
  const __m256i vlo = _mm256_set1_epi32(lo), width = _mm256_set1_epi32(hi - lo);
  __m256i signs = _mm256_setzero_si256();
  for (; i + 32 <= n; i += 32) {
    uint32_t in = 0;
    for (int v = 0; v < 4; ++v) {
      const __m256i above = _mm256_sub_epi32(load32_bytes(keys + i + 8 * v), vlo);
      const __m256i inside = _mm256_cmpeq_epi32(_mm256_min_epu32(above, width), above);
      in |= static_cast<uint32_t>(bits_of_dwords(inside)) << (8 * v);
      signs = _mm256_add_epi32(signs, _mm256_srli_epi32(above, 31));
    }
    const int count = __builtin_popcount(in);
    constexpr int kPicked = 4;
    if (count <= kPicked) {
      uint32_t rest = in;
      for (int k = 0; k < kPicked; ++k) {
        out[taken + k] = keys[i + __builtin_ctz(rest | 1u << 31)];
        rest &= rest - 1;
      }
    } else {
      for (int v = 0, at = 0; v < 4; ++v) {
        const auto part = static_cast<uint8_t>(in >> (8 * v));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + taken + at),
                            compress_dwords(part, load32_bytes(keys + i + 8 * v)));
        at += __builtin_popcount(part);
      }
    }
    taken += count;
  }
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), signs);
  for (const uint32_t lane : lanes) under += lane;
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

// Calls f(i) for every key within [lo, hi], in order; meant for few.
template <class F>
inline void each_within(const int32_t* keys, int64_t n, int32_t lo, int32_t hi, F&& f) {
  const uint32_t width = static_cast<uint32_t>(hi) - static_cast<uint32_t>(lo);
  const auto within = [&](int64_t i) {
    return static_cast<uint32_t>(keys[i]) - static_cast<uint32_t>(lo) <= width;
  };
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t end = i + kBlock < n ? i + kBlock : n;
    uint32_t any = 0;
    for (int64_t j = i; j < end; ++j) any |= within(j);
    if (!any) continue;
    for (int64_t j = i; j < end; ++j)
      if (within(j)) f(j);
  }
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
    int32_t found = kForbiddenKey;
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

// The cut that prunes exactly `rank` keys, 1 <= rank <= n; none is above `hi`. `scratch` holds
// 2 * (n + kSlack).
//
// Each pass keeps the keys inside a bracket around the wanted one, taken from a sample; if a pass
// removed less than half the keys, the next one halves the interval of key values instead, so that
// no input takes more than 31 such passes.
inline Cut find_cut(const int32_t* keys, int64_t n, int64_t rank, int32_t* scratch,
                    int32_t hi = kMaxKey) {
  int32_t lo = kForbiddenKey;
  const int32_t* src = keys;
  int32_t *dst = scratch, *other = scratch + n + kSlack;
  bool sample = true;
  while (n > SmallOrder::kMax && lo < hi) {
    int32_t p = lo, q = hi;
    if (sample)
      sample_bracket(src, n, rank, p, q);
    else
      p = q = lo + (hi - lo) / 2;
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
    sample = 2 * inside <= n;
    n = inside;
    src = dst;
    int32_t* const free_buffer = other;
    other = dst;
    dst = free_buffer;
  }
  if (lo == hi) return {lo, rank == n ? kAllTies : rank};
  const SmallOrder order(src, n, 1);
  const int32_t key = order.statistic(rank);
  const int64_t below = order.below(key), equal = order.below(key + 1) - below;
  return {key, rank - below == equal ? kAllTies : rank - below};
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
#elif defined(__AVX2__)
  const __m256i k = _mm256_set1_epi32(key);
  for (; i + 8 <= n; i += 8) {
    const __m256i same = _mm256_cmpeq_epi32(load32_bytes(keys + i), k);
    const int equal = __builtin_popcountll(bits_of_dwords(same));
    if (equal >= ties) break;
    ties -= equal;
  }
#endif
  for (; i < n; ++i)
    if (keys[i] == key && --ties == 0) return i + 1;
  return n;
}

// Whether a mask's whole lines go past the caches: it is not read again by the kernel that writes
// it, and fetching its lines first would add a third to the traffic of bf16 weights. A mask that
// stays in the second-level cache is written there.
inline bool streamed(const TensorView& mask) { return mask.numel() > int64_t{1} << 20; }

#if defined(__AVX512F__)
inline void store_bytes(uint8_t* keep, __m512i bytes, bool stream) {
  if (stream && reinterpret_cast<uintptr_t>(keep) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(keep), bytes);
  else
    _mm512_storeu_si512(keep, bytes);
}
#elif defined(__AVX2__)
inline void store_bytes(uint8_t* keep, __m256i bytes, bool stream) {
  if (stream && reinterpret_cast<uintptr_t>(keep) % 32 == 0)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(keep), bytes);
  else
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(keep), bytes);
}
#endif

// Stores a mask byte for each of the lowest `count` bits, 64 if there are more.
inline void store_mask(uint8_t* keep, uint64_t bits, int64_t count, bool stream) {
#if defined(__AVX512F__)
  const __m512i bytes = _mm512_maskz_set1_epi8(bits, 1);
  if (count >= 64)
    store_bytes(keep, bytes, stream);
  else
    _mm512_mask_storeu_epi8(keep, _bzhi_u64(~0ull, static_cast<uint32_t>(count)), bytes);
#else
  (void)stream;  // in pieces this small it gains nothing without AVX-512 (bf16 loses 6 %, Zen 3)
  int64_t i = 0;
#if defined(__AVX2__)
  // Every byte takes the byte of its bit, then that bit alone.
  const __m256i from =
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201ull));
  for (; i + 32 <= count && i < 64; i += 32) {
    const __m256i word = _mm256_set1_epi32(static_cast<int32_t>(bits >> i));
    const __m256i mine = _mm256_and_si256(_mm256_shuffle_epi8(word, from), bit);
    const __m256i bytes = _mm256_and_si256(_mm256_cmpeq_epi8(mine, bit), _mm256_set1_epi8(1));
    store_bytes(keep + i, bytes, false);
  }
#endif
  for (; i < (count < 64 ? count : 64); i += 8) {
    // Every byte takes its own bit of eight, then becomes 0 or 1: byte + 0x7f carries into bit 7.
    const uint64_t spread = (bits >> i & 0xff) * 0x0101010101010101ull & 0x8040201008040201ull;
    const uint64_t bytes = (spread + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
    std::memcpy(keep + i, &bytes, count - i < 8 ? count - i : 8);
  }
#endif
}
// Makes a thread's streamed stores visible before it reports that it is done.
inline void finish_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// keep[i] = keys[i] > bound
inline void keep_above(const int32_t* keys, int64_t n, int32_t bound, uint8_t* keep, bool stream) {
  int64_t i = 0;
  (void)stream;
#if defined(__AVX512F__)
  const __m512i b = _mm512_set1_epi32(bound);
  for (; i + 64 <= n; i += 64) {
    uint64_t bits = 0;
    for (int v = 0; v < 4; ++v)
      bits |=
          static_cast<uint64_t>(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(keys + i + 16 * v), b))
          << (16 * v);
    store_mask(keep + i, bits, 64, stream);
  }
#elif defined(__AVX2__)
  const __m256i b = _mm256_set1_epi32(bound);
  const auto above = [&](int64_t at) { return _mm256_cmpgt_epi32(load32_bytes(keys + at), b); };
  // Packing takes halves of two vectors in turns.
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (; i + 32 <= n; i += 32) {
    const __m256i words[2] = {_mm256_packs_epi32(above(i), above(i + 8)),
                              _mm256_packs_epi32(above(i + 16), above(i + 24))};
    const __m256i bytes =
        _mm256_and_si256(_mm256_packs_epi16(words[0], words[1]), _mm256_set1_epi8(1));
    store_bytes(keep + i, _mm256_permutevar8x32_epi32(bytes, in_order), stream);
  }
#endif
  for (; i < n; ++i) keep[i] = keys[i] > bound;
}

// Writes the mask of a cut, True = kept. A key that must stay pruned never survives, even where the
// quota is smaller than their number.
inline void write_mask(const int32_t* keys, int64_t n, Cut cut, uint8_t* keep, bool stream) {
  const int64_t split = after_tie(keys, n, cut.key, cut.ties);
  keep_above(keys, split, cut.key, keep, stream);
  const int32_t least = cut.key > kForbiddenKey ? cut.key : kForbiddenKey + 1;
  keep_above(keys + split, n - split, least - 1, keep + split, stream);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
