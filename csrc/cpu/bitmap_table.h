// Bitmaps with bf16 x of many rows, by tables of pairs (pair_table.h). Where dense columns take two
// products a group of four, a group whose kept columns are at most two takes one, and an empty one
// none: at 50 % 1.25 on average, at 70 % 0.84.
//
// What a group needs is looked up by its four bits of mask: the places of one or two pairs of
// columns in the tables, and a shuffle that picks their weights from the spread row. A row's pairs
// are a list, so that no product branches; lists are made once for all rows of x, and four rows of
// W go side by side, their lists filled up to the longest with pairs of zeros that meet a vector of
// zeros. A lone column goes with one that is not kept: wherever a product meets an infinity of x
// that a weight of zero hides from it, so does the dense product.
//
// Zen 4, 128 columns of a row at 50 %: some 60 cycles to make a list of 40 pairs in the cache, 100
// from memory; 1.1 cycles a product and 44 for each four lists.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "cpu/pair_table.h"
#include "cpu/sparse_bf16.h"
#include "cpu/sparse_rows.h"

#if defined(__AVX512F__)

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int64_t kListWords = TableShape<2>::kWords;  // of columns, at most
constexpr int kListPairs = static_cast<int>(kListWords) * kWordPairs;
constexpr int kPairUnit = 64;  // an entry of a table in these: what one vector of x takes

// What eight groups, four columns each, make of their masks: for each of the 16 masks eight bytes
// that pick two pairs of columns from the group's four, and the entries of these pairs in units of
// kPairUnit, negative where there is no such pair.
struct PairsOfMask {
  uint8_t pick[16][8];
  int32_t entry[16][2];
  constexpr PairsOfMask() : pick(), entry() {
    for (int mask = 0; mask < 16; ++mask) {
      int pairs[2][2] = {}, count = 0;
      const auto add = [&](int a, int b) { pairs[count][0] = a, pairs[count][1] = b, ++count; };
      const bool low = mask & 3, high = mask & 12;
      int kept[4] = {}, columns = 0;
      for (int c = 0; c < 4; ++c)
        if (mask >> c & 1) kept[columns++] = c;
      if (columns == 2) {
        add(kept[0], kept[1]);
      } else {  // two neighbours, or a column with its neighbour that is not kept
        if (low) add(0, 1);
        if (high) add(2, 3);
      }
      for (int p = 0; p < 2; ++p) {
        const auto [a, b] = pairs[p];
        entry[mask][p] = p < count ? (a + 4 * b) * kPairUnit : INT32_MIN / 2;
        for (int byte = 0; byte < 2; ++byte) {
          pick[mask][4 * p + byte] = static_cast<uint8_t>(2 * a + byte);
          pick[mask][4 * p + 2 + byte] = static_cast<uint8_t>(2 * b + byte);
        }
      }
    }
  }
};
alignas(64) constexpr PairsOfMask kPairsOfMask;

// The pairs of a row's block of columns: weights, and where in the tables their activations are.
struct PairList {
  static constexpr int kSlack = 16;  // written past the last
  alignas(64) uint32_t weights[kListPairs + kSlack];
  uint16_t entries[kListPairs + kSlack];
};
static_assert((kListWords * kWordGroups * kGroupEntries + kMostEntries) * kPairUnit < 1 << 16);

// Whether m rows of x make up for the lists: by share p of the columns kept, tables and tiles
// (sparse_gemm.h) take as long at some 40 rows at 0.1, 85 at 0.3, 150 at 0.5 and 220 at 0.7 (4096 x
// 4096, two Zen 4 cores). Denser ones gain less than 1 in 20. int8 values would ask for a sixth
// more rows, but with fewer they are widened to bf16 and come here as such.
inline bool tables_pay(const Weights& w, int64_t m) {
  const double size = static_cast<double>(w.rows) * static_cast<double>(w.cols);
  const double p = static_cast<double>(w.nnz) / size;
  return p <= 0.75 && static_cast<double>(m) >= 24 + 128 * p + 224 * p * p;
}

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512vbmi2,avx512vpopcntdq,bmi2")

