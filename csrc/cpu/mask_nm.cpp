#include "cpu/mask_nm.h"

#include <algorithm>

#include "cpu/cut.h"
#include "cpu/score.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// What all groups of a call share.
struct Rule {
  int64_t n, m;
  bool stream;  // see streamed()
};

// Groups of M lie inside one vector of keys. An element's rank is the number of group members that
// outrank it: a higher key, or the same key at a higher index. The r-th rotation of every group
// puts member (i + r) mod M over member i; where that index did not wrap, it is the higher one and
// an equal key counts too, which is `other > key - 1`.
//
// Returns how many elements it did; the caller finishes the rest.
template <int M>
inline int64_t rank_in_vector(const int32_t* keys, int64_t count, int n, uint8_t* keep) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i one = _mm512_set1_epi32(1), quota = _mm512_set1_epi32(n);
  const __m512i member = _mm512_and_si512(lane, _mm512_set1_epi32(M - 1));
  __m512i rotation[M];
  __mmask16 higher[M];
  for (int r = 1; r < M; ++r) {
    const __m512i moved = _mm512_add_epi32(member, _mm512_set1_epi32(r));
    higher[r] = _mm512_cmplt_epi32_mask(moved, _mm512_set1_epi32(M));
    rotation[r] = _mm512_or_si512(_mm512_andnot_si512(_mm512_set1_epi32(M - 1), lane),
                                  _mm512_and_si512(moved, _mm512_set1_epi32(M - 1)));
  }
  for (; i + 16 <= count; i += 16) {
    const __m512i key = _mm512_loadu_si512(keys + i);
    __m512i rank = _mm512_setzero_si512();
    for (int r = 1; r < M; ++r) {
      const __m512i other = _mm512_permutexvar_epi32(rotation[r], key);
      const __m512i bar = _mm512_mask_sub_epi32(key, higher[r], key, one);
      rank = _mm512_mask_add_epi32(rank, _mm512_cmpgt_epi32_mask(other, bar), rank, one);
    }
    // A key that must stay pruned is negative.
    const __mmask16 kept =
        _mm512_mask_cmplt_epi32_mask(_knot_mask16(_mm512_movepi32_mask(key)), rank, quota);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(keep + i), _mm_maskz_set1_epi8(kept, 1));
  }
#elif defined(__AVX2__)
  static_assert(M <= 8, "a group must fit the vector");
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i low = _mm256_set1_epi32(M - 1), quota = _mm256_set1_epi32(n);
  const __m256i member = _mm256_and_si256(lane, low);
  __m256i rotation[M], higher[M];
  for (int r = 1; r < M; ++r) {
    const __m256i moved = _mm256_add_epi32(member, _mm256_set1_epi32(r));
    higher[r] = _mm256_cmpgt_epi32(_mm256_set1_epi32(M), moved);  // -1 where not wrapped
    rotation[r] = _mm256_or_si256(_mm256_andnot_si256(low, lane), _mm256_and_si256(moved, low));
  }
  for (; i + 8 <= count; i += 8) {
    const __m256i key = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + i));
    __m256i rank = _mm256_setzero_si256();
    for (int r = 1; r < M; ++r) {
      const __m256i other = _mm256_permutevar8x32_epi32(key, rotation[r]);
      const __m256i bar = _mm256_add_epi32(key, higher[r]);
      rank = _mm256_sub_epi32(rank, _mm256_cmpgt_epi32(other, bar));
    }
    const __m256i kept = _mm256_and_si256(
        _mm256_cmpgt_epi32(quota, rank), _mm256_cmpgt_epi32(key, _mm256_set1_epi32(kForbiddenKey)));
    const uint32_t bits = _mm256_movemask_ps(_mm256_castsi256_ps(kept));
    const uint64_t bytes = _pdep_u64(bits, 0x0101010101010101ull);
    std::memcpy(keep + i, &bytes, 8);
  }
#else
  (void)keys, (void)count, (void)n, (void)keep;
