// Tables of pairs of activations, for products of compressed matrices with bf16 x of many rows: the
// rows of x lie in the lanes.
//
// Two weights of a group of four columns meet one of six pairs of its activations. The table has
// all six, as vectors of (x_a, x_b) with a row of x a lane, so that one vdpbf16ps multiplies two
// weights, wherever they are in the group, with sixteen rows of x: the vector of their columns with
// the pair of weights in every lane. Of a dense matrix a group takes two; of a 2:4 matrix one
// (sparse_table.h), of a bitmap as many as its kept columns need (bitmap_table.h).
//
// The vector of columns a < b of group g is entry 7 g + a + 4 b; a + 4 b is what 2:4 metadata say
// of the group. Seven suffice: the codes are 4, 8, 9, 12, 13, 14, of which no two differ by seven,
// so that the groups' entries interlock and four bits of metadata are an address without decoding.
// Entry 0 belongs to no pair and stays zero.
//
// Zen 4, cycles a product: the 64-byte load of the vector 1, vdpbf16ps 1, both at once. The pair of
// weights comes to the lanes from a register, by shuffles in pipes that are free; an embedded
// broadcast would take a load again (1.3 cycles become 2.0).
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
constexpr int kTableSide = 4;  // rows of W that are multiplied side by side
// Rows of W that meet a table before the next is built (12 cycles a group and vector, 30 with what
// the rows before have driven out of the cache).
constexpr int64_t kTableRows = 512;
constexpr int kTableChunk = 32;  // rows of x that one table serves

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

// The sums of a row of W, V vectors in C chains each, as they come from memory and go back.
template <int C, int V>
[[gnu::always_inline]] inline void load_sums(const float* sums, __m512 (&acc)[C][V]) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    acc[0][v] = _mm512_load_ps(sums + v * 16);
    if (C == 2) acc[C - 1][v] = _mm512_setzero_ps();
  }
}
template <int C, int V>
[[gnu::always_inline]] inline void store_sums(const __m512 (&acc)[C][V], float* sums) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    __m512 sum = acc[0][v];
    if (C == 2) sum = _mm512_add_ps(sum, acc[C - 1][v]);
    _mm512_store_ps(sums + v * 16, sum);
  }
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

#pragma GCC pop_options

// Lanes that the chunk of x at row t0 of m takes, and all chunks.
inline int64_t chunk_lanes(int64_t t0, int64_t m) { return m - t0 <= 16 ? 16 : kTableChunk; }
inline int64_t all_lanes(int64_t m) { return (m + 15) / 16 * 16; }

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

// The rows of W of one format, block by block. A source has
//
//   bool begin(r0, count, next)       goes on to rows [r0, r0 + count) of W, of which those at
//                                     `next` are the following; false when a row is inconsistent
//   void take(i0, words, last)        goes on to columns [i0, i0 + words) in words, the last or not
//   void multiply<V>(table, sums, first)  adds their products with a chunk of x to sums, [row][16
//   V];
//                                     the first chunk of these columns or not
//   static int64_t scratch(block, w)  bytes that a thread has for it, for blocks of that many rows
//   kPass                             rows of x that one sweep over W serves
//   kMostWords                        words that it takes at once

// Rows [r0, r0 + count) of W times one pass of x; the block of rows after them starts at `next`.
template <class Source, class X>
void table_outputs(const SparseLinearArgs& a, const Weights& w, Source& source, int64_t r0,
                   int64_t count, int64_t next, const TablePass& pass, const TableScratch& s) {
  if (!source.begin(r0, count, next)) return;
  const int64_t m = pass.m;
  const int64_t n = mask_words(w.cols), lanes = all_lanes(m), padded = (count + 3) / 4 * 4;
  const int64_t word_bytes = lanes * kWordPairs * 4;
  std::fill(s.sums, s.sums + padded * lanes, 0.0f);
  const int64_t most =
      std::min(Source::kMostWords, m > 16 ? TableShape<2>::kWords : TableShape<1>::kWords);
  const int64_t parts = (n + most - 1) / most, step = (n + parts - 1) / parts;
  for (int64_t i0 = 0; i0 < n; i0 += step) {
    const int64_t words = std::min(step, n - i0);
    source.take(i0, words, i0 + step >= n);
    for (int64_t t0 = 0; t0 < m; t0 += kTableChunk) {
      const auto multiply = [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        build_table<V>(pass.packed + i0 * word_bytes + t0 * kWordPairs * 4, word_bytes, words,
                       s.table);
        source.template multiply<V>(s.table, s.sums + padded * t0, t0 == 0);
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

// `args` are further arguments of the threads' sources.
template <class Source, class X, class... Args>
void run_table(const SparseLinearArgs& a, const Weights& w, Args... args) {
  prefer_huge_pages(a.y, sizeof(X));
  const int64_t m = a.x.shape[0], n = mask_words(w.cols);
  const int64_t block = table_block_rows(w.rows, a.threads);
  const int64_t blocks = (w.rows + block - 1) / block;
  // Passes of one size, whole chunks.
  const int64_t passes = (m + Source::kPass - 1) / Source::kPass;
  const int64_t pass = ((m + passes - 1) / passes + kTableChunk - 1) / kTableChunk * kTableChunk;
  const int64_t most = all_lanes(std::min(m, pass));
  const int64_t table_bytes = TableShape<2>::kBytes;
  const int64_t sum_bytes = block * most * 4, packed_bytes = n * most * kWordPairs * 4;
  const int64_t thread_bytes = table_bytes + sum_bytes + (Source::scratch(block, w) + 63) / 64 * 64;
  Scratch scratch(packed_bytes + a.threads * thread_bytes);
  char* packed = scratch.as<char>();
#pragma omp parallel num_threads(a.threads)
  {
    char* mine = packed + packed_bytes + omp_get_thread_num() * thread_bytes;
    const TableScratch s{mine, reinterpret_cast<float*>(mine + table_bytes)};
    Source source(w, block, mine + table_bytes + sum_bytes, args...);
    std::memset(s.table, 0, static_cast<size_t>(table_bytes));
    for (int64_t m0 = 0; m0 < m; m0 += pass) {
      const int64_t tokens = std::min(pass, m - m0), lanes = all_lanes(tokens);
      const int64_t chunks = (tokens + kTableChunk - 1) / kTableChunk;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < n * chunks; ++i) {
        const int64_t t0 = i % chunks * kTableChunk, c = i / chunks * kMaskColumns;
        pack_pairs(a.x.ptr<const bf16>() + (m0 + t0) * a.x.stride[0] + c, a.x.stride[0],
                   std::min<int64_t>(kTableChunk, tokens - t0), w.cols - c, kWordPairs,
                   chunk_lanes(t0, tokens),
                   reinterpret_cast<float*>(packed) + (c / 64 * lanes + t0) * kWordPairs);
      }
#pragma omp for schedule(static)
      for (int64_t g = 0; g < blocks; ++g) {
        const int64_t r0 = g * block, next = g + 1 < blocks ? r0 + block : r0;
        table_outputs<Source, X>(a, w, source, r0, std::min(block, w.rows - r0), next,
                                 {packed, m0, tokens}, s);
      }
    }
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