// 32 columns of which `keep` are stored from `v` on, spread out, as bf16.
inline __m512i spread_columns(const bf16* v, uint32_t keep) { return expand_words(keep, v); }
inline __m512i spread_columns(const int8_t* v, uint32_t keep) {
  const __m256i q = _mm256_maskz_expandloadu_epi8(keep, v);
  const auto half = [](__m128i p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(p)); };
  return reinterpret_cast<__m512i>(
      _mm512_cvtne2ps_pbh(half(_mm256_extracti128_si256(q, 1)), half(_mm256_castsi256_si128(q))));
}

// Lists the pairs of `words` words of columns; returns how many. `next` goes on to the next
// column's value.
template <class T>
inline int list_pairs(const T*& next, const uint64_t* masks, int64_t words, PairList& list) {
  const auto table = [](const void* p, int half) __attribute__((always_inline)) {
    return _mm512_load_si512(static_cast<const char*>(p) + 64 * half);
  };
  const __m512i pick0 = table(kPairsOfMask.pick, 0), pick1 = table(kPairsOfMask.pick, 1);
  const __m512i entry0 = table(kPairsOfMask.entry, 0), entry1 = table(kPairsOfMask.entry, 1);
  // Bytes are picked within 128 bits: every second group has its columns in the upper half.
  const __m512i upper = _mm512_set4_epi64(0x0808080808080808, 0, 0x0808080808080808, 0);
  const __m512i nibbles = _mm512_set_epi64(28, 24, 20, 16, 12, 8, 4, 0);
  constexpr int kStep = kGroupEntries * kPairUnit;
  const __m512i groups = _mm512_setr_epi32(0, 0, kStep, kStep, 2 * kStep, 2 * kStep, 3 * kStep,
                                           3 * kStep, 4 * kStep, 4 * kStep, 5 * kStep, 5 * kStep,
                                           6 * kStep, 6 * kStep, 7 * kStep, 7 * kStep);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int count = 0;
  const T* v = next;
  for (int64_t i = 0; i < 2 * words; ++i) {
    const uint32_t keep = static_cast<uint32_t>(masks[i / 2] >> (32 * (i & 1)));
    const __m512i columns = spread_columns(v, keep);
    v += popcount(keep);
    // Lookups take the lowest four bits of an index.
    const __m512i mask = _mm512_srlv_epi64(_mm512_set1_epi64(keep), nibbles);
    const __m512i pick = _mm512_permutex2var_epi64(pick0, mask, pick1);
    const __m512i pairs = _mm512_shuffle_epi8(columns, _mm512_add_epi8(pick, upper));
    const __m512i base =
        _mm512_add_epi32(groups, _mm512_set1_epi32(static_cast<int>(8 * i * kStep)));
    const __m512i entries = _mm512_add_epi32(_mm512_permutex2var_epi64(entry0, mask, entry1), base);
    const __mmask16 there = _knot_mask16(_mm512_movepi32_mask(entries));
    // One compression for both.
    const __m512i from = compress_dwords(there, lanes);
    _mm512_storeu_si512(list.weights + count, _mm512_permutexvar_epi32(from, pairs));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(list.entries + count),
                        _mm512_cvtepi32_epi16(_mm512_permutexvar_epi32(from, entries)));
    count += popcount(there);
  }
  next = v;
  return count;
}

// Four pairs of weights are fetched at once.
constexpr int kListStep = 4;

// Fills the list from `count` to `longest` pairs up.
inline void fill_pairs(PairList& list, int count, int longest) {
  for (int i = count; i < longest; i += PairList::kSlack) {
    _mm512_storeu_si512(list.weights + i, _mm512_setzero_si512());
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(list.entries + i), _mm256_setzero_si256());
  }
}