#endif
  return i;
}

#if defined(__AVX2__)
// Where the keys come from: made on the spot, so that only weights and mask touch memory, or made
// before. Positions that must stay pruned are found among the latter only.
template <TermSet kTerms, class T>
struct FreshKeys {
  static constexpr bool kForbidden = false;
  const ScoreRow<T>& row;
  int64_t first;
  KeyVec at(int64_t i) const { return keys_at<kTerms>(row, first + i); }
  void fetch(int64_t i) const { fetch_block(row.w + first + i, kAhead); }
};
struct StoredKeys {
  static constexpr bool kForbidden = true;
  const int32_t* keys;
  KeyVec at(int64_t i) const { return load_keys(keys + i); }
  void fetch(int64_t) const {}
};
#endif

#if defined(__AVX512F__)
// 16 groups of four or eight at a time, member i of every group in vector i: ranks then need no
// shuffles. Outcomes of comparisons are the signs of differences, which cost half of a comparison
// into a mask register, and bitwise operations count them: a sign is a bit of a binary number that
// is spread over vectors.

// Of two vectors, the 32-bit lanes with even or odd numbers, 128 bits at a time.
inline __m512i even_lanes(__m512i a, __m512i b) {
  return _mm512_castps_si512(
      _mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0x88));
}
inline __m512i odd_lanes(__m512i a, __m512i b) {
  return _mm512_castps_si512(
      _mm512_shuffle_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), 0xdd));
}

// Splits the 64 keys from c: out[i] has those whose index is i mod 4. Key c + 4 * (4 * d + q) + i
// comes to lane 4 * q + d.
template <class Source>
inline void split_fours(const Source& keys, int64_t c, __m512i* out) {
  __m512i v[4];
  for (int i = 0; i < 4; ++i) v[i] = keys.at(c + 16 * i);
  const __m512i even[2] = {even_lanes(v[0], v[1]), even_lanes(v[2], v[3])};
  const __m512i odd[2] = {odd_lanes(v[0], v[1]), odd_lanes(v[2], v[3])};
  out[0] = even_lanes(even[0], even[1]);
  out[1] = even_lanes(odd[0], odd[1]);
  out[2] = odd_lanes(even[0], even[1]);
  out[3] = odd_lanes(odd[0], odd[1]);
}

// The signs of four members as bytes 0 or 1 of a lane.
inline __m512i bytes_of_signs(const __m512i* sign) {
  const auto or_masked = [](__m512i a, __m512i b, int mask) {  // a | (b & mask)
    return _mm512_ternarylogic_epi32(a, b, _mm512_set1_epi32(mask), 0xf8);
  };
  __m512i bytes = _mm512_srli_epi32(sign[0], 31);
  bytes = or_masked(bytes, _mm512_srli_epi32(sign[1], 23), 0x100);
  bytes = or_masked(bytes, _mm512_srli_epi32(sign[2], 15), 0x10000);
  return or_masked(bytes, _mm512_srli_epi32(sign[3], 7), 0x1000000);
}

// Truth table of "fewer than n of the three others outrank member i". The operands are the signs of
// key[later] - key[earlier] for the others in order: set where the earlier one outranks. An equal
// key at a higher index outranks, so for the others after i the outcome is the sign's complement.
constexpr int table_of_four(int i, int n) {
  int table = 0;
  for (int at = 0; at < 8; ++at) {
    int higher = 0;
    for (int other = 0; other < 3; ++other) higher += (at >> (2 - other) & 1) ^ (other >= i);
    table |= (higher < n) << at;
  }
  return table;
}

