// 2:4 with several rows of x in bf16: the rows of x lie in the lanes, and a table holds every pair
// of activations that two stored weights can meet.
//
// Two weights of a group of four columns meet one of six pairs of its activations. The table has
// all six, as vectors of (x_a, x_b) with a row of x a lane, so a group of a row of W takes one
// vdpbf16ps: of the vector that the group's four bits of metadata name, and of the pair of weights
// in every lane. A dense matrix takes two, a gather (sparse_gather.h) a permute besides.
//
// Group g's vector for metadata c = a + 4 b is entry 7 g + c. Seven suffice: the codes that occur
// are 4, 8, 9, 12, 13, 14, of which no two differ by a multiple of seven, so that the groups' tables
// interlock without a collision and four bits need no decoding. Codes that no valid matrix has read
// other entries of the table, or zeros.
//
// Per group, Zen 4: a 64-byte load, half of the load width's cycle for every vector; the product,
// half of the multipliers'; a broadcast from a register, because one from memory would take a load
// again (2.0 cycles instead of 1.3); two scalar instructions.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"

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

// Eight or sixteen rows of x in a register.
struct Lanes8 {
  using Pairs = __m256i;
  using Sums = __m256;
  static constexpr int kLanes = 8;
  static Pairs load(const void* p) { return _mm256_load_si256(static_cast<const Pairs*>(p)); }
  static void store(void* p, Pairs v) { _mm256_store_si256(static_cast<Pairs*>(p), v); }
  static Sums load_sums(const float* p) { return _mm256_load_ps(p); }
  static void store_sums(float* p, Sums v) { _mm256_store_ps(p, v); }
  static Sums add(Sums a, Sums b) { return _mm256_add_ps(a, b); }
  static Sums zero() { return _mm256_setzero_ps(); }
  static Sums product(Sums sum, Pairs w, Pairs x) {
    return _mm256_dpbf16_ps(sum, reinterpret_cast<__m256bh>(w), reinterpret_cast<__m256bh>(x));
  }
  static Pairs high_of_each(Pairs v) { return _mm256_srli_epi32(v, 16); }
  static Pairs low_of_each_up(Pairs v) { return _mm256_slli_epi32(v, 16); }
  static Pairs low_and_high(Pairs low, Pairs high) { return _mm256_blend_epi16(low, high, 0xaa); }
  // A word's 16 pairs of weights, and four of them in each 128 bits, and one of those.
  struct Weights16 {
    const bf16* v;
    explicit Weights16(const bf16* p) : v(p) {}
    template <int Q>
    Pairs four() const {
      return _mm256_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(v + 8 * Q)));
    }
  };
  template <int J>
  static Pairs one(Pairs four) {
    return _mm256_shuffle_epi32(four, J * 0x55);
  }
};

struct Lanes16 {
  using Pairs = __m512i;
  using Sums = __m512;
  static constexpr int kLanes = 16;
  static Pairs load(const void* p) { return _mm512_load_si512(p); }
  static void store(void* p, Pairs v) { _mm512_store_si512(p, v); }
  static Sums load_sums(const float* p) { return _mm512_load_ps(p); }
  static void store_sums(float* p, Sums v) { _mm512_store_ps(p, v); }
  static Sums add(Sums a, Sums b) { return _mm512_add_ps(a, b); }
  static Sums zero() { return _mm512_setzero_ps(); }
  static Sums product(Sums sum, Pairs w, Pairs x) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  static Pairs high_of_each(Pairs v) { return _mm512_srli_epi32(v, 16); }
  static Pairs low_of_each_up(Pairs v) { return _mm512_slli_epi32(v, 16); }
  static Pairs low_and_high(Pairs low, Pairs high) {
    return _mm512_mask_blend_epi16(0xaaaaaaaau, low, high);
  }
  struct Weights16 {
    __m512i v;
    explicit Weights16(const bf16* p) : v(_mm512_loadu_si512(p)) {}
    template <int Q>
    Pairs four() const {
      return _mm512_shuffle_i32x4(v, v, Q * 0x55);
    }
  };
  template <int J>
  static Pairs one(Pairs four) {
    return _mm512_shuffle_epi32(four, static_cast<_MM_PERM_ENUM>(J * 0x55));
  }
};

