// 2:4 with several rows of x: the activations are gathered to the stored weights, so that half the
// products of a dense matrix are enough, in fp32 or bf16.
//
// Two rows of W share a register. Of one register of x (16 fp32 or 32 bf16 columns) each of them
// stores half, so one permute fills a register: below what row r meets, above what row r + 1 does.
// A Zen 4 core issues permute and product together in 1.33 to 1.5 cycles, where a dense matrix
// needs two products: up to a third less time where arithmetic decides.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"

#if defined(__AVX512F__)

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int64_t kStoredColumns = kMaskColumns / 2;  // of a word of columns, by each row of W

// 32 bytes at `low` and 32 at `high` in one register. Two masked loads: an insertion would take one
// of the pipes that permutes and products share. What a mask leaves out is not read.
inline __m512i two_rows(const void* low, const void* high) {
  const __m512i upper = _mm512_maskz_loadu_epi64(0xf0, static_cast<const char*>(high) - 32);
  return _mm512_mask_loadu_epi64(upper, 0x0f, low);
}

// Stored values of two rows as floats, eight of each.
inline __m512 widen_two_rows(const float* low, const float* high) {
  return _mm512_castsi512_ps(two_rows(low, high));
}
inline __m256i two_rows_16(const void* low, const void* high) {
  const __m256i upper = _mm256_maskz_loadu_epi64(0xc, static_cast<const char*>(high) - 16);
  return _mm256_mask_loadu_epi64(upper, 0x3, low);
}
inline __m512 widen_two_rows(const bf16* low, const bf16* high) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(two_rows_16(low, high)), 16));
}
inline __m512 widen_two_rows(const f16* low, const f16* high) {
  return _mm512_cvtph_ps(two_rows_16(low, high));
}

// The metadata of two rows over the halves of a register, likewise from memory.
inline __m512i two_rows_meta(const uint8_t* low, const uint8_t* high) {
  const __m512i all = _mm512_broadcastd_epi32(_mm_loadu_si32(low));
  return _mm512_mask_broadcastd_epi32(all, 0xff00, _mm_loadu_si32(high));
}

// Where two rows of W begin.
template <class T>
struct PairOfRows {
  const T* v[2];
  const uint8_t* meta[2];
};

// A layout L decodes kColumns columns at a time, of which each of two rows of W stores kStored, and
// which are kRegisters registers of x.
//
// One register a step: stored values, and the columns of x that they meet.
template <class T>
struct GatherFloat {
  using Value = T;
  using Element = float;
  using Register = __m512;
  static constexpr int kColumns = 16, kStored = 8, kRegisters = 1;
  static constexpr int kRows = 16;  // of x that one pass over a block of W serves, at most
  static int64_t place(int64_t c) { return c; }
  static constexpr int side(int m) { return m <= 10 ? 2 : 1; }
  static void decode(const PairOfRows<T>& rows, int64_t part, Register* values, __m512i* which) {
    const int64_t first = kStored * part;
    values[0] = widen_two_rows(rows.v[0] + first, rows.v[1] + first);
    which[0] = columns(rows.meta[0], rows.meta[1], part);
  }
  static Register load(const float* x) { return _mm512_load_ps(x); }
  static Register pick(__m512i columns, Register x) { return _mm512_permutexvar_ps(columns, x); }
  static __m512 product(__m512 acc, Register a, Register b) { return _mm512_fmadd_ps(a, b, acc); }
  // Value j of a part has bits 2j and 2j + 1 of its 16 of metadata, which are read as half of 32;
  // the permute reads four bits a lane.
  static __m512i columns(const uint8_t* low, const uint8_t* high, int64_t part) {
    alignas(64) static constexpr int kShifts[2][16] = {
        {0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14},
        {16, 18, 20, 22, 24, 26, 28, 30, 16, 18, 20, 22, 24, 26, 28, 30}};
    const __m512i groups = _mm512_set_epi32(12, 12, 8, 8, 4, 4, 0, 0, 12, 12, 8, 8, 4, 4, 0, 0);
    const int64_t word = part / 2 * 4;
    const __m512i codes = _mm512_srlv_epi32(two_rows_meta(low + word, high + word),
                                            _mm512_load_si512(kShifts[part % 2]));
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(3), groups, 0xea);
  }
};