template <int N, class Source>
inline int64_t rank_fours(const Source& keys, int64_t count, Rule to, uint8_t* keep) {
  // Constants by name: unoptimised, a call would not be an immediate.
  constexpr int t0 = table_of_four(0, N), t1 = table_of_four(1, N);
  constexpr int t2 = table_of_four(2, N), t3 = table_of_four(3, N);
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    __m512i k[4];
    keys.fetch(i);
    split_fours(keys, i, k);
    const __m512i d01 = _mm512_sub_epi32(k[1], k[0]), d02 = _mm512_sub_epi32(k[2], k[0]);
    const __m512i d03 = _mm512_sub_epi32(k[3], k[0]), d12 = _mm512_sub_epi32(k[2], k[1]);
    const __m512i d13 = _mm512_sub_epi32(k[3], k[1]), d23 = _mm512_sub_epi32(k[3], k[2]);
    __m512i kept[4] = {
        _mm512_ternarylogic_epi32(d01, d02, d03, t0), _mm512_ternarylogic_epi32(d01, d12, d13, t1),
        _mm512_ternarylogic_epi32(d02, d12, d23, t2), _mm512_ternarylogic_epi32(d03, d13, d23, t3)};
    if (Source::kForbidden)
      for (int j = 0; j < 4; ++j) kept[j] = _mm512_andnot_si512(k[j], kept[j]);
    store_bytes(keep + i, _mm512_permutexvar_epi32(in_order, bytes_of_signs(kept)), to.stream);
  }
  return i;
}

// Three binary digits of equal weight to a sum digit and a carry.
inline __m512i sum_of(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0x96);
}
inline __m512i carry_of(__m512i a, __m512i b, __m512i c) {
  return _mm512_ternarylogic_epi32(a, b, c, 0xe8);
}

// Sign set where fewer than N of the seven signs are.
template <int N>
inline __m512i fewer_of_seven(const __m512i* x) {
  const __m512i a = sum_of(x[0], x[1], x[2]), b = sum_of(x[3], x[4], x[5]);
  const __m512i two[3] = {carry_of(x[0], x[1], x[2]), carry_of(x[3], x[4], x[5]),
                          carry_of(a, b, x[6])};
  if constexpr (N == 4) return _mm512_ternarylogic_epi32(two[0], two[1], two[2], 0x17);
  return _mm512_ternarylogic_epi32(carry_of(two[0], two[1], two[2]), sum_of(two[0], two[1], two[2]),
                                   sum_of(a, b, x[6]), (1 << N) - 1);
}

// The rare case of ties at the cut, in place: from the members' keys to a sign where fewer than N
// of the others outrank a member.
template <int N>
[[gnu::noinline]] void rank_with_ties(__m512i* members) {
  __m512i k[8], inverse[8];
  for (int j = 0; j < 8; ++j) {
    k[j] = members[j];
    inverse[j] = _mm512_xor_si512(k[j], _mm512_set1_epi32(-1));
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) {
    // Sign set where the other outranks j: key - other < 0, or <= 0 if the other comes later,
    // where key + ~other = key - other - 1.
    __m512i higher[7];
#pragma GCC unroll 8
    for (int o = 0; o < j; ++o) higher[o] = _mm512_sub_epi32(k[j], k[o]);
#pragma GCC unroll 8
    for (int o = j + 1; o < 8; ++o) higher[o - 1] = _mm512_add_epi32(k[j], inverse[o]);
    members[j] = fewer_of_seven<N>(higher);
  }
}

// Puts four keys in descending order.
inline void sort_four(const __m512i* k, __m512i* out) {
  const auto low = [](__m512i a, __m512i b) { return _mm512_min_epi32(a, b); };
  const auto high = [](__m512i a, __m512i b) { return _mm512_max_epi32(a, b); };
  const __m512i a = high(k[0], k[1]), b = low(k[0], k[1]);
  const __m512i c = high(k[2], k[3]), d = low(k[2], k[3]);
  const __m512i e = low(a, c), f = high(b, d);
  out[0] = high(a, c), out[1] = high(e, f), out[2] = low(e, f), out[3] = low(b, d);
}