// V vectors of L serve a chunk of x. Two chains of sums a row of W, or one of two vectors: with the
// four rows that are multiplied side by side eight, which hide the products' six cycles.
template <class L, int V>
struct TableShape {
  static constexpr int kLanes = V * L::kLanes;
  static constexpr int64_t kEntry = kLanes * 4;  // bytes
  static constexpr int kShift = __builtin_ctz(static_cast<unsigned>(kEntry));
  static constexpr int kChains = V == 1 ? 2 : 1;
  static constexpr int64_t kWordBytes = kWordGroups * kGroupEntries * kEntry;
  static constexpr int64_t kWords = kTableBytes / kWordBytes;  // of columns
  static constexpr int64_t kBytes = kTableBytes + (kMostEntries - kGroupEntries) * kEntry;
  static_assert(kWords * kWordBytes == kTableBytes, "no room is left over");
};

template <int... I, class F>
[[gnu::always_inline]] inline void each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>()), ...);
}

// The table of `words` words of one chunk of x, whose pairs of columns are [word][32][kLanes], words
// `stride` bytes apart.
template <class L, int V>
void build_table(const char* pairs, int64_t stride, int64_t words, char* table) {
  using S = TableShape<L, V>;
  for (int64_t i = 0; i < words; ++i, pairs += stride)
    for (int g = 0; g < kWordGroups; ++g)
      for (int v = 0; v < V; ++v) {
        constexpr int64_t kVector = L::kLanes * 4;
        const char* x = pairs + 2 * g * S::kEntry + v * kVector;
        char* out = table + (i * kWordGroups + g) * kGroupEntries * S::kEntry + v * kVector;
        const auto x01 = L::load(x), x23 = L::load(x + S::kEntry);
        const auto x1 = L::high_of_each(x01), x2 = L::low_of_each_up(x23);
        L::store(out + 4 * S::kEntry, x01);
        L::store(out + 8 * S::kEntry, L::low_and_high(x01, x2));
        L::store(out + 9 * S::kEntry, L::low_and_high(x1, x2));
        L::store(out + 12 * S::kEntry, L::low_and_high(x01, x23));
        L::store(out + 13 * S::kEntry, L::low_and_high(x1, x23));
        L::store(out + 14 * S::kEntry, x23);
      }
}

// Rows of W that are multiplied side by side, at the first column of a block.
constexpr int kTableSide = 4;
struct TableRows {
  const bf16* v[kTableSide];
  const uint8_t* meta[kTableSide];
};

// Adds `words` words of columns of four rows of W times one chunk of x to the rows' sums.
template <class L, int V>
inline void table_words(const TableRows& rows, int64_t words, const char* table, float* sums) {
  using S = TableShape<L, V>;
  typename L::Sums acc[kTableSide][S::kChains][V];
#pragma GCC unroll 4
  for (int r = 0; r < kTableSide; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      acc[r][0][v] = L::load_sums(sums + r * S::kLanes + v * L::kLanes);
      if (S::kChains == 2) acc[r][S::kChains - 1][v] = L::zero();
    }
#pragma GCC unroll 1
  for (int64_t i = 0; i < words; ++i, table += S::kWordBytes) {
    uint64_t meta[kTableSide];
#pragma GCC unroll 4
    for (int r = 0; r < kTableSide; ++r) std::memcpy(&meta[r], rows.meta[r] + 8 * i, 8);
    const auto at = [&](int r) { return typename L::Weights16(rows.v[r] + i * kWordPairs); };
    const typename L::Weights16 weights[kTableSide] = {at(0), at(1), at(2), at(3)};
    each(std::make_integer_sequence<int, 4>(), [&](auto q) __attribute__((always_inline)) {
      typename L::Pairs four[kTableSide];
#pragma GCC unroll 4
      for (int r = 0; r < kTableSide; ++r) four[r] = weights[r].template four<decltype(q)::value>();
      each(std::make_integer_sequence<int, 4>(), [&](auto j) __attribute__((always_inline)) {
        constexpr int kGroup = 4 * decltype(q)::value + decltype(j)::value;
        constexpr int kRotate = (4 * kGroup - S::kShift) & 63;
#pragma GCC unroll 4
        for (int r = 0; r < kTableSide; ++r) {
          const uint64_t code = meta[r] >> kRotate | meta[r] << (64 - kRotate);
          const char* x =
              table + kGroup * kGroupEntries * S::kEntry + (code & (uint64_t{15} << S::kShift));
          const auto w = L::template one<decltype(j)::value>(four[r]);
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            auto& sum = acc[r][kGroup % S::kChains][v];
            sum = L::product(sum, w, L::load(x + v * L::kLanes * 4));
          }
        }
      });
    });
  }
