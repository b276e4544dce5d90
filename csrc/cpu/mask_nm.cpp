#include "cpu/mask_nm.h"

#include <algorithm>

#include "cpu/score.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

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
    // A key that must stay pruned is 0 and drops out of the test mask.
    const __mmask16 kept =
        _mm512_mask_cmplt_epi32_mask(_mm512_test_epi32_mask(key, key), rank, quota);
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
    const __m256i kept = _mm256_and_si256(_mm256_cmpgt_epi32(quota, rank),
                                          _mm256_cmpgt_epi32(key, _mm256_setzero_si256()));
    const uint32_t bits = _mm256_movemask_ps(_mm256_castsi256_ps(kept));
    const uint64_t bytes = _pdep_u64(bits, 0x0101010101010101ull);
    std::memcpy(keep + i, &bytes, 8);
  }
#else
  (void)keys, (void)count, (void)n, (void)keep;
#endif
  return i;
}

#if defined(__AVX512F__)
// Groups of four, 64 keys at a time. Of the three rotations two are compared; the third is the
// first seen from the other side: member i - 1 outranks i exactly where i does not outrank it. The
// ranks are never counted: of the three outcome bits of a member, none (keep 1), fewer than two
// (keep 2) or not all (keep 3) may be set.
inline int64_t rank_fours(const int32_t* keys, int64_t count, int n, bool forbidden,
                          uint8_t* keep) {
  const __m512i first = _mm512_set4_epi32(0, 1, 1, 1);  // members whose next one has a higher index
  const __m512i second = _mm512_set4_epi32(0, 0, 1, 1);  // and the next but one
  int64_t i = 0;
  for (; i + 64 <= count; i += 64) {
    uint64_t next = 0, opposite = 0, allowed = ~0ull;
    for (int v = 0; v < 4; ++v) {
      const __m512i key = _mm512_loadu_si512(keys + i + 16 * v);
      const __m512i one_on = _mm512_shuffle_epi32(key, _MM_PERM_ADCB);
      const __m512i two_on = _mm512_shuffle_epi32(key, _MM_PERM_BADC);
      const auto at = [v](__mmask16 m) { return static_cast<uint64_t>(m) << (16 * v); };
      next |= at(_mm512_cmpgt_epi32_mask(one_on, _mm512_sub_epi32(key, first)));
      opposite |= at(_mm512_cmpgt_epi32_mask(two_on, _mm512_sub_epi32(key, second)));
      if (forbidden) allowed &= ~at(_mm512_testn_epi32_mask(key, key));
    }
    const uint64_t last =
        ~((next << 1 & 0xeeeeeeeeeeeeeeeeull) | (next >> 3 & 0x1111111111111111ull));
    uint64_t lost = next & opposite & last;
    if (n == 1) lost = next | opposite | last;
    if (n == 2) lost = (next & opposite) | (last & (next | opposite));
    if (n == 4) lost = 0;
    store_mask(keep + i, ~lost & allowed);
  }
  return i;
}
#endif

// The same by plain loops, for any small group.
inline void rank_in_group(const int32_t* key, int m, int n, uint8_t* keep) {
  for (int i = 0; i < m; ++i) {
    int rank = 0;
    for (int j = 0; j < i; ++j) rank += key[j] > key[i];
    for (int j = i + 1; j < m; ++j) rank += key[j] >= key[i];
    keep[i] = rank < n && key[i] != kForbiddenKey;
  }
}

// Selects by rank counting up to this group size; its cost grows with the square.
constexpr int64_t kMaxRanked = 32;

inline void keep_groups(const int32_t* keys, int64_t count, int64_t n, int64_t m, bool forbidden,
                        uint8_t* keep, int32_t* scratch) {
  const int quota = static_cast<int>(n);
  int64_t i = 0;
  (void)forbidden;
#if defined(__AVX512F__)
  if (m == 4) i = rank_fours(keys, count, quota, forbidden, keep);
#endif
  if (m == 4)
    i += rank_in_vector<4>(keys + i, count - i, quota, keep + i);
  else if (m == 8)
    i = rank_in_vector<8>(keys, count, quota, keep);
#if defined(__AVX512F__)
  else if (m == 16)
    i = rank_in_vector<16>(keys, count, quota, keep);
#endif
  for (; i < count; i += m) {
    if (m <= kMaxRanked)
      rank_in_group(keys + i, static_cast<int>(m), quota, keep + i);
    else
      write_mask(keys + i, m, n < m ? find_cut(keys + i, m, m - n, scratch) : Cut{0, 0}, keep + i);
  }
}

}  // namespace

void mask_nm(const MaskNmArgs& args) {
  const int64_t rows = args.w.shape[0], cols = args.w.shape[1];
  // Pieces of whole groups are the unit of work: a single long row is shared out as well.
  const int64_t piece = std::max(args.m, kPiece / args.m * args.m);
  const int64_t pieces = (cols + piece - 1) / piece;
  const int64_t scratch_size = 3 * (piece + kSlack);
  const Scratch<int32_t> buffers(scratch_size * args.threads);
  const bool forbidden = args.terms.preserve.data != nullptr;
  with_float_type(args.w.dtype, [&](auto* tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
#pragma omp parallel num_threads(args.threads)
    {
      int32_t* const keys = buffers.get() + scratch_size * thread_index();
#pragma omp for schedule(static) nowait
      for (int64_t item = 0; item < rows * pieces; ++item) {
        const int64_t i = item / pieces, c0 = item % pieces * piece;
        const int64_t c1 = std::min(cols, c0 + piece);
        score_keys(score_row<T>(args.w, args.terms, i), c0, c1, keys);
        keep_groups(keys, c1 - c0, args.n, args.m, forbidden,
                    args.mask.ptr<uint8_t>() + i * cols + c0, keys + piece + kSlack);
      }
      finish_stores();
    }
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
