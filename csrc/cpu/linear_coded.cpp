// Products with coded weights. With few rows of x W is read from memory once, decoded 64 columns at
// a time in registers and multiplied there; with more it is decoded into the tiles of
// sparse_gemm.h.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "cpu/coded_rows.h"
#include "cpu/pack_few.h"
#include "cpu/sparse_bf16.h"
#include "cpu/sparse_gemm.h"

namespace pyprune {
namespace PYPRUNE_ISA {

struct CodedWeights : Weights {
  CodedMatrix coded;
  explicit CodedWeights(const LinearCodedArgs& a) : Weights(a.linear), coded(a.w) {}
};

// What the tiles are decoded from.
struct LowByte {
  uint8_t bits;
};

template <>
struct Cursor<LowByte> {
  const LowByte* v;  // the next columns; the tile's decoder goes by `row`
  CodedRow row;
  // The codes of the same row of the next tile, and how many columns of this one are left.
  const uint8_t* next_codes;
  int64_t left;

  static Cursor at(const Weights& w, int64_t r, const uint64_t*) {
    const CodedMatrix& coded = static_cast<const CodedWeights&>(w).coded;
    const CodedRow row = coded.row(r);
    return {reinterpret_cast<const LowByte*>(row.low), row,
            row.codes + kTileRows * code_bytes(w.cols), w.cols};
  }
  Cursor& take(int64_t columns) {
    v += columns;
    return *this;
  }
  bool complete() const { return row.complete(); }

  // The next columns; the codes of the next tile (what else it needs sparse_gemm.h fetches), this
  // row's or another's, are fetched while this one is multiplied.
  void decode(int64_t columns, bf16* out) {
    PYPRUNE_ISA::decode(row, columns, out);
    left -= columns;
    const uint8_t* next = left > 0 ? row.codes : next_codes;
    for (int64_t b = 0; b < code_bytes(columns) + 64; b += 64) __builtin_prefetch(next + b, 0, 2);
    __builtin_prefetch(row.escapes + 64, 0, 2);
  }
};

namespace {

// Rows of W that share a piece of x small enough for the first-level cache; with one or two rows of
// x, of which all of it is, as many as few_rows() says.
constexpr int64_t kFewBlockRows = 16, kMostBlockRows = 32;
constexpr int64_t kFewPieceBytes = 24 * 1024;

// How far ahead of its use W is fetched, at least: a row is too short for the hardware to foresee
// its stream, and with less the memory is waited for (49152 x 576: 0.83 of the dense product's time
// with 2 KB, 0.70 with 9).
constexpr int64_t kFetchBytes = 8 * 1024;

// Words of columns [i0, i1) of a matrix with `cols` columns. ahead: rows from what is multiplied to
// what is fetched meanwhile.
struct Span {
  int64_t cols, i0, i1, ahead;
};

// A Kernel has: what pack_few() asks of it; kMost, the rows of x up to which it beats the tiles;
// side(m), the rows of W that one turn multiplies side by side (independent streams and sums); and
// rows<M, R>(), which adds R rows of W from their cursors on times M rows of x to the R x M vectors
// in `sums`, where the first span of a row begins with zeros.

#if defined(__AVX512F__)

// How Fused reads x. Apart from it, as what is compiled for more instructions than its caller is
// never inlined.
template <class X>
struct FusedLayout : OnePart<X, false> {
  static int64_t place(int64_t c) { return sizeof(X) == 2 ? c : column_place<bf16>(c); }
};

#pragma GCC push_options
#pragma GCC target("avx512vbmi,avx512vbmi2")

// 32 columns of x, and their products with those of W. fp32: the even columns, then the odd ones,
// as a shift and a mask widen W.
template <class X>
struct Columns;

template <>
struct Columns<bf16> {
  __m512i x;
  explicit Columns(const bf16* p) : x(_mm512_load_si512(p)) {}
  void add_product(__m512i w, __m512& sum) const {
    // Assembly because not every processor with this target has AVX512_BF16.
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  }
};

template <>
struct Columns<float> {
  __m512 even, odd;
  explicit Columns(const float* p) : even(_mm512_load_ps(p)), odd(_mm512_load_ps(p + 16)) {}
  void add_product(__m512i w, __m512& sum) const {
    const __m512i high = _mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), even, sum);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(high), odd, sum);
  }
};