// The N-th highest of two descending fours: the highest bar that i of one and N - i of the other
// reach, over all i.
template <int N>
inline __m512i highest(const __m512i* a, const __m512i* b) {
  __m512i found = N <= 4 ? _mm512_max_epi32(a[(N - 1) & 3], b[(N - 1) & 3])
                         : _mm512_min_epi32(a[3], b[(N - 5) & 3]);
#pragma GCC unroll 4
  for (int i = 1; i <= 4; ++i)
    if (i < N && N - i <= (N <= 4 ? 4 : 3))
      found = _mm512_max_epi32(found, _mm512_min_epi32(a[i - 1], b[N - i - 1]));
  if (N > 4) found = _mm512_max_epi32(found, _mm512_min_epi32(a[(N - 5) & 3], b[3]));
  return found;
}

template <int N, class Source>
inline int64_t rank_eights(const Source& keys, int64_t count, Rule to, uint8_t* keep) {
  // After the split by four and that of even and odd quarters, group 2 * d + 8 * (q / 2) + q % 2
  // is in lane 4 * q + d; these pick the first and the last eight groups from two halves.
  const __m512i first = _mm512_setr_epi32(0, 16, 4, 20, 1, 17, 5, 21, 2, 18, 6, 22, 3, 19, 7, 23);
  const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  int64_t i = 0;
  for (; i + 128 <= count; i += 128) {
    __m512i a[4], b[4], k[8], kept[8];
    keys.fetch(i);
    keys.fetch(i + 64);
    split_fours(keys, i, a);
    split_fours(keys, i + 64, b);
    for (int j = 0; j < 4; ++j) {
      k[j] = _mm512_shuffle_i32x4(a[j], b[j], 0x88);
      k[j + 4] = _mm512_shuffle_i32x4(a[j], b[j], 0xdd);
    }
    // Fewer than half of the operations that counting ranks takes, but the N-th and the next key
    // must differ in all groups.
    sort_four(k, a);
    sort_four(k + 4, b);
    const __m512i cut = highest<N>(a, b);
    if (_mm512_cmpeq_epi32_mask(cut, highest<N + 1>(a, b)) == 0) {
      const __m512i under = _mm512_sub_epi32(cut, _mm512_set1_epi32(1));
      for (int j = 0; j < 8; ++j) kept[j] = _mm512_sub_epi32(under, k[j]);
    } else {
      __m512i members[8];  // only these have an address: the others stay in registers
      std::copy_n(k, 8, members);
      rank_with_ties<N>(members);
      std::copy_n(members, 8, kept);
    }
    if (Source::kForbidden)
      for (int j = 0; j < 8; ++j) kept[j] = _mm512_andnot_si512(k[j], kept[j]);
    const __m512i low = bytes_of_signs(kept), high = bytes_of_signs(kept + 4);
    store_bytes(keep + i, _mm512_permutex2var_epi32(low, first, high), to.stream);
    store_bytes(keep + i + 64, _mm512_permutex2var_epi32(low, last, high), to.stream);
  }
  return i;
}

// The patterns in use have their own code. Returns how many elements it did.
template <class Source>
inline int64_t rank_transposed(const Source& keys, int64_t count, Rule to, uint8_t* keep) {
  const int64_t n = to.n, m = to.m;
  if (m == 4 && n == 1) return rank_fours<1>(keys, count, to, keep);
  if (m == 4 && n == 2) return rank_fours<2>(keys, count, to, keep);
  if (m == 4 && n == 3) return rank_fours<3>(keys, count, to, keep);
  if (m == 8 && n == 2) return rank_eights<2>(keys, count, to, keep);
  if (m == 8 && n == 4) return rank_eights<4>(keys, count, to, keep);
  if (m == 8 && n == 6) return rank_eights<6>(keys, count, to, keep);
  return 0;
}
#elif defined(__AVX2__)
// Eight groups of four at a time, member i of every group in vector i, and outcomes as signs, as
// above.