// bf16 through vdpbf16ps, for processors with AVX512_BF16 and VBMI. The two instructions are
// written as assembly because this file is compiled for the common subset.
struct GatherBf16 {
  using Value = bf16;
  using Element = bf16;
  using Register = __m512i;
  static constexpr int kColumns = 32, kStored = 16, kRegisters = 1;
  static constexpr int kRows = kGatherPairRows;
  static int64_t place(int64_t c) { return c; }
  static constexpr int side(int m) { return m <= 10 ? 2 : 1; }
  static void decode(const PairOfRows<bf16>& rows, int64_t part, Register* values, __m512i* which) {
    const int64_t first = kStored * part;
    values[0] = two_rows(rows.v[0] + first, rows.v[1] + first);
    which[0] = columns(rows.meta[0], rows.meta[1], part);
  }
  static Register load(const bf16* x) { return _mm512_load_si512(x); }
  static Register pick(__m512i columns, Register x) { return _mm512_permutexvar_epi16(columns, x); }
  static __m512 product(__m512 acc, Register a, Register b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
  }
  // As above with 32 bits of metadata a part and five bits a lane.
  static __m512i columns(const uint8_t* low, const uint8_t* high, int64_t part) {
    const __m512i shifts =
        _mm512_set_epi64(0x1e001c001a0018, 0x16001400120010, 0x0e000c000a0008, 0x06000400020000,
                         0x1e001c001a0018, 0x16001400120010, 0x0e000c000a0008, 0x06000400020000);
    const __m512i groups =
        _mm512_set_epi64(0x1c001c00180018, 0x14001400100010, 0x0c000c00080008, 0x04000400000000,
                         0x1c001c00180018, 0x14001400100010, 0x0c000c00080008, 0x04000400000000);
    __m512i codes;
    asm("vpmultishiftqb %2, %1, %0"
        : "=v"(codes)
        : "v"(shifts), "v"(two_rows_meta(low + 4 * part, high + 4 * part)));
    return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(3), groups, 0xea);
  }
};

// Columns of x that stay neighbours in every layout's place().
constexpr int64_t kGatherRun = 16;

// `cols` columns (at most a word) of m rows of x: [chunk][64], zeros outside.
template <class L, class X>
void pack_gather(const X* x, int64_t stride, int64_t m, int64_t chunk, int64_t cols,
                 typename L::Element* out) {
  std::memset(out, 0, chunk * kMaskColumns * sizeof(*out));
  for (int64_t i = 0; i < m; ++i) {
    const X* row = x + i * stride;
    int64_t c = 0;
    if constexpr (std::is_same_v<typename L::Element, X>)
      for (; c + kGatherRun <= cols; c += kGatherRun)
        std::memcpy(out + i * kMaskColumns + L::place(c), row + c, kGatherRun * sizeof(X));
    for (; c < cols; ++c) {
      if constexpr (std::is_same_v<typename L::Element, X>)
        out[i * kMaskColumns + L::place(c)] = row[c];
      else
        out[i * kMaskColumns + L::place(c)] = to_float(row[c]);
    }
  }
}

// What one step needs of G pairs of rows.
template <class L, int G>
struct Gathered {
  typename L::Register values[G][L::kRegisters];
  __m512i columns[G][L::kRegisters];
};

// `part` counts steps of columns from the rows' start.
template <class L, int G>
inline Gathered<L, G> gathered(const PairOfRows<typename L::Value>* pairs, int64_t part) {
  Gathered<L, G> out;
#pragma GCC unroll 2
  for (int g = 0; g < G; ++g) L::decode(pairs[g], part, out.values[g], out.columns[g]);
  return out;
}

// G pairs of rows of W, whole words of columns [i0, i1), times M rows of x; `sums` holds G x M
// vectors, each with the first row's partial sums in its lower half and the second row's in the
// upper. What lies `ahead` bytes further is fetched into the second level meanwhile.
//
// Columns are decoded one step before they are used: a core issues its oldest instructions first,
// so a decoding that follows the products of the step before would wait for all of them.
template <class L, int M, int G>
inline void gather_words(const PairOfRows<typename L::Value>* pairs, int64_t i0, int64_t i1,
                         const typename L::Element* x, int64_t ahead, float* sums) {
  constexpr int kParts = kMaskColumns / L::kColumns;
  __m512 acc[G][M];
  for (int g = 0; g < G; ++g)
    for (int m = 0; m < M; ++m) acc[g][m] = _mm512_load_ps(sums + (g * M + m) * 16);
  auto w = gathered<L, G>(pairs, i0 * kParts);
  const int64_t end = i1 * kParts;
  // One body for all parts: unrolled, the compiler would keep two sets of accumulators.
#pragma GCC unroll 1
  for (int64_t p = i0 * kParts; p < end; ++p) {
    const auto next = gathered<L, G>(pairs, p + (p + 1 < end));
    for (int g = 0; g < G; ++g)
      _mm_prefetch(reinterpret_cast<const char*>(pairs[g].v[0] + 2 * L::kStored * p) + ahead,
                   _MM_HINT_T1);
    const typename L::Element* xp = x + p / kParts * M * kMaskColumns + p % kParts * L::kColumns;
#pragma GCC unroll 2
    for (int h = 0; h < L::kRegisters; ++h)
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const auto xm = L::load(xp + m * kMaskColumns + h * (L::kColumns / L::kRegisters));
#pragma GCC unroll 2
        for (int g = 0; g < G; ++g)
          acc[g][m] = L::product(acc[g][m], w.values[g][h], L::pick(w.columns[g][h], xm));
      }
    w = next;
  }
  for (int g = 0; g < G; ++g)
    for (int m = 0; m < M; ++m) _mm512_store_ps(sums + (g * M + m) * 16, acc[g][m]);
}

