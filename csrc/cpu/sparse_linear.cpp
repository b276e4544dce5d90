#include "cpu/sparse_linear.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu/sparse_bf16.h"
#include "cpu/sparse_decode.h"
#include "cpu/sparse_gemm.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// One cache-line aligned allocation a call, shared out by the caller.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class U>
  U* as() const {
    return static_cast<U*>(data_);
  }

 private:
  void* data_;
};

inline void store(float* y, float value) { *y = value; }
inline void store(bf16* y, float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  // Round to nearest even; a NaN stays one (its low bits could otherwise carry into infinity).
  u = value != value ? (u | 0x400000u) : u + 0x7fffu + ((u >> 16) & 1);
  y->bits = static_cast<uint16_t>(u >> 16);
}

// Rows of W that one turn of the kernel decodes side by side: as many as their M sums each leave
// registers for.
constexpr int side_by_side(int m) { return m <= 4 ? 4 : 2; }

// Rows of W that share a piece of x small enough for the first-level cache. For one or two rows of
// x all of it is.
constexpr int block_rows(int m) { return m <= 2 ? side_by_side(m) : 16; }
constexpr int kMaxBlockRows = 16;
constexpr int64_t kPieceBytes = 24 * 1024;

struct DecodeScratch {
  const float* x;
  uint64_t* words;  // [threads][kMaxBlockRows][mask_words]
  float* sums;      // [threads][kMaxBlockRows][kMaxDecodeRows][Vec::kLanes]
  std::atomic<int64_t>* broken;
};

// The masks of rows [r0, r0 + count); false, and the row noted, when one is inconsistent.
bool block_masks(const Weights& w, int64_t r0, int64_t count, uint64_t* words,
                 std::atomic<int64_t>* broken) {
  bool sound = true;
  for (int64_t r = 0; r < count; ++r)
    if (!row_mask(w, r0 + r, words + r * mask_words(w.cols))) {
      broken->store(r0 + r, std::memory_order_relaxed);
      sound = false;
    }
  return sound;
}

// Rows [r0, r0 + count) times all M rows of x; the sums are left as vectors.
template <class T, bool kDense, int M>
void decode_block(const Weights& w, int64_t r0, int64_t count, const float* x, uint64_t* words,
                  float* sums) {
  constexpr int kSide = side_by_side(M), kBlock = block_rows(M);
  const int64_t n = mask_words(w.cols);
  Cursor<T> cursors[kBlock];
  for (int64_t r = 0; r < count; ++r)
    cursors[r] = {static_cast<const T*>(w.values) + w.begin(r0 + r), words + r * n};
  std::fill(sums, sums + count * M * Vec::kLanes, 0.0f);
  const int64_t ahead =
      (w.begin(std::min(r0 + kBlock, w.rows - 1)) - w.begin(r0)) * static_cast<int64_t>(sizeof(T));
  const int64_t piece = M <= 2 ? n : std::max<int64_t>(1, kPieceBytes / (kMaskColumns * 4 * M));
  for (int64_t i0 = 0; i0 < n; i0 += piece) {
    const int64_t i1 = std::min(n, i0 + piece);
    int64_t r = 0;
    for (; r + kSide <= count; r += kSide)
      decode_rows<T, kDense, M, kSide>(w, cursors + r, i0, i1, x, ahead,
                                       sums + r * M * Vec::kLanes);
    for (; r < count; ++r)
      decode_rows<T, kDense, M, 1>(w, cursors + r, i0, i1, x, ahead, sums + r * M * Vec::kLanes);
  }
}

