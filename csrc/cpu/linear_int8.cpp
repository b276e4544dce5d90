// Dense int8 weights with a scale a row. With few rows of x W is read from memory once, widened in
// registers for every eight of them and multiplied there; with more it is widened once, into the
// tiles of sparse_gemm.h.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "cpu/int8_sums.h"
#include "cpu/pack_few.h"
#include "cpu/sparse_blocks.h"
#include "cpu/sparse_gemm.h"
#include "cpu/sparse_int8.h"
#include "cpu/widen_int8.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

constexpr int kChunk = 8;              // rows of x that one pass over a block of W serves
constexpr int64_t kFewBlockRows = 16;  // of W; they stay in the second level between chunks
constexpr int64_t kFewPieceBytes = 24 * 1024;

inline Vec widen(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q))};
#elif defined(__AVX2__)
  const __m128i q = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q))};
#elif defined(PYPRUNE_NEON)
  return expand8(p, 0xff);  // widening step by step has one of the vector pipes to itself
#else
  Vec w;
  for (int i = 0; i < Vec::kLanes; ++i) w.v[i] = static_cast<float>(p[i]);
  return w;
#endif
}

// `n` < kMaskColumns bytes from p, then zeros: no load may reach past the matrix.
struct LastWord {
  alignas(64) int8_t bytes[kMaskColumns] = {};
  LastWord(const int8_t* p, int64_t n) { std::memcpy(bytes, p, static_cast<size_t>(n)); }
};

// Rows of W from q, `cols` apart, words of columns [i0, i1), times packed x.
struct Piece {
  const int8_t* q;
  int64_t cols, i0, i1;
  int64_t ahead;  // bytes to what is multiplied next, which is fetched meanwhile
};

// Each Kernel has: what pack_few() asks of it; few(m), whether it beats the tiles at m rows of x;
// side(m), the rows of W that one turn multiplies side by side (independent streams and sums); and
// rows<M, R>(), which adds R rows of W times M rows of x to the R x M vectors in `sums`.

// fp32. Sums and a vector of W leave room in the register file; a portable Vec takes two.
struct Floats : OnePart<float, true> {
  static bool few(int64_t m) { return m <= 32; }
#if defined(__AVX512F__)
  static constexpr int side(int m) { return m <= 4 ? 4 : 2; }
#else
  static constexpr int side(int m) { return m <= 2 ? 4 : m <= 4 ? 2 : 1; }
#endif
  static int64_t place(int64_t c) { return c; }

  template <int M, int R>
  static void rows(const Piece& p, const float* x, float* sums) {
    Vec acc[R][M];
    load_sums(sums, acc);
    const auto step = [&](int64_t i, const int8_t* q, int64_t stride)
                          __attribute__((always_inline)) {
                            const float* xi = x + i * M * kMaskColumns;
#pragma GCC unroll 8
                            for (int c = 0; c < kMaskColumns; c += Vec::kLanes) {
                              Vec w[R];
#pragma GCC unroll 4
                              for (int r = 0; r < R; ++r) w[r] = widen(q + r * stride + c);
#pragma GCC unroll 8
                              for (int m = 0; m < M; ++m) {
                                Vec xm = Vec::load(xi + m * kMaskColumns + c);
                                hold(xm);
#pragma GCC unroll 4
                                for (int r = 0; r < R; ++r)
                                  acc[r][m] = Vec::fma(w[r], xm, acc[r][m]);
                              }
                            }
                          };
    const int64_t whole = std::min(p.i1, p.cols / kMaskColumns);
    for (int64_t i = p.i0; i < whole; ++i) {
      const int8_t* q = p.q + i * kMaskColumns;
      for (int r = 0; r < R; ++r) __builtin_prefetch(q + r * p.cols + p.ahead, 0, 2);
      step(i, q, p.cols);
    }
    if (whole < p.i1) {
      alignas(64) int8_t last[R][kMaskColumns] = {};
      const int8_t* q = p.q + whole * kMaskColumns;
      for (int r = 0; r < R; ++r)
        std::memcpy(last[r], q + r * p.cols, static_cast<size_t>(p.cols % kMaskColumns));
      step(whole, last[0], kMaskColumns);
    }
    store_sums(acc, sums);
  }
};

// W as floats for the tiles.
struct TileFloats : AsFloats<float> {
  using Value = int8_t;
  static constexpr bool kExpands = false;
  static void widen(const int8_t* v, int64_t columns, float* row) {
    int64_t c = 0;
    for (; c + kMaskColumns <= columns; c += kMaskColumns) widen64(v + c, row + c);
    if (c < columns) widen64(LastWord(v + c, columns - c).bytes, row + c);
  }