// Adds `count` pairs of each of the lists of four rows, a multiple of kListStep, to the rows' sums.
template <int V>
inline void multiply_lists(const PairList* lists, const uint16_t* rows, int count,
                           const char* table, float* all_sums) {
  using S = TableShape<V>;
  const PairList* list[kTableSide];
  float* sums[kTableSide];
  for (int r = 0; r < kTableSide; ++r) {
    list[r] = lists + rows[r];
    sums[r] = all_sums + rows[r] * S::kLanes;
  }
  // The next four rows are anywhere.
  for (int r = kTableSide; r < 2 * kTableSide; ++r) {
    const PairList& next = lists[rows[r]];
    for (int i = 0; i < count; i += 16) __builtin_prefetch(next.weights + i);
    for (int i = 0; i < count; i += 32) __builtin_prefetch(next.entries + i);
    for (int v = 0; v < V; ++v) __builtin_prefetch(all_sums + rows[r] * S::kLanes + 16 * v);
  }
  __m512 acc[kTableSide][S::kChains][V];
#pragma GCC unroll 4
  for (int r = 0; r < kTableSide; ++r) load_sums(sums[r], acc[r]);
  constexpr auto kFour = std::make_integer_sequence<int, kListStep>();
#pragma GCC unroll 1
  for (int i = 0; i < count; i += kListStep) {
    __m512i four[kTableSide];  // pairs of weights, in every 128 bits
    uint64_t entries[kTableSide];
#pragma GCC unroll 4
    for (int r = 0; r < kTableSide; ++r) {
      four[r] = _mm512_broadcast_i32x4(
          _mm_load_si128(reinterpret_cast<const __m128i*>(list[r]->weights + i)));
      std::memcpy(&entries[r], list[r]->entries + i, 8);
    }
    each(kFour, [&](auto j) __attribute__((always_inline)) {
      constexpr auto kOne = static_cast<_MM_PERM_ENUM>(decltype(j)::value * 0x55);
#pragma GCC unroll 4
      for (int r = 0; r < kTableSide; ++r) {
        const char* x = table + V * static_cast<uint16_t>(entries[r] >> 16 * decltype(j)::value);
        const __m512i w = _mm512_shuffle_epi32(four[r], kOne);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          add_product(acc[r][decltype(j)::value % S::kChains][v], w, x + 64 * v);
      }
    });
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTableSide; ++r) store_sums(acc[r], sums[r]);
}

#pragma GCC pop_options

// Rows of a bitmap, T bf16 or int8. A row that is inconsistent is noted in `broken`.
template <class T>
class BitmapSource {
 public:
  static constexpr int64_t kPass = 512;
  static constexpr int64_t kMostWords = kListWords;

  BitmapSource(const Weights& w, int64_t block, char* memory, std::atomic<int64_t>* broken)
      : w_(w),
        broken_(broken),
        lists_(reinterpret_cast<PairList*>(memory)),
        words_of_row_(reinterpret_cast<uint64_t*>(lists_ + padded(block))) {}
  static int64_t scratch(int64_t block, const Weights& w) {
    return padded(block) * static_cast<int64_t>(sizeof(PairList)) + mask_words(w.cols) * 8;
  }

  bool begin(int64_t r0, int64_t count, int64_t next) {
    r0_ = r0, count_ = count, next_ = next;
    for (int64_t r = 0; r < count; ++r) {
      if (!bitmap_row(w_, r0 + r, words_of_row_)) {
        broken_->store(r0 + r, std::memory_order_relaxed);
        return false;
      }
      cursors_[r] = static_cast<const T*>(w_.values) + w_.begin(r0 + r);
    }
    return true;
  }