template <class T, bool kDense, int M, class X>
void decode(const SparseLinearArgs& a, const Weights& w, const DecodeScratch& scratch) {
  constexpr int kBlock = block_rows(M);
  const int64_t n = mask_words(w.cols), blocks = (w.rows + kBlock - 1) / kBlock;
  const float* bias = a.bias ? a.bias->ptr<const float>() : nullptr;
  X* y = a.y.ptr<X>();
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t g = 0; g < blocks; ++g) {
    const int64_t r0 = g * kBlock, count = std::min<int64_t>(kBlock, w.rows - r0);
    const int thread = omp_get_thread_num();
    uint64_t* words = scratch.words + thread * kMaxBlockRows * n;
    float* sums = scratch.sums + thread * kMaxBlockRows * kMaxDecodeRows * Vec::kLanes;
    if (!kDense) {
      prefetch_meta(w, r0 + kBlock, kBlock);
      if (!block_masks(w, r0, count, words, scratch.broken)) continue;
    }
    decode_block<T, kDense, M>(w, r0, count, scratch.x, words, sums);
    for (int64_t r = 0; r < count; ++r)
      for (int m = 0; m < M; ++m)
        store(y + m * w.rows + r0 + r,
              Vec::load(sums + (r * M + m) * Vec::kLanes).sum() + (bias ? bias[r0 + r] : 0.0f));
  }
}

// Calls f with m (1 .. kMaxDecodeRows) as a constant.
template <class F, int M = kMaxDecodeRows>
void with_rows(int64_t m, F&& f) {
  if (m == M) {
    f(std::integral_constant<int, M>());
  } else if constexpr (M > 1) {
    with_rows<F, M - 1>(m, static_cast<F&&>(f));
  }
}

template <class T, class X>
void run_decode(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int64_t m = a.x.shape[0], n = mask_words(w.cols);
  const int64_t x_floats = m * n * kMaskColumns;
  const int64_t sum_floats = a.threads * kMaxBlockRows * kMaxDecodeRows * Vec::kLanes;
  Scratch scratch((x_floats + sum_floats) * 4 + a.threads * kMaxBlockRows * n * 8);
  float* x = scratch.as<float>();
  const DecodeScratch s{x, reinterpret_cast<uint64_t*>(x + x_floats + sum_floats), x + x_floats,
                        broken};
  pack_decode<T>(a.x.ptr<const X>(), a.x.stride[0], m, w.cols, x);
  with_rows(m, [&](auto rows) {
    constexpr int M = decltype(rows)::value;
    if (w.format == WeightFormat::dense)
      decode<T, true, M, X>(a, w, s);
    else
      decode<T, false, M, X>(a, w, s);
  });
}

struct TileScratch {
  float* tile;      // [kTileRows][kTileStride]
  float* sums;      // [kTileRows][tokens, rounded up to panels]
  uint64_t* words;  // [kTileRows][mask_words]
};

// Rows [r0, r0 + count) of W times all tokens of the packed x; false when a row is inconsistent.
template <class T, bool kDense>
bool multiply_rows(const Weights& w, int64_t r0, int64_t count, const float* packed, int64_t tokens,
                   const TileScratch& s, std::atomic<int64_t>* broken) {
  const int64_t n = mask_words(w.cols), stride = panels_of(tokens) * kPanelTokens;
  if (!kDense && !block_masks(w, r0, count, s.words, broken)) return false;
  Cursor<T> cursors[kTileRows];
  for (int64_t r = 0; r < count; ++r)
    cursors[r] = {static_cast<const T*>(w.values) + w.begin(r0 + r), s.words + r * n};
  const int64_t ahead = (w.begin(std::min(r0 + kTileRows, w.rows - 1)) - w.begin(r0)) *
                        static_cast<int64_t>(sizeof(T));
  std::fill(s.sums, s.sums + kTileRows * stride, 0.0f);
  for (int64_t d = 0; d < depths_of(w.cols); ++d) {
    const int64_t i0 = d * kDepthWords, i1 = std::min(n, i0 + kDepthWords);
    decode_tile<T, kDense>(w, cursors, count, i0, i1, ahead, s.tile);
    multiply_tile(s.tile, packed + d * kDepth * stride, tokens, s.sums);
  }
  return true;
}

// Rows [r0, r0 + count) of the output from a tile's sums, which have the tokens side by side.
template <class X>
void store_rows(const SparseLinearArgs& a, int64_t r0, int64_t count, int64_t tokens,
                const float* sums, X* y) {
  const int64_t stride = panels_of(tokens) * kPanelTokens;
  const float* bias = a.bias ? a.bias->ptr<const float>() + r0 : nullptr;
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < count; ++r)
      store(y + t * a.rows + r0 + r, sums[r * stride + t] + (bias ? bias[r] : 0.0f));
}