 private:
  static void widen64(const int8_t* v, float* row) {
    for (int c = 0; c < kMaskColumns; c += Vec::kLanes) PYPRUNE_ISA::widen(v + c).store(row + c);
  }
};

#if defined(__AVX512F__)

// Where Pairs wants a column of x. Apart from it, as what is compiled for more instructions than
// its caller is never inlined.
struct PairsLayout : OnePart<bf16, true> {
  static int64_t place(int64_t c) { return widen64_place(c); }
};

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512vbmi,avx512vbmi2,avx512vpopcntdq")

// Pairs of bf16 products, summed in fp32.
struct Pairs : PairsLayout {
  // Two Zen 4 cores, 8192 x 4096 from memory, ms at 12, 16, 24 and 32 rows of x: 3.0, 3.6, 5.8 and
  // 7.0; through tiles, which take 16 rows at a time, 3.7, 3.7, 6.0 and 6.0.
  static bool few(int64_t m) { return m <= (current_isa() >= Isa::avx512_amx ? kBeforeTiles : 22); }
  static constexpr int side(int m) { return m <= 4 ? 4 : 2; }

  template <int M, int R>
  static void rows(const Piece& p, const bf16* x, float* sums) {
    const Widen64 widen;
    Vec acc[R][M];
    load_sums(sums, acc);
    const auto step = [&](int64_t i, __mmask64 valid) __attribute__((always_inline)) {
      const int8_t* q = p.q + i * kMaskColumns;
      __m512bh w[R][2];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        widen(_mm512_maskz_loadu_epi8(valid, q + r * p.cols), w[r]);
        _mm_prefetch(reinterpret_cast<const char*>(q + r * p.cols) + p.ahead, _MM_HINT_T1);
      }
      add_pairs(w, x + i * M * kMaskColumns, acc);
    };
    const int64_t whole = std::min(p.i1, p.cols / kMaskColumns);
    for (int64_t i = p.i0; i < whole; ++i) step(i, ~uint64_t{0});
    if (whole < p.i1) step(whole, (uint64_t{1} << (p.cols % kMaskColumns)) - 1);
    store_sums(acc, sums);
  }
};

// W as pairs of bf16 for the tiles, in the order of Widen64.
struct TilePairs : AsPairs {
  using Value = int8_t;
  static constexpr bool kPairs = false;  // its columns have an order of their own
  static constexpr bool kExpands = false;
  static void pack(const bf16* x, int64_t c0, int64_t c1, int64_t t, float* panel) {
    for (int64_t c = c0; c < c1; c += 2) {
      const int64_t word = (c - c % kMaskColumns + widen64_place(c % kMaskColumns)) / 2;
      std::memcpy(panel + word * kPanelTokens + t, x + c, (c + 1 < c1 ? 2 : 1) * sizeof(bf16));
    }
  }
  static void widen(const int8_t* v, int64_t columns, float* row) {
    const Widen64 widen;
    for (int64_t c = 0; c < columns; c += kMaskColumns) {
      const int64_t left = columns - c;
      const uint64_t valid = left >= kMaskColumns ? ~uint64_t{0} : (uint64_t{1} << left) - 1;
      __m512bh w[2];
      widen(_mm512_maskz_loadu_epi8(valid, v + c), w);
      _mm512_storeu_si512(row + c / 2, reinterpret_cast<__m512i>(w[0]));
      _mm512_storeu_si512(row + c / 2 + 16, reinterpret_cast<__m512i>(w[1]));
    }
  }
};

#pragma GCC pop_options

#endif

// `count` rows of W from q times one chunk of M rows of x into `sums`.
// Not inlined: compiled once for all dtypes of x and y.
template <class Kernel, int M>
[[gnu::noinline]] void few_block(const int8_t* q, int64_t cols, int64_t count,
                                 const typename Kernel::T* x, float* sums) {
  constexpr int kSide = Kernel::side(M);
  const int64_t n = mask_words(cols);
  // For one or two rows of x all of it stays in the first-level cache.
  constexpr int64_t word_bytes = kMaskColumns * sizeof(typename Kernel::T) * M;
  const int64_t piece = M <= 2 ? n : std::max<int64_t>(1, kFewPieceBytes / word_bytes);
  std::fill(sums, sums + count * M * Vec::kLanes, 0.0f);
  for (int64_t i0 = 0; i0 < n; i0 += piece) {
    const int64_t i1 = std::min(n, i0 + piece);
    int64_t r = 0;
    for (; r + kSide <= count; r += kSide)
      Kernel::template rows<M, kSide>({q + r * cols, cols, i0, i1, count * cols}, x,
                                      sums + r * M * Vec::kLanes);
    for (; r < count; ++r)
      Kernel::template rows<M, 1>({q + r * cols, cols, i0, i1, count * cols}, x,
                                  sums + r * M * Vec::kLanes);
  }
}

