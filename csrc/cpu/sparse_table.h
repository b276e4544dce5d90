// 2:4 with bf16 x of many rows: the rows of x lie in the lanes, and a table holds every pair of
// activations that two stored weights can meet.
//
// Two weights of a group of four columns meet one of six pairs of its activations. The table has
// all six, as vectors of (x_a, x_b) with a row of x a lane, so a group of a row of W takes one
// vdpbf16ps for sixteen rows of x: of the vector that the group's four bits of metadata name, and
// of the pair of weights in every lane. A dense matrix takes two; gathering (sparse_gather.h) takes
// one and a permute, which is better only where lanes would be empty.
//
// Group g's vector for metadata a + 4 b is entry 7 g + a + 4 b. Seven suffice: the codes of a valid
// matrix are 4, 8, 9, 12, 13, 14, of which no two differ by seven, so that the groups' entries
// interlock and four bits are an address without decoding. Codes that no valid matrix has read some
// other entry.
//
// Zen 4, cycles a product: the 64-byte load of the vector 1, vdpbf16ps 1, both at once. The pair of
// weights comes to the lanes from a register, by shuffles in pipes that are free; an embedded
// broadcast would take a load again (1.3 cycles become 2.0). Measured with all in the second level:
// 1.4 a product, 1.25 where two vectors share the shuffle and the address.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"
#include "huge_pages.h"

#if defined(__AVX512F__)

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int kWordGroups = kMaskColumns / 4;
constexpr int kWordPairs = kMaskColumns / 2;  // of neighbouring columns of x
constexpr int kGroupEntries = 7;
constexpr int kMostEntries = 16;  // that four bits reach from a group's first

// The tables of a block of columns, of a 32 KiB cache: the rest is for W and the sums.
constexpr int64_t kTableBytes = 28 * 1024;
// Rows of W that meet a table before the next is built (12 cycles a group and vector).
constexpr int64_t kTableRows = 256;
// Rows of x that one sweep over W serves: their sums and their columns stay in the second level.
constexpr int64_t kTablePass = 512;
constexpr int kTableChunk = 32;  // and that one table serves

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512vbmi2,avx512vpopcntdq")

// V vectors of 16 rows of x share a table.
template <int V>
struct TableShape {
  static constexpr int kLanes = V * 16;
  static constexpr int64_t kEntry = kLanes * 4;  // bytes
  static constexpr int kShift = V == 1 ? 6 : 7;
  static_assert(kEntry == 1 << kShift);
  // Chains of sums of a row of W: with four rows and V vectors eight, so that none waits for the
  // six cycles of a product.
  static constexpr int kChains = 2 / V;
  static constexpr int64_t kWordBytes = kWordGroups * kGroupEntries * kEntry;
  static constexpr int64_t kWords = kTableBytes / kWordBytes;  // of columns, at most
  static constexpr int64_t kBytes = kTableBytes + (kMostEntries - kGroupEntries) * kEntry;
};

// sum += w * x, pairwise. Assembly, so that x is an operand in memory and not a load of its own.
inline void add_product(__m512& sum, __m512i w, const char* x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const __m512i*>(x)));
}

template <int... I, class F>
[[gnu::always_inline]] inline void each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>()), ...);
}