template <class T, bool kDense, class X>
void multiply(const SparseLinearArgs& a, const Weights& w, int64_t t0, int64_t tokens,
              float* packed, float* scratch, std::atomic<int64_t>* broken) {
  const int64_t panels = panels_of(tokens), depths = depths_of(w.cols), n = mask_words(w.cols);
  const int64_t tile_floats = kTileRows * kTileStride;
  const int64_t sum_floats = kTileRows * panels * kPanelTokens;
  const int64_t floats = tile_floats + sum_floats + kTileRows * n * 2;
  const int64_t tiles = (w.rows + kTileRows - 1) / kTileRows;
  const X* x = a.x.ptr<const X>() + t0 * a.x.stride[0];
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < depths * panels; ++i)
      pack_tokens<T>(x, a.x.stride[0], tokens, w.cols, i / panels * kDepth, i % panels,
                     packed + i * kDepth * kPanelTokens);
    float* mine = scratch + omp_get_thread_num() * floats;
    const TileScratch s{mine, mine + tile_floats,
                        reinterpret_cast<uint64_t*>(mine + tile_floats + sum_floats)};
#pragma omp for schedule(static)
    for (int64_t g = 0; g < tiles; ++g) {
      const int64_t r0 = g * kTileRows, count = std::min(kTileRows, w.rows - r0);
      if (multiply_rows<T, kDense>(w, r0, count, packed, tokens, s, broken))
        store_rows(a, r0, count, tokens, s.sums, a.y.ptr<X>() + t0 * w.rows);
    }
  }
}

template <class T, class X>
void run_multiply(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int64_t m = a.x.shape[0], most = std::min(m, kMaxTokens);
  const int64_t wide = panels_of(most) * kPanelTokens;
  const int64_t packed_floats = depths_of(w.cols) * kDepth * wide;
  const int64_t thread_floats = kTileRows * (kTileStride + wide + 2 * mask_words(w.cols));
  Scratch scratch((packed_floats + a.threads * thread_floats) * 4);
  float* packed = scratch.as<float>();
  for (int64_t t0 = 0; t0 < m; t0 += kMaxTokens) {
    const int64_t tokens = std::min(kMaxTokens, m - t0);
    if (w.format == WeightFormat::dense)
      multiply<T, true, X>(a, w, t0, tokens, packed, packed + packed_floats, broken);
    else
      multiply<T, false, X>(a, w, t0, tokens, packed, packed + packed_floats, broken);
  }
}

#if defined(__AVX512F__)

// Cursors at rows [r0, r0 + count) of W; false, and the row noted, when one is inconsistent.
template <WeightFormat kFormat>
bool dot_cursors(const Weights& w, int64_t r0, int64_t count, uint64_t* words, DotCursor* cursors,
                 std::atomic<int64_t>* broken) {
  const int64_t n = mask_words(w.cols);
  for (int64_t r = 0; r < count; ++r) {
    const bf16* v = static_cast<const bf16*>(w.values) + w.begin(r0 + r);
    if (kFormat != WeightFormat::bitmap) {
      cursors[r] = {v, w.meta + (r0 + r) * w.meta_stride};
    } else if (bitmap_row(w, r0 + r, words + r * n)) {
      cursors[r] = {v, reinterpret_cast<const uint8_t*>(words + r * n)};
    } else {
      broken->store(r0 + r, std::memory_order_relaxed);
      return false;
    }
  }
  return true;
}

// Rows [r0, r0 + count) of the output.
template <WeightFormat kFormat, class X>
void dot_outputs(const SparseLinearArgs& a, const Weights& w, int64_t r0, int64_t count,
                 const DotCursor* cursors, const bf16* packed, float* sums) {
  const int64_t total = a.x.shape[0], width = mask_words(w.cols) * kMaskColumns * kParts<X>;
  const int64_t ahead = (w.begin(std::min(r0 + count, w.rows - 1)) - w.begin(r0)) * 2;
  const float* bias = a.bias ? a.bias->ptr<const float>() : nullptr;
  for (int64_t m0 = 0; m0 < total; m0 += kChunkRows) {
    const int64_t chunk = std::min<int64_t>(kChunkRows, total - m0);
    with_rows(chunk, [&](auto rows) {
      constexpr int M = decltype(rows)::value;
      dot_block<kFormat, kParts<X>, M>(w, cursors, count, packed + m0 * width, ahead, sums);
    });
    X* y = a.y.ptr<X>() + m0 * w.rows + r0;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t m = 0; m < chunk; ++m)
        store(y + m * w.rows + r,
              Vec::load(sums + (r * chunk + m) * Vec::kLanes).sum() + (bias ? bias[r0 + r] : 0.0f));
  }
}