// Rows [r0, r0 + count) of the output, chunk by chunk of the packed x.
template <class Kernel, class X>
void few_outputs(const SparseInt8Args& a, int64_t r0, int64_t count, const typename Kernel::T* x,
                 float* sums) {
  const SparseLinearArgs& l = a.linear;
  const int64_t total = l.x.shape[0], width = mask_words(l.cols) * kMaskColumns;
  const int8_t* q = l.values.ptr<const int8_t>() + r0 * l.cols;
  const float* scales = a.scales.ptr<const float>() + r0;
  const float* bias = l.bias ? l.bias->ptr<const float>() + r0 : nullptr;
  for (int64_t m0 = 0; m0 < total; m0 += kChunk) {
    const int64_t chunk = std::min<int64_t>(kChunk, total - m0);
    with_rows<kChunk>(chunk, [&](auto rows) {
      few_block<Kernel, decltype(rows)::value>(q, l.cols, count, x + m0 * width, sums);
    });
    store_outputs(sums, count, chunk, scales, bias, l.y.ptr<X>() + m0 * l.rows + r0, l.rows);
  }
}

template <class Kernel, class X>
void few_rows(const SparseInt8Args& a) {
  const SparseLinearArgs& l = a.linear;
  const int64_t m = l.x.shape[0], width = mask_words(l.cols) * kMaskColumns;
  const int64_t block =
      m <= 2 ? std::min(few_rows_block(l.rows, l.cols, l.threads), kFewBlockRows) : kFewBlockRows;
  const int64_t blocks = (l.rows + block - 1) / block;
  const int64_t sum_floats = kFewBlockRows * kChunk * Vec::kLanes;
  const int64_t x_bytes = m * width * static_cast<int64_t>(sizeof(typename Kernel::T));
  Scratch scratch(x_bytes + l.threads * sum_floats * 4);
  auto* x = scratch.as<typename Kernel::T>();
  auto* sums = reinterpret_cast<float*>(scratch.as<char>() + x_bytes);
  for (int64_t m0 = 0; m0 < m; m0 += kChunk)
    pack_few<Kernel>(l.x.ptr<const X>() + m0 * l.x.stride[0], l.x.stride[0],
                     std::min<int64_t>(kChunk, m - m0), l.cols, mask_words(l.cols), x + m0 * width);
#pragma omp parallel for schedule(static) num_threads(l.threads)
  for (int64_t g = 0; g < blocks; ++g) {
    const int64_t r0 = g * block;
    few_outputs<Kernel, X>(a, r0, std::min(block, l.rows - r0), x,
                           sums + omp_get_thread_num() * sum_floats);
  }
}

template <class Kernel, class Tile, class X>
void run_int8(const SparseInt8Args& a) {
  if (Kernel::few(a.linear.x.shape[0])) return few_rows<Kernel, X>(a);
  SparseLinearArgs tiled = a.linear;
  tiled.scales = a.scales.ptr<const float>();
  std::atomic<int64_t> broken{-1};  // dense rows are never inconsistent
  run_multiply<Tile, X>(tiled, Weights(tiled), &broken);
}

}  // namespace

void linear_int8(const SparseInt8Args& args) {
  if (args.linear.x.dtype == DType::f32) return run_int8<Floats, TileFloats, float>(args);
#if defined(__AVX512F__)
  if (current_isa() >= Isa::avx512_bf16) return run_int8<Pairs, TilePairs, bf16>(args);
#elif defined(PYPRUNE_NEON)
  // One row takes fewer cycles as floats: the way to bf16 costs more than the products save.
  if (current_isa() == Isa::neon_bf16 && args.linear.x.shape[0] > 1) {
    SparseLinearArgs scaled = args.linear;
    scaled.scales = args.scales.ptr<const float>();
    std::atomic<int64_t> broken{-1};  // dense rows are never inconsistent
    return run_blocks<int8_t>(scaled, Weights(scaled), &broken);
  }
#endif
  run_int8<Floats, TileFloats, bf16>(args);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