// Of two vectors, the 32-bit lanes with even or odd numbers, 128 bits at a time.
inline __m256i even_lanes(__m256i a, __m256i b) {
  return _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0x88));
}
inline __m256i odd_lanes(__m256i a, __m256i b) {
  return _mm256_castps_si256(
      _mm256_shuffle_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), 0xdd));
}

// Sign set where at least `least` of three signs are.
template <int kLeast>
inline __m256i some_of_three(__m256i a, __m256i b, __m256i c) {
  if constexpr (kLeast == 1) return _mm256_or_si256(_mm256_or_si256(a, b), c);
  if constexpr (kLeast == 3) return _mm256_and_si256(_mm256_and_si256(a, b), c);
  return _mm256_or_si256(_mm256_and_si256(a, b), _mm256_and_si256(c, _mm256_or_si256(a, b)));
}

template <int N, class Source>
inline int64_t rank_fours(const Source& keys, int64_t count, Rule to, uint8_t* keep) {
  // The split leaves group 2 * d + q in lane 4 * q + d.
  const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i all = _mm256_set1_epi32(-1);
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    keys.fetch(i);
    for (int64_t at = i; at < i + 64; at += 32) {
      const __m256i v[4] = {keys.at(at), keys.at(at + 8), keys.at(at + 16), keys.at(at + 24)};
      const __m256i even[2] = {even_lanes(v[0], v[1]), even_lanes(v[2], v[3])};
      const __m256i odd[2] = {odd_lanes(v[0], v[1]), odd_lanes(v[2], v[3])};
      const __m256i k[4] = {even_lanes(even[0], even[1]), even_lanes(odd[0], odd[1]),
                            odd_lanes(even[0], even[1]), odd_lanes(odd[0], odd[1])};
      // The sign of key[later] - key[earlier]: the earlier one outranks. Where it is clear the
      // later one does, of equal keys too.
      const auto minus = [&](int a, int b) { return _mm256_sub_epi32(k[a], k[b]); };
      const __m256i d01 = minus(1, 0), d02 = minus(2, 0), d03 = minus(3, 0);
      const __m256i d12 = minus(2, 1), d13 = minus(3, 1), d23 = minus(3, 2);
      const auto no = [&](__m256i x) { return _mm256_xor_si256(x, all); };
      // Kept: at least 4 - N of the others are outranked.
      __m256i kept[4] = {some_of_three<4 - N>(d01, d02, d03),
                         some_of_three<4 - N>(no(d01), d12, d13),
                         some_of_three<4 - N>(no(d02), no(d12), d23),
                         some_of_three<4 - N>(no(d03), no(d13), no(d23))};
      if (Source::kForbidden)
        for (int j = 0; j < 4; ++j) kept[j] = _mm256_andnot_si256(k[j], kept[j]);
      // Signs to the four bytes of a lane.
      const __m256i words[2] = {_mm256_srli_epi32(kept[0], 31), _mm256_srli_epi32(kept[1], 31)};
      const __m256i low = _mm256_or_si256(words[0], _mm256_slli_epi32(words[1], 8));
      const __m256i third = _mm256_slli_epi32(_mm256_srli_epi32(kept[2], 31), 16);
      const __m256i last = _mm256_slli_epi32(_mm256_srli_epi32(kept[3], 31), 24);
      const __m256i bytes = _mm256_or_si256(low, _mm256_or_si256(third, last));
      store_bytes(keep + at, _mm256_permutevar8x32_epi32(bytes, in_order), to.stream);
    }
  }
  return i;
}

template <class Source>
inline int64_t rank_transposed(const Source& keys, int64_t count, Rule to, uint8_t* keep) {
  if (to.m == 4 && to.n == 1) return rank_fours<1>(keys, count, to, keep);
  if (to.m == 4 && to.n == 2) return rank_fours<2>(keys, count, to, keep);
  if (to.m == 4 && to.n == 3) return rank_fours<3>(keys, count, to, keep);
  return 0;
}
#endif