// The same for any words of a matrix with `cols` columns: the word that it ends in is copied, so
// that nothing past it is read.
template <class L, int M, int G>
void gather_pairs(const PairOfRows<typename L::Value>* pairs, int64_t cols, int64_t i0, int64_t i1,
                  const typename L::Element* x, int64_t ahead, float* sums) {
  using T = typename L::Value;
  const int64_t whole = std::min(i1, cols / kMaskColumns);
  if (i0 < whole) gather_words<L, M, G>(pairs, i0, whole, x, ahead, sums);
  if (whole == i1) return;
  const size_t left = static_cast<size_t>(cols % kMaskColumns);
  T values[2 * G][kStoredColumns] = {};
  uint8_t meta[2 * G][8] = {};
  PairOfRows<T> last[G];
  for (int r = 0; r < 2 * G; ++r) {
    std::memcpy(values[r], pairs[r / 2].v[r % 2] + kStoredColumns * whole, left / 2 * sizeof(T));
    std::memcpy(meta[r], pairs[r / 2].meta[r % 2] + 8 * whole, left / 8);
    last[r / 2].v[r % 2] = values[r];
    last[r / 2].meta[r % 2] = meta[r];
  }
  gather_words<L, M, G>(last, 0, 1, x + whole * M * kMaskColumns, 0, sums);
}

// Sums the halves of four vectors: those of the lower halves to low[4], of the upper to high[4].
inline void sum_halves(__m512 v0, __m512 v1, __m512 v2, __m512 v3, float* low, float* high) {
  const __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v0, v1), _mm512_unpackhi_ps(v0, v1));
  const __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v2, v3), _mm512_unpackhi_ps(v2, v3));
  const __m512d c = _mm512_castps_pd(a), d = _mm512_castps_pd(b);
  __m512 sum = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(c, d)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(c, d)));
  sum = _mm512_add_ps(sum, _mm512_shuffle_f32x4(sum, sum, 0xb1));
  _mm_storeu_ps(low, _mm512_castps512_ps128(sum));
  _mm_storeu_ps(high, _mm512_extractf32x4_ps(sum, 2));
}

// A piece of x for the first-level cache.
constexpr int64_t kGatherPiece = 16 * 1024;
// A block of W waits in the second level for the next chunk of x.
constexpr int64_t kGatherBlockBytes = 384 * 1024;
constexpr int64_t kMaxGatherBlock = 64;

// Every block of W meets every chunk of x again, so chunks must come from the second level too.
constexpr int64_t kGatherChunkBytes = 256 * 1024;

// Whether gathering serves m rows of x best: always when W is read once; else in narrow matrices
// (4096 columns: 0.85 of the time of decoded tiles; 14336 columns, from the third level: 1.4
// times).
template <class L>
bool gathers(int64_t m, int64_t cols) {
  return m <= L::kRows ||
         L::kRows * cols * static_cast<int64_t>(sizeof(typename L::Element)) <= kGatherChunkBytes;
}

// Rows of x that make the chunks of m rows: even, and as equal as can be.
template <class L>
int64_t gather_chunk(int64_t m) {
  const int64_t chunks = (m + L::kRows - 1) / L::kRows;
  return ((m + chunks - 1) / chunks + 1) / 2 * 2;
}

// Rows of W a block: an even number. A single chunk of x needs no block to stay in the cache.
template <class L>
int64_t gather_block(int64_t m, int64_t row_bytes) {
  if (m <= L::kRows) return 16;
  return std::clamp<int64_t>(kGatherBlockBytes / row_bytes / 2 * 2, 16, kMaxGatherBlock);
}