// In registers, word by word: pairs of bf16 products, summed in fp32, or fp32 products.
template <class X>
struct Fused : FusedLayout<X> {
  // For 64 weights a Zen 4 core takes 4 ns and 0.8 for every bf16 row of x, 1.2 from nine on;
  // through tiles 16 for any 16 of them. fp32: 4, 1.6 and 1.7; 29 (512 x 576, in the cache).
  static constexpr int kMost = 12;
  static constexpr int side(int m) { return m <= 2 ? 4 : m <= 8 ? 2 : 1; }

  template <int M, int R>
  static void rows(const Span& s, CodedRow* cursors, const X* x, float* sums) {
    const Decode64 decode;
    const uint8_t *low[R], *codes[R], *escapes[R], *end[R];
    bool sound[R];
    __m512i base[R];
    __m512 acc[R][M];
    // Unrolled, here and below, so that the arrays become registers.
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      low[r] = cursors[r].low - s.i0 * kMaskColumns;
      codes[r] = cursors[r].codes - s.i0 * kCodeBytes;
      escapes[r] = cursors[r].escapes;
      end[r] = cursors[r].end;
      sound[r] = cursors[r].sound;
      base[r] = _mm512_set1_epi8(static_cast<char>(cursors[r].base));
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) acc[r][m] = _mm512_setzero_ps();
    }
    const int64_t whole = std::min(s.i1, s.cols / kMaskColumns);
    const int64_t low_ahead = s.ahead * s.cols, codes_ahead = s.ahead * code_bytes(s.cols);
    const auto decode_word = [&](int64_t i, auto tail,
                                 __m512i(*w)[2]) __attribute__((always_inline)) {
      constexpr bool kTail = decltype(tail)::value;
      const int64_t columns = kTail ? s.cols % kMaskColumns : 0;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const uint8_t *l = low[r] + i * kMaskColumns, *c = codes[r] + i * kCodeBytes;
        __builtin_prefetch(l + low_ahead, 0, 2);
        __builtin_prefetch(c + codes_ahead, 0, 2);
        decode.word<kTail>(l, c, escapes[r], end[r], sound[r], base[r], columns, w[r]);
      }
    };
    const auto multiply = [&](int64_t i, const __m512i(*w)[2]) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        const X* xm = x + (i * M + m) * kMaskColumns;
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) {
          const Columns<X> columns(xm + 32 * h);
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) columns.add_product(w[r][h], acc[r][m]);
        }
      }
    };
    // Few rows are decoded a step before they are used (see bitmap_rows()); four hide more by being
    // four.
    __m512i w[R][2];
    if constexpr (R <= 2) {
      if (s.i0 < whole) decode_word(s.i0, std::false_type(), w);
      for (int64_t i = s.i0 + 1; i < whole; ++i) {
        __m512i next[R][2];
        decode_word(i, std::false_type(), next);
        multiply(i - 1, w);
        for (int r = 0; r < R; ++r) w[r][0] = next[r][0], w[r][1] = next[r][1];
      }
      if (s.i0 < whole) multiply(whole - 1, w);
    } else {
      for (int64_t i = s.i0; i < whole; ++i) {
        decode_word(i, std::false_type(), w);
        multiply(i, w);
      }
    }
    if (whole < s.i1) {
      decode_word(whole, std::true_type(), w);
      multiply(whole, w);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      cursors[r].low = low[r] + s.i1 * kMaskColumns;
      cursors[r].codes = codes[r] + s.i1 * kCodeBytes;
      cursors[r].escapes = escapes[r];
      cursors[r].sound = sound[r];
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m) {
        float* to = sums + (r * M + m) * 16;
        _mm512_store_ps(to, s.i0 ? _mm512_add_ps(acc[r][m], _mm512_load_ps(to)) : acc[r][m]);
      }
    }
  }
};

#pragma GCC pop_options

// W as pairs of bf16 for the tiles.
struct TilePairs : AsPairs {
  using Value = LowByte;
  static constexpr bool kExpands = false;
  static void widen(Cursor<LowByte>& cursor, int64_t columns, float* row) {
    cursor.decode(columns, reinterpret_cast<bf16*>(row));
  }
};

