// 2:4 with bf16 x of many rows, by tables of pairs (pair_table.h): a group of a row of W takes one
// product, of the vector that its four bits of metadata name. Gathering (sparse_gather.h) takes one
// and a permute, which is better only where lanes would be empty. Codes that no valid matrix has
// read some other entry.
//
// Zen 4, all in the second level: 1.4 cycles a product, 1.25 where two vectors share the shuffle
// and the address.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/pair_table.h"
#include "cpu/sparse_rows.h"

#if defined(__AVX512F__)

namespace pyprune {
namespace PYPRUNE_ISA {

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512vbmi2,avx512vpopcntdq")

// A word's 32 weights as bf16, which holds an int8 exactly.
inline __m512i load_weights(const bf16* v) { return _mm512_loadu_si512(v); }
inline __m512i load_weights(const int8_t* v) {
  const auto half = [](const int8_t* p) __attribute__((always_inline)) {
    const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
  };
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(half(v + 16), half(v)));
}

// Rows of W that are multiplied side by side, at the first column of a block.
template <class T>
struct TableRows {
  const T* v[kTableSide];
  const uint8_t* meta[kTableSide];
  int64_t near,
      far;  // bytes from here to the values that are fetched into the first and second level
};

// Adds `words` words of columns of four rows of W times one chunk of x to the rows' sums.
template <class T, int V>
inline void table_words(const TableRows<T>& rows, int64_t words, const char* table, float* sums) {
  using S = TableShape<V>;
  __m512 acc[kTableSide][S::kChains][V];
#pragma GCC unroll 4
  for (int r = 0; r < kTableSide; ++r) load_sums(sums + r * S::kLanes, acc[r]);
#pragma GCC unroll 1
  for (int64_t i = 0; i < words; ++i, table += S::kWordBytes) {
    uint64_t meta[kTableSide];
    __m512i weights[kTableSide];
#pragma GCC unroll 4
    for (int r = 0; r < kTableSide; ++r) {
      const T* v = rows.v[r] + i * kWordPairs;
      std::memcpy(&meta[r], rows.meta[r] + 8 * i, 8);
      weights[r] = load_weights(v);
      _mm_prefetch(reinterpret_cast<const char*>(v) + rows.near, _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(v) + rows.far, _MM_HINT_T1);
    }
    constexpr auto kFour = std::make_integer_sequence<int, 4>();
    each(kFour, [&](auto q) __attribute__((always_inline)) {
      __m512i four[kTableSide];  // four pairs of weights in every 128 bits
#pragma GCC unroll 4
      for (int r = 0; r < kTableSide; ++r)
        four[r] = _mm512_shuffle_i32x4(weights[r], weights[r], decltype(q)::value * 0x55);
      each(kFour, [&](auto j) __attribute__((always_inline)) {
        constexpr int kGroup = 4 * decltype(q)::value + decltype(j)::value;
        constexpr auto kOne = static_cast<_MM_PERM_ENUM>(decltype(j)::value * 0x55);
        constexpr int kRotate = (4 * kGroup - S::kShift) & 63;
#pragma GCC unroll 4
        for (int r = 0; r < kTableSide; ++r) {
          const uint64_t code = meta[r] >> kRotate | meta[r] << (64 - kRotate);
          const char* x =
              table + kGroup * kGroupEntries * S::kEntry + (code & (uint64_t{15} << S::kShift));
          const __m512i w = _mm512_shuffle_epi32(four[r], kOne);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) add_product(acc[r][kGroup % S::kChains][v], w, x + 64 * v);
        }
      });
    });
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTableSide; ++r) store_sums(acc[r], sums + r * S::kLanes);
}

// The same where the last of the words is the one that the matrix ends in, of `left` columns: it is
// copied, so that nothing past it is read. Past the end there are zeros, which meet zeros.
template <class T, int V>
void table_tail(const TableRows<T>& rows, int64_t words, int64_t left, const char* table,
                float* sums) {
  if (words > 1) table_words<T, V>(rows, words - 1, table, sums);
  T values[kTableSide][kWordPairs] = {};
  uint8_t meta[kTableSide][8];
  std::memset(meta, 0x44, sizeof(meta));
  TableRows<T> last = {};
  for (int r = 0; r < kTableSide; ++r) {
    std::memcpy(values[r], rows.v[r] + (words - 1) * kWordPairs,
                static_cast<size_t>(left / 2) * sizeof(T));
    std::memcpy(meta[r], rows.meta[r] + 8 * (words - 1), static_cast<size_t>(left / 8));
    last.v[r] = values[r];
    last.meta[r] = meta[r];
  }
  table_words<T, V>(last, 1, table + (words - 1) * TableShape<V>::kWordBytes, sums);
}

#pragma GCC pop_options

// 2:4 rows, T bf16 or int8.
template <class T>
class Source24 {
 public:
  static constexpr int64_t kPass = 256;
  static constexpr int64_t kMostWords = TableShape<1>::kWords;

  Source24(const Weights& w, int64_t, char*) : w_(w) {}
  static int64_t scratch(int64_t, const Weights&) { return 0; }

  bool begin(int64_t r0, int64_t count, int64_t next) {
    r0_ = r0, count_ = count, next_ = next;
    return true;  // nothing to check: a row has as many values as it must, and any code reads a
                  // table
  }
  void take(int64_t i0, int64_t words, bool last) { i0_ = i0, words_ = words, last_ = last; }

  template <int V>
  void multiply(const char* table, float* sums, bool first) const {
    const bool tail = (i0_ + words_) * kMaskColumns > w_.cols;
    // What is fetched into the second level meanwhile, once: the rows' next columns, or the next
    // rows' first.
    const int64_t rows_on = last_ ? next_ - r0_ : 0, words_on = last_ ? -i0_ : words_;
    const int64_t meta_ahead = first ? rows_on * w_.meta_stride + words_on * 8 : 0;
    TableRows<T> rows;
    rows.near = kTableSide * w_.cols / 2 * kBytes;  // the next four rows
    rows.far = first ? (rows_on * w_.cols / 2 + words_on * kWordPairs) * kBytes : 0;
    for (int64_t r = 0; r < count_; r += kTableSide, sums += kTableSide * TableShape<V>::kLanes) {
      for (int k = 0; k < kTableSide; ++k) {
        const int64_t row = r0_ + std::min(r + k, count_ - 1);  // the last row may come again
        rows.v[k] = static_cast<const T*>(w_.values) + w_.begin(row) + i0_ * kWordPairs;
        rows.meta[k] = w_.meta + row * w_.meta_stride + 8 * i0_;
        __builtin_prefetch(rows.meta[k] + kTableSide * w_.meta_stride);
        __builtin_prefetch(rows.meta[k] + meta_ahead, 0, 2);
      }
      if (tail)
        table_tail<T, V>(rows, words_, w_.cols % kMaskColumns, table, sums);
      else
        table_words<T, V>(rows, words_, table, sums);
    }
  }

 private:
  static constexpr int64_t kBytes = sizeof(T);

  const Weights& w_;
  int64_t r0_ = 0, count_ = 0, next_ = 0, i0_ = 0, words_ = 0;
  bool last_ = false;
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
