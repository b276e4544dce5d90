#include "cpu/sparse_int8.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <type_traits>

#include "cpu/bitmap_table.h"
#include "cpu/int8_sums.h"
#include "cpu/int8_wide.h"
#include "cpu/pack_few.h"
#include "cpu/sparse_bf16.h"
#include "cpu/sparse_gather_int8.h"
#include "cpu/sparse_int8_bf16.h"
#include "cpu/sparse_rows.h"
#include "cpu/sparse_run.h"
#include "cpu/sparse_table.h"
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "cpu/sparse_gather_avx2.h"
#include "cpu/sparse_panels.h"
#elif defined(PYPRUNE_NEON)
#include "cpu/sparse_blocks.h"
#endif
#include "cpu/widen_int8.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// Rows of x that one pass over W serves.
constexpr int kInt8ChunkRows = 8;

constexpr int64_t kInt8BlockRows = 16;
// A piece of x for the first-level cache; for one or two rows of x all of it is one.
constexpr int64_t kInt8PieceBytes = 24 * 1024;

// Each Kernel has: what pack_few() asks of it; kMost, the most rows of x; meta(w, r, words), what
// it reads beside the values of row r (a mask padded to whole words, for which there is room at
// `words`, or 2:4 metadata), null when the row is inconsistent; side(m), the rows of W that one
// turn multiplies side by side (independent streams and sums); and rows<M, R>(), which adds R rows
// of W, words [i0, i1), times M rows of x to the R x M vectors in `sums`.

#if defined(__AVX512F__)

#pragma GCC push_options
#pragma GCC target("avx512vbmi,avx512vbmi2")

// The 64 columns of one word as fp32, zeros where nothing is kept. Each byte is widened where it
// lies in its 32-bit lane, so that column 4 l + b is lane l of vector b.
struct Columns64 {
  __m512 v[4];
  Columns64() = default;
  Columns64(uint64_t keep, const int8_t* p) {
    const __m512i q = expand_bytes(keep, p);
    v[0] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(q, 24), 24));
    v[1] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(q, 16), 24));
    v[2] = _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(q, 8), 24));
    v[3] = _mm512_cvtepi32_ps(_mm512_srai_epi32(q, 24));
  }
};

template <int M, int R>
void spread_rows(const int8_t*, ByteCursor* cursors, int64_t i0, int64_t i1, const float* x,
                 int64_t ahead, float* sums) {
  Vec acc[R][M];
  load_sums(sums, acc);
  const int8_t* v[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) v[r] = cursors[r].v;
  for (int64_t i = i0; i < i1; ++i) {
    Columns64 w[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      uint64_t keep;
      std::memcpy(&keep, cursors[r].meta + 8 * i, 8);
      w[r] = Columns64(keep, v[r]);
      v[r] += popcount(keep);
      _mm_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) {
        Vec xm = Vec::load(x + (i * M + m) * kMaskColumns + 16 * b);
        hold(xm);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r][m] = Vec::fma({w[r].v[b]}, xm, acc[r][m]);
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) cursors[r].v = v[r];
  store_sums(acc, sums);
}

#pragma GCC pop_options

// Where Columns64 has a column.
inline int64_t columns64_place(int64_t c) { return 16 * (c & 3) + (c >> 2); }

// The sums of R x M products and the columns of R rows have to fit the registers.
constexpr int spread_side(int m) { return m <= 2 ? 4 : 2; }

#elif defined(PYPRUNE_SHUFFLES)

inline int64_t columns64_place(int64_t c) { return c; }

template <int M, int R>
void spread_rows(const int8_t* end, ByteCursor* cursors, int64_t i0, int64_t i1, const float* x,
                 int64_t ahead, float* sums) {
  RowsAt<int8_t, R> rows = {{}, {}, end, 0};
  for (int r = 0; r < R; ++r) rows.v[r] = cursors[r].v, rows.masks[r] = cursors[r].meta;
  multiply_words<int8_t, false, true, 64, M>(rows, i0, i1, x, ahead, nullptr, sums);
  for (int r = 0; r < R; ++r) cursors[r].v = rows.v[r];
}

constexpr int spread_side(int m) { return rows_of_a_turn(m); }

#else

inline int64_t columns64_place(int64_t c) { return c; }