template <WeightFormat kFormat, class X>
void run_dot(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  const int64_t m = a.x.shape[0], n = mask_words(w.cols),
                chunks = (m + kChunkRows - 1) / kChunkRows;
  const int64_t block = m <= 2    ? 4
                        : m <= 16 ? 16
                                  : kDotBlockRows,
                width = n * kMaskColumns * kParts<X>;
  const int64_t blocks = (w.rows + block - 1) / block;
  const int64_t sum_floats = kDotBlockRows * kChunkRows * Vec::kLanes;
  Scratch scratch(a.threads * (sum_floats * 4 + kDotBlockRows * n * 8) + m * width * 2);
  float* sums = scratch.as<float>();
  bf16* packed = reinterpret_cast<bf16*>(sums + a.threads * sum_floats);
  uint64_t* words = reinterpret_cast<uint64_t*>(packed + m * width);
  const X* x = a.x.ptr<const X>();
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(static)
    for (int64_t c = 0; c < chunks; ++c)
      pack_dot(x + c * kChunkRows * a.x.stride[0], a.x.stride[0],
               std::min<int64_t>(kChunkRows, m - c * kChunkRows), w.cols,
               packed + c * kChunkRows * width);
    float* mine = sums + omp_get_thread_num() * sum_floats;
    uint64_t* masks = words + omp_get_thread_num() * kDotBlockRows * n;
#pragma omp for schedule(static)
    for (int64_t g = 0; g < blocks; ++g) {
      const int64_t r0 = g * block, count = std::min(block, w.rows - r0);
      DotCursor cursors[kDotBlockRows];
      if (kFormat != WeightFormat::dense) prefetch_meta(w, r0 + block, block);
      if (dot_cursors<kFormat>(w, r0, count, masks, cursors, broken))
        dot_outputs<kFormat, X>(a, w, r0, count, cursors, packed, mine);
    }
  }
}

template <class X>
void run_dot(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  switch (a.format) {
    case WeightFormat::dense:
      return run_dot<WeightFormat::dense, X>(a, w, broken);
    case WeightFormat::sparse24:
      return run_dot<WeightFormat::sparse24, X>(a, w, broken);
    case WeightFormat::bitmap:
      return run_dot<WeightFormat::bitmap, X>(a, w, broken);
  }
}

#endif

// Whether the products of bf16 pairs serve best. fp32 activations take three of them each.
template <class T, class X>
bool takes_dot(const SparseLinearArgs& a) {
  if (!std::is_same_v<T, bf16> || current_isa() < Isa::avx512_bf16) return false;
  return std::is_same_v<X, bf16> || a.x.shape[0] <= kSplitRows;
}

template <class T, class X>
void run(const SparseLinearArgs& a) {
  const Weights w(a);
  std::atomic<int64_t> broken{-1};
#if defined(__AVX512F__)
  if (takes_dot<T, X>(a))
    run_dot<X>(a, w, &broken);
  else
#endif
      if (a.x.shape[0] <= kMaxDecodeRows)
    run_decode<T, X>(a, w, &broken);
  else
    run_multiply<T, X>(a, w, &broken);
  if (broken.load() >= 0)
    throw std::invalid_argument("bitmap: row " + std::to_string(broken.load()) +
                                " has bits that do not match its row_offsets");
}

}  // namespace

void sparse_linear(const SparseLinearArgs& args) {
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512vbmi2")) return avx2::sparse_linear(args);
#endif
  with_float_type(args.values.dtype, [&](auto* tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
    if (args.x.dtype == DType::f32)
      run<T, float>(args);
    else
      run<T, bf16>(args);
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