#pragma GCC unroll 4
  for (int r = 0; r < kTableSide; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      auto sum = acc[r][0][v];
      if (S::kChains == 2) sum = L::add(sum, acc[r][S::kChains - 1][v]);
      L::store_sums(sums + r * S::kLanes + v * L::kLanes, sum);
    }
}

// The same where the last of the words is the one that the matrix ends in, of `left` columns: it is
// copied, so that nothing past it is read. Past the end there are zeros, which meet zeros.
template <class L, int V>
void table_tail(const TableRows& rows, int64_t words, int64_t left, const char* table,
                float* sums) {
  if (words > 1) table_words<L, V>(rows, words - 1, table, sums);
  bf16 values[kTableSide][kWordPairs] = {};
  uint8_t meta[kTableSide][8];
  std::memset(meta, 0x44, sizeof(meta));
  TableRows last;
  for (int r = 0; r < kTableSide; ++r) {
    std::memcpy(values[r], rows.v[r] + (words - 1) * kWordPairs,
                static_cast<size_t>(left / 2) * sizeof(bf16));
    std::memcpy(meta[r], rows.meta[r] + 8 * (words - 1), static_cast<size_t>(left / 8));
    last.v[r] = values[r];
    last.meta[r] = meta[r];
  }
  table_words<L, V>(last, 1, table + (words - 1) * TableShape<L, V>::kWordBytes, sums);
}

#pragma GCC pop_options

// A block of rows of W and where their next columns, or the next block's first ones, are: those are
// fetched into the second level meanwhile.
struct TableBlock {
  int64_t r0, count;         // rows
  int64_t i0, words;         // columns
  int64_t values_ahead, meta_ahead;  // bytes; 0: nothing to fetch
};

// A block of W times one chunk of x, [row][kLanes] sums.
template <class L, int V>
void table_block(const Weights& w, const TableBlock& b, const char* table, float* sums) {
  const bool tail = (b.i0 + b.words) * kMaskColumns > w.cols;
  for (int64_t r = 0; r < b.count; r += kTableSide) {
    TableRows rows;
    for (int k = 0; k < kTableSide; ++k) {
      const int64_t row = b.r0 + std::min(r + k, b.count - 1);  // the last row again
      rows.v[k] = static_cast<const bf16*>(w.values) + w.begin(row) + b.i0 * kWordPairs;
      rows.meta[k] = w.meta + row * w.meta_stride + 8 * b.i0;
      if (b.values_ahead) {
        const char* next = reinterpret_cast<const char*>(rows.v[k]) + b.values_ahead;
        for (int64_t i = 0; i < b.words; ++i) __builtin_prefetch(next + 64 * i, 0, 2);
        __builtin_prefetch(rows.meta[k] + b.meta_ahead, 0, 2);
      }
    }
    if (tail)
      table_tail<L, V>(rows, b.words, w.cols % kMaskColumns, table, sums + r * V * L::kLanes);
    else
      table_words<L, V>(rows, b.words, table, sums + r * V * L::kLanes);
  }
}

// Whether the table serves m rows of x best: fewer leave too many lanes empty.
inline bool tabulates(int64_t m) { return m > 4; }

// Rows of x at `t0` of `m` that share a table, and the lanes they take.
inline int64_t chunk_lanes(int64_t t0, int64_t m) {
  const int64_t left = m - t0;
  return left <= 8 ? 8 : left <= 16 ? 16 : kTableChunk;
}
inline int64_t all_lanes(int64_t m) {
  const int64_t whole = m / kTableChunk * kTableChunk;
  return m > whole ? whole + chunk_lanes(whole, m) : m;
}

// Calls f with the lanes and the number of their vectors.
template <class F>
void with_lanes(int64_t lanes, F&& f) {
  if (lanes == 8)
    f(Lanes8(), std::integral_constant<int, 1>());
  else if (lanes == 16)
    f(Lanes16(), std::integral_constant<int, 1>());
  else
    f(Lanes16(), std::integral_constant<int, 2>());
}