  void take(int64_t i0, int64_t words, bool last) {
    i0_ = i0, words_ = words, last_ = last;
    for (int64_t r = 0; r < count_; ++r) {
      uint64_t masks[kListWords];
      for (int64_t i = 0; i < words; ++i) masks[i] = mask_at(r0_ + r, i0 + i);
      counts_[r] = static_cast<uint8_t>(list_pairs(cursors_[r], masks, words, lists_[r]));
    }
    for (int64_t r = count_; r < padded(count_); ++r) counts_[r] = 0;
    sort_by_length();
    for (int64_t g = 0; g < padded(count_); g += kTableSide) {
      const int longest =
          (counts_[order_[g + kTableSide - 1]] + kListStep - 1) / kListStep * kListStep;
      for (int64_t k = g; k < g + kTableSide; ++k)
        fill_pairs(lists_[order_[k]], counts_[order_[k]], longest);
      longest_[g / kTableSide] = longest;
    }
  }

  template <int V>
  void multiply(const char* table, float* sums, bool first) const {
    for (int64_t g = 0; g < padded(count_); g += kTableSide) {
      if (first) fetch_ahead(g);
      multiply_lists<V>(lists_, &order_[g], longest_[g / kTableSide], table, sums);
    }
  }

 private:
  static constexpr int64_t padded(int64_t rows) {
    return (rows + kTableSide - 1) / kTableSide * kTableSide;
  }

  // Rows side by side should have lists of one length, and those that follow the same again: less
  // is filled up, and the processor foresees where the loops over them end.
  void sort_by_length() {
    int starts[kListPairs + 2] = {};
    const int64_t rows = padded(count_);
    for (int64_t r = 0; r < rows; ++r) ++starts[counts_[r] + 1];
    for (int n = 0; n <= kListPairs; ++n) starts[n + 1] += starts[n];
    for (int64_t r = 0; r < rows; ++r) order_[starts[counts_[r]]++] = static_cast<uint16_t>(r);
  }

  // Word i of a row's mask. The row has been checked: nothing is set past its columns.
  uint64_t mask_at(int64_t row, int64_t i) const {
    uint64_t word = 0;
    const uint8_t* at = w_.meta + row * w_.meta_stride + 8 * i;
    if (8 * (i + 1) <= w_.meta_stride)
      std::memcpy(&word, at, 8);
    else
      std::memcpy(&word, at, static_cast<size_t>(w_.meta_stride - 8 * i));
    return word;
  }

  // Fetches what rows [r, r + 4) list next into the second level: their next columns, or the next
  // block's first. As many lines as half of these columns take, and two more.
  void fetch_ahead(int64_t r) const {
    const int64_t lines = words_ * kWordPairs * static_cast<int64_t>(sizeof(T)) / 64 + 2;
    for (int64_t k = r; k < std::min(r + kTableSide, count_); ++k) {
      const int64_t row = last_ ? std::min(next_ + k, w_.rows - 1) : r0_ + k;
      const T* v = last_ ? static_cast<const T*>(w_.values) + w_.begin_within(row) : cursors_[k];
      for (int64_t line = 0; line < lines; ++line)
        __builtin_prefetch(reinterpret_cast<const char*>(v) + 64 * line, 0, 2);
      __builtin_prefetch(w_.meta + row * w_.meta_stride + (last_ ? 0 : 8 * (i0_ + words_)), 0, 2);
    }
  }

  const Weights& w_;
  std::atomic<int64_t>* const broken_;
  PairList* const lists_;         // of the block's rows
  uint64_t* const words_of_row_;  // for a mask that is not whole words, while it is checked
  int64_t r0_ = 0, count_ = 0, next_ = 0, i0_ = 0, words_ = 0;
  bool last_ = false;
  std::array<const T*, kTableRows> cursors_;  // of the rows, at what is to be listed next
  std::array<uint8_t, kTableRows> counts_;    // pairs in each row's list
  std::array<uint16_t, kTableRows + kTableSide> order_ = {};  // the rows, shortest list first
  std::array<int, kTableRows / kTableSide> longest_;          // list of four rows in this order
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