// The table of `words` words of one chunk of x, whose pairs of columns are [word][32][kLanes],
// words `stride` bytes apart.
template <int V>
void build_table(const char* pairs, int64_t stride, int64_t words, char* table) {
  constexpr int64_t kEntry = TableShape<V>::kEntry;
  for (int64_t i = 0; i < words; ++i, pairs += stride)
    for (int g = 0; g < kWordGroups; ++g)
      for (int v = 0; v < V; ++v) {
        const char* x = pairs + 2 * g * kEntry + v * 64;
        char* out = table + (i * kWordGroups + g) * kGroupEntries * kEntry + v * 64;
        const __m512i x01 = _mm512_load_si512(x), x23 = _mm512_load_si512(x + kEntry);
        const __m512i x1 = _mm512_srli_epi32(x01, 16), x2 = _mm512_slli_epi32(x23, 16);
        const auto put = [&](int code, __m512i low, __m512i high) {
          _mm512_store_si512(out + code * kEntry, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
        };
        put(4, x01, x01);
        put(8, x01, x2);
        put(9, x1, x2);
        put(12, x01, x23);
        put(13, x1, x23);
        put(14, x23, x23);
      }
}

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
constexpr int kTableSide = 4;
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
  for (int r = 0; r < kTableSide; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      acc[r][0][v] = _mm512_load_ps(sums + r * S::kLanes + v * 16);
      if (S::kChains == 2) acc[r][S::kChains - 1][v] = _mm512_setzero_ps();
    }
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
  for (int r = 0; r < kTableSide; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      __m512 sum = acc[r][0][v];
      if (S::kChains == 2) sum = _mm512_add_ps(sum, acc[r][S::kChains - 1][v]);
      _mm512_store_ps(sums + r * S::kLanes + v * 16, sum);
    }
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

// Words [i0, i0 + words) of rows [r0, r0 + count) of W, and how many bytes further what is fetched
// into the second level meanwhile: the rows' next columns, or the next rows' first.
struct TableBlock {
  int64_t r0, count;
  int64_t i0, words;
  int64_t values_ahead, meta_ahead;
};

// A block of W times one chunk of x; the sums are [row][16 V].
template <class T, int V>
void table_block(const Weights& w, const TableBlock& b, const char* table, float* sums) {
  const bool tail = (b.i0 + b.words) * kMaskColumns > w.cols;
  constexpr int64_t kBytes = sizeof(T);
  TableRows<T> rows;
  rows.near = kTableSide * w.cols / 2 * kBytes;  // the next four rows
  rows.far = b.values_ahead;
  for (int64_t r = 0; r < b.count; r += kTableSide, sums += kTableSide * TableShape<V>::kLanes) {
    for (int k = 0; k < kTableSide; ++k) {
      const int64_t row = b.r0 + std::min(r + k, b.count - 1);  // the last row may come again
      rows.v[k] = static_cast<const T*>(w.values) + w.begin(row) + b.i0 * kWordPairs;
      rows.meta[k] = w.meta + row * w.meta_stride + 8 * b.i0;
      __builtin_prefetch(rows.meta[k] + kTableSide * w.meta_stride);
      __builtin_prefetch(rows.meta[k] + b.meta_ahead, 0, 2);
    }
    if (tail)
      table_tail<T, V>(rows, b.words, w.cols % kMaskColumns, table, sums);
    else
      table_words<T, V>(rows, b.words, table, sums);
  }
}

// Lanes that the chunk of x at row t0 of m takes, and all chunks.
inline int64_t chunk_lanes(int64_t t0, int64_t m) { return m - t0 <= 16 ? 16 : kTableChunk; }
inline int64_t all_lanes(int64_t m) { return (m + 15) / 16 * 16; }

// One word of columns of a chunk of x, [32][lanes] pairs, zeros outside x.
inline void pack_pairs(const bf16* x, int64_t stride, int64_t tokens, int64_t cols, int64_t lanes,
                       uint32_t* out) {
  for (int64_t t0 = 0; t0 < lanes; t0 += 16)
    for (int64_t k0 = 0; k0 < kWordPairs; k0 += 16) {
      const int64_t pairs = std::clamp<int64_t>(cols / 2 - k0, 0, 16);
      __m512i v[16];
      for (int t = 0; t < 16; ++t)
        v[t] = t0 + t < tokens
                   ? _mm512_maskz_loadu_epi32(first_lanes(pairs), x + (t0 + t) * stride + 2 * k0)
                   : _mm512_setzero_si512();
      transpose16(v);
      for (int k = 0; k < 16; ++k) _mm512_store_si512(out + (k0 + k) * lanes + t0, v[k]);
    }
}

// Rows [m0, m0 + m) of x, packed as [word][chunk][32][lanes].
struct TablePass {
  const char* packed;
  int64_t m0, m;
};

// The sums and the table of one thread.
struct TableScratch {
  char* table;
  float* sums;
};

// Rows [r0, r0 + count) of W times one pass of x; the block of rows after them starts at `next`.
template <class T, class X>
void table_outputs(const SparseLinearArgs& a, const Weights& w, int64_t r0, int64_t count,
                   int64_t next, const TablePass& pass, const TableScratch& s) {
  const int64_t m = pass.m;
  const int64_t n = mask_words(w.cols), lanes = all_lanes(m), padded = (count + 3) / 4 * 4;
  const int64_t word_bytes = lanes * kWordPairs * 4;
  std::fill(s.sums, s.sums + padded * lanes, 0.0f);
  const int64_t most = m > 16 ? TableShape<2>::kWords : TableShape<1>::kWords;
  const int64_t parts = (n + most - 1) / most, step = (n + parts - 1) / parts;
  for (int64_t i0 = 0; i0 < n; i0 += step) {
    TableBlock b{r0, count, i0, std::min(step, n - i0), 0, 0};
    for (int64_t t0 = 0; t0 < m; t0 += kTableChunk) {
      const bool last = i0 + step >= n;
      const int64_t rows_on = last ? next - r0 : 0, words_on = last ? -i0 : step;
      b.values_ahead =
          t0 ? 0 : (rows_on * w.cols / 2 + words_on * kWordPairs) * static_cast<int64_t>(sizeof(T));
      b.meta_ahead = t0 ? 0 : rows_on * w.meta_stride + words_on * 8;
      const auto multiply = [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        build_table<V>(pass.packed + i0 * word_bytes + t0 * kWordPairs * 4, word_bytes, b.words,
                       s.table);
        table_block<T, V>(w, b, s.table, s.sums + padded * t0);
      };
      if (chunk_lanes(t0, m) == 16)
        multiply(std::integral_constant<int, 1>());
      else
        multiply(std::integral_constant<int, 2>());
    }
  }
  for (int64_t t0 = 0; t0 < m; t0 += kTableChunk)
    store_transposed(s.sums + padded * t0, chunk_lanes(t0, m), count,
                     std::min<int64_t>(kTableChunk, m - t0), a.scales ? a.scales + r0 : nullptr,
                     a.bias ? a.bias->ptr<const float>() + r0 : nullptr,
                     a.y.ptr<X>() + (pass.m0 + t0) * w.rows + r0, w.rows);
}

// Rows of W a block: shared out evenly, a whole number of times four.
inline int64_t table_block_rows(int64_t rows, int64_t threads) {
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t blocks = (share + kTableRows - 1) / kTableRows * threads;
  return ((rows + blocks - 1) / blocks + kTableSide - 1) / kTableSide * kTableSide;
}

// T: bf16 or int8 values; int8 ones come with scales.
template <class T, class X>
void run_table(const SparseLinearArgs& a, const Weights& w) {
  prefer_huge_pages(a.y, sizeof(X));
  const int64_t m = a.x.shape[0], n = mask_words(w.cols);
  const int64_t block = table_block_rows(w.rows, a.threads);
  const int64_t blocks = (w.rows + block - 1) / block;
  const int64_t most = all_lanes(std::min(m, kTablePass));
  const int64_t table_bytes = TableShape<2>::kBytes;
  const int64_t thread_bytes = table_bytes + block * most * 4;
  Scratch scratch(n * most * kWordPairs * 4 + a.threads * thread_bytes);
  char* packed = scratch.as<char>();
#pragma omp parallel num_threads(a.threads)
  {
    char* mine = packed + n * most * kWordPairs * 4 + omp_get_thread_num() * thread_bytes;
    const TableScratch s{mine, reinterpret_cast<float*>(mine + table_bytes)};
    std::memset(s.table, 0, static_cast<size_t>(table_bytes));
    for (int64_t m0 = 0; m0 < m; m0 += kTablePass) {
      const int64_t tokens = std::min(kTablePass, m - m0), lanes = all_lanes(tokens);
      const int64_t chunks = (tokens + kTableChunk - 1) / kTableChunk;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n * chunks; ++i) {
        const int64_t t0 = i % chunks * kTableChunk, c = i / chunks * kMaskColumns;
        pack_pairs(a.x.ptr<const bf16>() + (m0 + t0) * a.x.stride[0] + c, a.x.stride[0],
                   std::min<int64_t>(kTableChunk, tokens - t0), std::min(kMaskColumns, w.cols - c),
                   chunk_lanes(t0, tokens),
                   reinterpret_cast<uint32_t*>(packed) + (c / 64 * lanes + t0) * kWordPairs);
      }
#pragma omp for schedule(static)
      for (int64_t g = 0; g < blocks; ++g) {
        const int64_t r0 = g * block, next = g + 1 < blocks ? r0 + block : r0;
        table_outputs<T, X>(a, w, r0, std::min(block, w.rows - r0), next, {packed, m0, tokens}, s);
      }
    }
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