#else

// fp32. W is decoded some words ahead into the first-level cache: a load that takes what several
// stores left there waits for them.
struct Floats : OnePart<float, false> {
  static constexpr int kMost = 8;
  static constexpr int side(int m) { return m <= 2 ? 4 : m <= 4 ? 2 : 1; }
  static int64_t place(int64_t c) { return c; }
  static constexpr int64_t kWords = 8;  // decoded at a time

  template <int M, int R>
  static void rows(const Span& s, CodedRow* cursors, const float* x, float* sums) {
    Vec acc[R][M];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[r][m] = Vec::zero();
    alignas(64) bf16 decoded[R][kWords * kMaskColumns];
    for (int64_t i = s.i0; i < s.i1; i += kWords) {
      const int64_t words = std::min(kWords, s.i1 - i);
      for (int r = 0; r < R; ++r) {
        for (int64_t k = 0; k < words; ++k) {
          __builtin_prefetch(cursors[r].low + s.ahead * s.cols + k * kMaskColumns, 0, 2);
          __builtin_prefetch(cursors[r].codes + s.ahead * code_bytes(s.cols) + k * kCodeBytes, 0,
                             2);
        }
        decode(cursors[r], std::min(words * kMaskColumns, s.cols - i * kMaskColumns), decoded[r]);
      }
      const float* xi = x + i * M * kMaskColumns;
      for (int64_t k = 0; k < words; ++k, xi += M * kMaskColumns) {
#pragma GCC unroll 8
        for (int c = 0; c < kMaskColumns; c += Vec::kLanes) {
          Vec w[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) w[r] = Vec::load(decoded[r] + k * kMaskColumns + c);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            const Vec xm = Vec::load(xi + m * kMaskColumns + c);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) acc[r][m] = Vec::fma(w[r], xm, acc[r][m]);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        float* to = sums + (r * M + m) * Vec::kLanes;
        (s.i0 ? acc[r][m] + Vec::load(to) : acc[r][m]).store(to);
      }
  }
};

#endif

#if defined(PYPRUNE_NEON)

// Before tiles of bf16. Beside the decoding 64 columns take, by llvm-mca on Neoverse N2, V1 and V2,
// 38, 20 and 19 cycles for three rows of x and 49, 24 and 25 for four; in tiles 26, 18 and 18 for
// up to eight.
struct FewFloats : Floats {
  static constexpr int kMost = 3;
};

// W as bf16 for the tiles.
struct TileBlocks : AsBlocks<bf16> {
  using Value = LowByte;
  static constexpr bool kExpands = false;
  static void widen(Cursor<LowByte>& cursor, int64_t columns, float* row) {
    alignas(64) bf16 decoded[kColumns];
    cursor.decode(columns, decoded);
    AsBlocks<bf16>::widen(decoded, mask_words(columns) * kMaskColumns, row);
  }
};

#endif

// W as floats for the tiles, in the order of their columns.
struct TileFloats : AsFloats<float> {
  using Value = LowByte;
  static constexpr bool kExpands = false;
  static void widen(Cursor<LowByte>& cursor, int64_t columns, float* row) {
    alignas(64) bf16 decoded[kColumns];
    cursor.decode(columns, decoded);
    for (int64_t c = 0; c < mask_words(columns) * kMaskColumns; c += Vec::kLanes)
      Vec::load(decoded + c).store(row + c);
  }
};

// `count` rows of W from their cursors times the M rows of packed x into `sums`.
// Not inlined: compiled once for all dtypes of x and y.
template <class Kernel, int M>
[[gnu::noinline]] void few_block(const CodedMatrix& w, CodedRow* rows, int64_t count, int64_t ahead,
                                 const typename Kernel::T* x, float* sums) {
  constexpr int kSide = Kernel::side(M);
  const int64_t n = mask_words(w.cols);
  // For one or two rows of x all of it stays in the first-level cache.
  constexpr int64_t word_bytes = kMaskColumns * sizeof(typename Kernel::T) * M;
  const int64_t piece = M <= 2 ? n : std::max<int64_t>(1, kFewPieceBytes / word_bytes);
  for (int64_t i0 = 0; i0 < n; i0 += piece) {
    const Span span{w.cols, i0, std::min(n, i0 + piece), ahead};
    int64_t r = 0;
    for (; r + kSide <= count; r += kSide)
      Kernel::template rows<M, kSide>(span, rows + r, x, sums + r * M * Vec::kLanes);
    for (; r < count; ++r)
      Kernel::template rows<M, 1>(span, rows + r, x, sums + r * M * Vec::kLanes);
  }
}

// Rows [r0, r0 + count) of the output.
template <class Kernel, class X>
void few_outputs(const SparseLinearArgs& a, const CodedMatrix& w, int64_t r0, int64_t count,
                 int64_t ahead, const typename Kernel::T* x, float* sums,
                 std::atomic<int64_t>* broken) {
  const int64_t total = a.x.shape[0];
  CodedRow rows[kMostBlockRows];
  for (int64_t r = 0; r < count; ++r) rows[r] = w.row(r0 + r);
  with_rows<Kernel::kMost>(total, [&](auto m) {
    few_block<Kernel, decltype(m)::value>(w, rows, count, ahead, x, sums);
  });
  for (int64_t r = 0; r < count; ++r)
    if (!rows[r].complete()) return broken->store(r0 + r, std::memory_order_relaxed);
  store_outputs(sums, count, total, nullptr, a.bias ? a.bias->ptr<const float>() + r0 : nullptr,
                a.y.ptr<X>() + r0, w.rows);
}

template <class Kernel, class X>
void few_rows(const SparseLinearArgs& a, const CodedMatrix& w, std::atomic<int64_t>* broken) {
  using T = typename Kernel::T;
  const int64_t m = a.x.shape[0];
#if defined(__AVX512F__)
  const int64_t few = few_rows_block(w.rows, w.cols, a.threads);
#else
  const int64_t few = 4;
#endif
  const int64_t block = m <= 2 ? few : kFewBlockRows;
  const int64_t blocks = (w.rows + block - 1) / block;
  const int64_t ahead = block * ((kFetchBytes + block * w.cols - 1) / (block * w.cols));
  const int64_t sum_floats =
      std::max(kFewBlockRows * Kernel::kMost, kMostBlockRows * 2) * Vec::kLanes;
  const int64_t x_bytes = m * mask_words(w.cols) * kMaskColumns * static_cast<int64_t>(sizeof(T));
  Scratch scratch(x_bytes + a.threads * sum_floats * 4);
  T* x = scratch.as<T>();
  auto* sums = reinterpret_cast<float*>(scratch.as<char>() + x_bytes);
  pack_few<Kernel>(a.x.ptr<const X>(), a.x.stride[0], m, w.cols, mask_words(w.cols), x);
#pragma omp parallel for schedule(static) num_threads(a.threads)
  for (int64_t g = 0; g < blocks; ++g) {
    const int64_t r0 = g * block;
    few_outputs<Kernel, X>(a, w, r0, std::min(block, w.rows - r0), ahead, x,
                           sums + omp_get_thread_num() * sum_floats, broken);
  }
}

template <class Kernel, class Tile, class X>
void run(const LinearCodedArgs& a) {
  std::atomic<int64_t> broken{-1};
  if (a.linear.x.shape[0] <= Kernel::kMost)
    few_rows<Kernel, X>(a.linear, CodedMatrix(a.w), &broken);
  else
    run_multiply<Tile, X>(a.linear, CodedWeights(a), &broken);
  if (broken.load() >= 0) refuse_row(broken.load());
}

}  // namespace

void linear_coded(const LinearCodedArgs& args) {
  const bool floats = args.linear.x.dtype == DType::f32;
#if defined(__AVX512F__)
  if (!processor().moves_bytes) return avx2::linear_coded(args);
  if (floats) return run<Fused<float>, TileFloats, float>(args);
  if (current_isa() >= Isa::avx512_bf16) return run<Fused<bf16>, TilePairs, bf16>(args);
  return run<Fused<float>, TileFloats, bf16>(args);
#else
#if defined(PYPRUNE_NEON)
  if (!floats && current_isa() == Isa::neon_bf16) return run<FewFloats, TileBlocks, bf16>(args);
#endif
  return floats ? run<Floats, TileFloats, float>(args) : run<Floats, TileFloats, bf16>(args);
#endif
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