// Without load_sums() and its kin: unrolled for sixteen registers of four floats it took 1.3 to 1.6
// times as long with four to eight rows of x.
template <int M, int R>
void spread_rows(const int8_t*, ByteCursor* cursors, int64_t i0, int64_t i1, const float* x,
                 int64_t, float* sums) {
  for (int r = 0; r < R; ++r) {
    Vec acc[M];
    for (int m = 0; m < M; ++m) acc[m] = Vec::load(sums + (r * M + m) * Vec::kLanes);
    const int8_t* v = cursors[r].v;
    for (int64_t i = i0; i < i1; ++i) {
      uint64_t keep;
      std::memcpy(&keep, cursors[r].meta + 8 * i, 8);
      float row[kMaskColumns];
      for (int c = 0; c < kMaskColumns; ++c)
        row[c] = (keep >> c) & 1 ? static_cast<float>(*v++) : 0.0f;
      for (int64_t c = 0; c < kMaskColumns; c += Vec::kLanes) {
        const Vec w = Vec::load(row + c);
        for (int m = 0; m < M; ++m)
          acc[m] = Vec::fma(w, Vec::load(x + (i * M + m) * kMaskColumns + c), acc[m]);
      }
    }
    cursors[r].v = v;
    for (int m = 0; m < M; ++m) acc[m].store(sums + (r * M + m) * Vec::kLanes);
  }
}

constexpr int spread_side(int m) { return m <= 4 ? 4 : 2; }

#endif

// fp32: spreads the values over their columns and multiplies.
struct Spread : OnePart<float, false> {
  static constexpr int kMost = kInt8ChunkRows;
  static constexpr int side(int m) { return spread_side(m); }
  static int64_t place(int64_t c) { return columns64_place(c); }
  static const uint8_t* meta(const Weights& w, int64_t r, uint64_t* words) {
    return row_mask(w, r, words) ? reinterpret_cast<const uint8_t*>(words) : nullptr;
  }
  template <int M, int R>
  static void rows(int64_t, const int8_t* end, ByteCursor* cursors, int64_t i0, int64_t i1,
                   const float* x, int64_t ahead, float* sums) {
    spread_rows<M, R>(end, cursors, i0, i1, x, ahead, sums);
  }
};

// Words of columns of packed x: an even number, as some kernels take two at a time.
inline int64_t packed_words(int64_t cols) { return (mask_words(cols) + 1) / 2 * 2; }

// One thread's buffers: mask words of a block of rows, and their sums.
struct FewScratch {
  uint64_t* words;
  float* sums;
};

// Rows [r0, r0 + count) of W times all M rows of x into `s.sums`; false, and the row noted, when
// one is inconsistent. Not inlined: compiled once for all dtypes of x and y.
template <class Kernel, int M>
[[gnu::noinline]] bool few_block(const Weights& w, int64_t r0, int64_t count,
                                 const typename Kernel::T* x, const FewScratch& s,
                                 std::atomic<int64_t>* broken) {
  constexpr int kSide = Kernel::side(M);
  const int64_t n = mask_words(w.cols);
  const auto* values = static_cast<const int8_t*>(w.values);
  ByteCursor cursors[kInt8BlockRows];
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* meta = Kernel::meta(w, r0 + r, s.words + r * n);
    if (!meta) {
      broken->store(r0 + r, std::memory_order_relaxed);
      return false;
    }
    cursors[r] = {values + w.begin(r0 + r), meta};
  }
  const int64_t ahead = w.begin_within(std::min(r0 + count, w.rows - 1)) - w.begin(r0);
  constexpr int64_t word_bytes = kMaskColumns * sizeof(typename Kernel::T) * Kernel::kParts * M;
  const int64_t piece = M <= 2 ? n : std::max<int64_t>(2, kInt8PieceBytes / word_bytes / 2 * 2);
  std::fill(s.sums, s.sums + count * M * Vec::kLanes, 0.0f);
  for (int64_t i0 = 0; i0 < n; i0 += piece) {
    const int64_t i1 = std::min(n, i0 + piece);
    int64_t r = 0;
    for (; r + kSide <= count; r += kSide)
      Kernel::template rows<M, kSide>(w.cols, values + w.nnz, cursors + r, i0, i1, x, ahead,
                                      s.sums + r * M * Vec::kLanes);
    for (; r < count; ++r)
      Kernel::template rows<M, 1>(w.cols, values + w.nnz, cursors + r, i0, i1, x, ahead,
                                  s.sums + r * M * Vec::kLanes);
  }
  return true;
}