// One word of columns of a chunk of x, [32][lanes] pairs, zeros outside x.
inline void pack_pairs(const bf16* x, int64_t stride, int64_t tokens, int64_t cols, int64_t lanes,
                       uint32_t* out) {
  for (int64_t t0 = 0; t0 < lanes; t0 += 16)
    for (int64_t k0 = 0; k0 < kWordPairs; k0 += 16) {
      const int64_t pairs = std::clamp<int64_t>(cols / 2 - k0, 0, 16);
      __m512i v[16];
      for (int t = 0; t < 16; ++t)
        v[t] = t0 + t < tokens ? _mm512_maskz_loadu_epi32(first_lanes(pairs),
                                                          x + (t0 + t) * stride + 2 * k0)
                               : _mm512_setzero_si512();
      transpose16(v);
      const __mmask16 kept = first_lanes(std::min<int64_t>(16, lanes - t0));
      for (int k = 0; k < 16; ++k)
        _mm512_mask_storeu_epi32(out + (k0 + k) * lanes + t0, kept, v[k]);
    }
}

// The sums and the table of one thread.
struct TableScratch {
  char* table;
  float* sums;
};

// Rows [r0, r0 + count) of W times one pass of x: `packed` is [word][chunk][32][lanes].
template <class X>
void table_outputs(const SparseLinearArgs& a, const Weights& w, int64_t r0, int64_t count,
                   int64_t next, int64_t m0, int64_t m, const char* packed,
                   const TableScratch& s) {
  const int64_t n = mask_words(w.cols), lanes = all_lanes(m), padded = (count + 3) / 4 * 4;
  const int64_t word_bytes = lanes * kWordPairs * 4;
  std::fill(s.sums, s.sums + padded * lanes, 0.0f);
  const int64_t step = m > 16 ? TableShape<Lanes16, 2>::kWords
                      : m > 8 ? TableShape<Lanes16, 1>::kWords
                              : TableShape<Lanes8, 1>::kWords;
  for (int64_t i0 = 0; i0 < n; i0 += step) {
    TableBlock b{r0, count, i0, std::min(step, n - i0), 0, 0};
    for (int64_t t0 = 0; t0 < m; t0 += kTableChunk) {
      const bool last = i0 + step >= n;
      const int64_t rows_on = last ? next - r0 : 0, words_on = last ? -i0 : step;
      b.values_ahead = t0 ? 0 : rows_on * w.cols + words_on * 64;
      b.meta_ahead = rows_on * w.meta_stride + words_on * 8;
      with_lanes(chunk_lanes(t0, m), [&](auto l, auto v) {
        using L = decltype(l);
        constexpr int V = decltype(v)::value;
        build_table<L, V>(packed + i0 * word_bytes + t0 * kWordPairs * 4, word_bytes, b.words,
                          s.table);
        table_block<L, V>(w, b, s.table, s.sums + padded * t0);
      });
    }
  }
  for (int64_t t0 = 0; t0 < m; t0 += kTableChunk)
    store_transposed(s.sums + padded * t0, chunk_lanes(t0, m), count,
                     std::min<int64_t>(kTableChunk, m - t0), nullptr,
                     a.bias ? a.bias->ptr<const float>() + r0 : nullptr,
                     a.y.ptr<X>() + (m0 + t0) * w.rows + r0, w.rows);
}

// Rows of W a block: shared out evenly, a whole number of times four.
inline int64_t table_block_rows(int64_t rows, int64_t threads) {
  const int64_t share = (rows + threads - 1) / threads;
  const int64_t blocks = (share + kTableRows - 1) / kTableRows * threads;
  return ((rows + blocks - 1) / blocks + kTableSide - 1) / kTableSide * kTableSide;
}

template <class X>
void run_table(const SparseLinearArgs& a, const Weights& w) {
  const int64_t m = a.x.shape[0], n = mask_words(w.cols);
  const int64_t block = table_block_rows(w.rows, a.threads);
  const int64_t blocks = (w.rows + block - 1) / block;
  const int64_t most = all_lanes(std::min(m, kTablePass));
  const int64_t table_bytes = TableShape<Lanes16, 2>::kBytes;
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
        table_outputs<X>(a, w, r0, std::min(block, w.rows - r0), next, m0, tokens, packed, s);
      }
    }
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