// `count` rows of W from row r0 times one chunk of M rows of x.
template <class L, int M>
void gather_rows(const Weights& w, int64_t r0, int64_t count, const typename L::Element* x,
                 int64_t ahead, float* sums) {
  using T = typename L::Value;
  constexpr int kSide = L::side(M);  // pairs whose sums fit the registers
  const int64_t n = mask_words(w.cols), pairs = (count + 1) / 2;
  constexpr int64_t kPiece =
      kGatherPiece / (M * kMaskColumns * static_cast<int64_t>(sizeof(typename L::Element)));
  PairOfRows<T> rows[kMaxGatherBlock / 2];
  for (int64_t r = 0; r < 2 * pairs; ++r) {
    const int64_t row = r0 + std::min(r, count - 1);  // an odd last row is its own partner
    rows[r / 2].v[r % 2] = static_cast<const T*>(w.values) + w.begin(row);
    rows[r / 2].meta[r % 2] = w.meta + row * w.meta_stride;
  }
  std::fill(sums, sums + pairs * M * 16, 0.0f);
  for (int64_t i0 = 0; i0 < n; i0 += kPiece) {
    const int64_t i1 = std::min(n, i0 + kPiece);
    int64_t g = 0;
    for (; g + kSide <= pairs; g += kSide)
      gather_pairs<L, M, kSide>(rows + g, w.cols, i0, i1, x, ahead, sums + g * M * 16);
    if (g < pairs) gather_pairs<L, M, 1>(rows + g, w.cols, i0, i1, x, ahead, sums + g * M * 16);
  }
}

// The sums of `count` rows of W for `tokens` rows of x, `chunk` of which they were made for.
template <class X>
void store_pairs(const float* sums, int64_t chunk, int64_t tokens, int64_t count,
                 const float* scales, const float* bias, X* y, int64_t stride) {
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t m = 0; m < tokens; m += 4) {
      const auto vector = [&](int64_t i) {
        return _mm512_load_ps(sums + (r / 2 * chunk + std::min(m + i, chunk - 1)) * 16);
      };
      float sum[2][4];
      sum_halves(vector(0), vector(1), vector(2), vector(3), sum[0], sum[1]);
      for (int64_t k = 0; k < std::min<int64_t>(2, count - r); ++k)
        for (int64_t i = 0; i < std::min<int64_t>(4, tokens - m); ++i)
          store(y + (m + i) * stride + r + k,
                sum[k][i] * (scales ? scales[r + k] : 1.0f) + (bias ? bias[r + k] : 0.0f));
    }
}

// Rows [r0, r0 + count) of the output.
template <class L, class X>
void gather_outputs(const SparseLinearArgs& a, const Weights& w, int64_t r0, int64_t count,
                    int64_t chunk, const typename L::Element* packed, float* sums) {
  const int64_t total = a.x.shape[0], width = mask_words(w.cols) * kMaskColumns;
  const int64_t ahead = (w.begin(std::min(r0 + count, w.rows - 1)) - w.begin(r0)) *
                        static_cast<int64_t>(sizeof(typename L::Value));
  const float* bias = a.bias ? a.bias->ptr<const float>() + r0 : nullptr;
  for (int64_t m0 = 0; m0 < total; m0 += chunk) {
    with_rows<L::kRows, 2>(chunk, [&](auto rows) {
      gather_rows<L, decltype(rows)::value>(w, r0, count, packed + m0 * width, m0 == 0 ? ahead : 0,
                                            sums);
    });
    store_pairs(sums, chunk, std::min(chunk, total - m0), count, a.scales ? a.scales + r0 : nullptr,
                bias, a.y.ptr<X>() + m0 * w.rows + r0, w.rows);
  }
}

template <class L, class X>
void run_gather(const SparseLinearArgs& a, const Weights& w) {
  using E = typename L::Element;
  const int64_t m = a.x.shape[0], n = mask_words(w.cols), chunk = gather_chunk<L>(m);
  const int64_t chunks = (m + chunk - 1) / chunk;
  const int64_t row_bytes =
      w.cols / 2 * static_cast<int64_t>(sizeof(typename L::Value)) + w.meta_stride;
  const int64_t block = gather_block<L>(m, row_bytes), blocks = (w.rows + block - 1) / block;
  const int64_t sum_floats = block / 2 * chunk * 16;
  const int64_t x_elements = chunks * chunk * n * kMaskColumns;
  Scratch scratch(x_elements * static_cast<int64_t>(sizeof(E)) + a.threads * sum_floats * 4);
  E* packed = scratch.as<E>();
  float* sums = reinterpret_cast<float*>(packed + x_elements);
  const X* x = a.x.ptr<const X>();
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks * n; ++i) {
      const int64_t m0 = i / n * chunk, c = i % n * kMaskColumns;
      pack_gather<L>(x + m0 * a.x.stride[0] + c, a.x.stride[0], std::min(chunk, m - m0), chunk,
                     std::min(kMaskColumns, w.cols - c), packed + i * chunk * kMaskColumns);
    }
    float* mine = sums + omp_get_thread_num() * sum_floats;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < blocks; ++g) {
      const int64_t r0 = g * block, count = std::min(block, w.rows - r0);
      prefetch_meta(w, r0 + block, block);
      gather_outputs<L, X>(a, w, r0, count, chunk, packed, mine);
    }
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