template <class Kernel, class X, int M>
void few_rows(const SparseInt8Args& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int threads = a.linear.threads;
  const int64_t block =
      M <= 2 ? std::min(few_rows_block(w.rows, w.cols, threads), kInt8BlockRows) : kInt8BlockRows;
  const int64_t n = mask_words(w.cols), blocks = (w.rows + block - 1) / block;
  const int64_t sum_floats = block * M * Vec::kLanes;
  const Scratch packed(packed_words(w.cols) * M * kMaskColumns * Kernel::kParts *
                       sizeof(typename Kernel::T));
  const Scratch sums(threads * sum_floats * 4), words(threads * block * n * 8);
  auto* x = packed.as<typename Kernel::T>();
  pack_few<Kernel>(a.linear.x.ptr<const X>(), a.linear.x.stride[0], M, w.cols, packed_words(w.cols),
                   x);
  const float* scales = a.scales.ptr<const float>();
  const float* bias = a.linear.bias ? a.linear.bias->ptr<const float>() : nullptr;
  X* y = a.linear.y.ptr<X>();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t g = 0; g < blocks; ++g) {
    const int64_t r0 = g * block, count = std::min(block, w.rows - r0);
    const int64_t me = omp_get_thread_num();
    const FewScratch s{words.as<uint64_t>() + me * block * n, sums.as<float>() + me * sum_floats};
    prefetch_meta(w, r0 + block, block);
    if (!few_block<Kernel, M>(w, r0, count, x, s, broken)) continue;
    store_outputs(s.sums, count, M, scales + r0, bias ? bias + r0 : nullptr, y + r0, w.rows);
  }
}

template <class Kernel, class X, int M = Kernel::kMost>
void few_rows(const SparseInt8Args& a, const Weights& w, int64_t m, std::atomic<int64_t>* broken) {
  if (m == M)
    few_rows<Kernel, X, M>(a, w, broken);
  else if constexpr (M > 1)
    few_rows<Kernel, X, M - 1>(a, w, m, broken);
}

// At most kInt8ChunkRows rows of x.
template <class X>
void run_chunk(const SparseInt8Args& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int64_t m = a.linear.x.shape[0];
#if defined(__AVX512F__)
  if (current_isa() >= Isa::avx512_bf16) {
    constexpr int P = kParts<X>;
    if (w.format == WeightFormat::sparse24 && m <= PickInt8<P>::kMost)
      return few_rows<PickInt8<P>, X>(a, w, m, broken);
    // With fp32 x, spreading to floats takes 17 cycles for 64 columns and two rows, in parts 23.
    if constexpr (P == 1) return few_rows<SpreadInt8, X>(a, w, m, broken);
  }
#endif
  few_rows<Spread, X>(a, w, m, broken);
}

template <class X>
void run_int8(const SparseInt8Args& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int64_t m = a.linear.x.shape[0];
  [[maybe_unused]] SparseLinearArgs scaled = a.linear;
  scaled.scales = a.scales.ptr<const float>();
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<X, bf16>)
    if (current_isa() >= Isa::avx512_bf16 &&
        !(current_isa() >= Isa::avx512_amx && m > kInt8FewRows)) {
      if (w.format == WeightFormat::sparse24) {
        if (m > kGatherPairRows) return run_table<Source24<int8_t>, X>(scaled, w);
        if (m > 1) return run_gather<GatherInt8, X>(scaled, w);
      }
      if (w.format == WeightFormat::bitmap && tables_pay(w, m))
        return run_table<BitmapSource<int8_t>, X>(scaled, w, broken);
    }
#elif defined(__AVX2__)
  if (w.format == WeightFormat::sparse24 && m <= kMostGatherRows<int8_t>)
    return run_gather_avx2<int8_t, X>(scaled, w);
  if (lists_pay(w, m)) return run_panels<int8_t, X>(scaled, w, broken);
#elif defined(PYPRUNE_NEON)
  if constexpr (std::is_same_v<X, bf16>)
    if (current_isa() == Isa::neon_bf16) return run_blocks<int8_t>(scaled, w, broken);
#endif
  if (m > kInt8FewRows) return many_rows<X>(a, w, broken);
  const Chunks chunks(m, kInt8ChunkRows);
  for (int64_t c = 0; c < chunks.count; ++c) {
    const int64_t m0 = chunks.begin(c);
    SparseInt8Args part = a;
    part.linear.x.data = a.linear.x.ptr<X>() + m0 * a.linear.x.stride[0];
    part.linear.x.shape[0] = chunks.rows(c);
    part.linear.y.data = a.linear.y.ptr<X>() + m0 * w.rows;
    run_chunk<X>(part, w, broken);
  }
}

}  // namespace

void sparse_int8(const SparseInt8Args& args) {
#if defined(__AVX512F__)
  if (!processor().moves_bytes) return avx2::sparse_int8(args);
#endif
  const Weights w(args.linear);
  std::atomic<int64_t> broken{-1};
  if (args.linear.x.dtype == DType::f32)
    run_int8<float>(args, w, &broken);
  else
    run_int8<bf16>(args, w, &broken);
  if (broken.load() >= 0)
    throw std::invalid_argument("bitmap: row " + std::to_string(broken.load()) +
                                " has bits that do not match its row_offsets");
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