// Columns [c0, c1) of a row, as far as no keys need to be stored for them. Returns how many.
template <class T>
inline int64_t keep_fresh(const ScoreRow<T>& row, int64_t c0, int64_t c1, Rule to, uint8_t* keep) {
#if defined(__AVX2__)
  if (row.addend || row.preserve || row.has_row_scale) return 0;
  if (!row.column_scale)
    return rank_transposed(FreshKeys<TermSet::none, T>{row, c0}, c1 - c0, to, keep);
  return rank_transposed(FreshKeys<TermSet::columns, T>{row, c0}, c1 - c0, to, keep);
#else
  (void)row, (void)c0, (void)c1, (void)to, (void)keep;
  return 0;
#endif
}

// The same by plain loops, for any small group.
inline void rank_in_group(const int32_t* key, int m, int n, uint8_t* keep) {
  for (int i = 0; i < m; ++i) {
    int rank = 0;
    for (int j = 0; j < i; ++j) rank += key[j] > key[i];
    for (int j = i + 1; j < m; ++j) rank += key[j] >= key[i];
    keep[i] = rank < n && key[i] != kForbiddenKey;
  }
}

// Pieces of this length are the unit of work. Where keys are stored they stay in the first-level
// cache; streamed stores of the mask hold up the stores of keys behind them, so that much shorter
// pieces, which mix the two, take half as long again.
constexpr int64_t kPiece = 2048;

// Selects by rank counting up to this group size; its cost grows with the square.
constexpr int64_t kMaxRanked = 32;

inline void keep_groups(const int32_t* keys, int64_t count, Rule to, uint8_t* keep,
                        int32_t* scratch) {
  const int quota = static_cast<int>(to.n);
  const int64_t m = to.m;
  int64_t i = 0;
#if defined(__AVX2__)
  i = rank_transposed(StoredKeys{keys}, count, to, keep);
#endif
  if (m == 4)
    i += rank_in_vector<4>(keys + i, count - i, quota, keep + i);
  else if (m == 8)
    i += rank_in_vector<8>(keys + i, count - i, quota, keep + i);
#if defined(__AVX512F__)
  else if (m == 16)
    i = rank_in_vector<16>(keys, count, quota, keep);
#endif
  for (; i < count; i += m) {
    const int32_t* const key = keys + i;
    if (m <= kMaxRanked)
      rank_in_group(key, static_cast<int>(m), quota, keep + i);
    else
      write_mask(key, m, to.n < m ? find_cut(key, m, m - to.n, scratch) : Cut{0, 0}, keep + i,
                 to.stream);
  }
}

}  // namespace

void mask_nm(const MaskNmArgs& args) {
  const int64_t rows = args.w.shape[0], cols = args.w.shape[1];
  // Pieces of whole groups, so that a single long row is shared out as well.
  const int64_t piece = std::max(args.m, kPiece / args.m * args.m);
  const int64_t pieces = (cols + piece - 1) / piece;
  const int64_t scratch_size = 3 * (piece + kSlack);
  const Scratch<int32_t> buffers(scratch_size * args.threads);
  const Rule rule{args.n, args.m, streamed(args.mask)};
  with_float_type(args.w.dtype, [&](auto* tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
#pragma omp parallel num_threads(args.threads)
    {
      int32_t* const keys = buffers.get() + scratch_size * thread_index();
#pragma omp for schedule(static) nowait
      for (int64_t item = 0; item < rows * pieces; ++item) {
        const int64_t i = item / pieces, c0 = item % pieces * piece;
        const int64_t c1 = std::min(cols, c0 + piece);
        const ScoreRow<T> row = score_row<T>(args.w, args.terms, i);
        uint8_t* const keep = args.mask.ptr<uint8_t>() + i * cols + c0;
        const int64_t done = keep_fresh(row, c0, c1, rule, keep);
        if (done == c1 - c0) continue;
        score_keys(row, c0 + done, c1, keys);
        keep_groups(keys, c1 - c0 - done, rule, keep + done, keys + piece + kSlack);
      }
      finish_stores();
    }
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
