// The micro-kernels of the OBS sweep and factorisation, on tiles of a strip (see strip.h): products
// and triangular solves with the upper triangular matrix of a panel.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <new>
#include <type_traits>
#include <vector>

#include "cpu/strip.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// Register block of kMaxVecs x kCols accumulators: 24 of 32 registers with AVX-512 and with NEON,
// 12 of 16 with AVX2; one vector of rows where Vec is emulated.
#if defined(__AVX512F__)
constexpr int kCols = 8, kMaxVecs = 3;
#elif defined(__AVX2__) || defined(PYPRUNE_NEON)
constexpr int kCols = 4, kMaxVecs = 3;
#else
constexpr int kCols = 4, kMaxVecs = 1;
#endif

// acc = tile - e[k] u[k] over k < depth; tile is [W][V vectors], e is [depth][V vectors], u is
// [depth][S], W of each S are used.
template <int V, int W, int S>
inline void subtract(Vec (&acc)[W][V], const float* tile, const float* e, const float* u,
                     int64_t depth) {
  constexpr int L = Vec::kLanes;
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[w][v] = Vec::load(tile + (w * V + v) * L);
  for (int64_t k = 0; k < depth; ++k) {
    Vec err[V];
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) err[v] = Vec::load(e + k * V * L + v * L);
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      const Vec b = Vec::set1(u[k * S + w]);
#pragma GCC unroll 3
      for (int v = 0; v < V; ++v) acc[w][v] = Vec::fnma(err[v], b, acc[w][v]);
    }
  }
}

// W columns of a strip, all tiles of one panel column: tile -= e u.
template <int V, int W, int S>
void update_tile(float* tile, const float* e, const float* u, int64_t depth) {
  constexpr int L = Vec::kLanes;
  Vec acc[W][V];
  subtract<V, W, S>(acc, tile, e, u, depth);
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w)
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) acc[w][v].store(tile + (w * V + v) * L);
}

// A strip's quantisation grids as [step, low, high][lanes]: the values step * k, low <= k <= high.
// Rounds lane by lane to the nearest of them; zeros are positive.
template <int V>
inline Vec round_to_grid(Vec x, const float* grid, int v) {
  constexpr int L = Vec::kLanes;
  const Vec step = Vec::load(grid + v * L);
  const Vec low = Vec::load(grid + (V + v) * L), high = Vec::load(grid + (2 * V + v) * L);
  return step * (Vec::round(Vec::clamp(x / step, low, high)) + Vec::zero());
}

// Brings the tile up to date like update_tile, then visits its columns: `kept` gets the new
// weights, `tile` the errors, `loss` their halved squares. `diag` is the panel at the tile's rows.
// kQuantise: what is kept is rounded to the strip's `grid`, and its error is passed on as well.
template <int V, int W, int S, bool kQuantise>
void solve_tile(float* tile, const float* e, const float* u, int64_t depth, const float* inv_diag,
                const int32_t* pruned, float* kept, double* loss, const float* grid = nullptr) {
  constexpr int L = Vec::kLanes;
  Vec acc[W][V], squares[V];
  subtract<V, W, S>(acc, tile, e, u, depth);
  const float* diag = u + depth * S;
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) squares[v] = Vec::zero();
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w) {
    const Vec inv = Vec::set1(inv_diag[w]);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const int32_t* mask = pruned + (w * V + v) * L;
      Vec value = where_not(mask, acc[w][v]), err;
      if constexpr (kQuantise) {
        value = round_to_grid<V>(value, grid, v);
        err = (acc[w][v] - value) * inv;
      } else {
        err = where(mask, acc[w][v] * inv);
      }
      value.store(kept + (w * V + v) * L);
      err.store(tile + (w * V + v) * L);
      squares[v] = Vec::fma(err, err, squares[v]);
#pragma GCC unroll 8
      for (int x = w + 1; x < W; ++x)
        acc[x][v] = Vec::fnma(err, Vec::set1(diag[w * S + x]), acc[x][v]);
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < V; ++v) {
    float sum[L];
    squares[v].store(sum);
    for (int i = 0; i < L; ++i) loss[v * L + i] += 0.5 * sum[i];
  }
}

// The same with all pruned, for the errors alone: a triangular solve, tile = (tile - e u) / diag.
template <int V, int W, int S>
void divide_tile(float* tile, const float* e, const float* u, int64_t depth,
                 const float* inv_diag) {
  constexpr int L = Vec::kLanes;
  Vec acc[W][V];
  subtract<V, W, S>(acc, tile, e, u, depth);
  const float* diag = u + depth * S;
#pragma GCC unroll 8
  for (int w = 0; w < W; ++w) {
    const Vec inv = Vec::set1(inv_diag[w]);
#pragma GCC unroll 3
    for (int v = 0; v < V; ++v) {
      const Vec err = acc[w][v] * inv;
      err.store(tile + (w * V + v) * L);
#pragma GCC unroll 8
      for (int x = w + 1; x < W; ++x)
        acc[x][v] = Vec::fnma(err, Vec::set1(diag[w * S + x]), acc[x][v]);
    }
  }
}

// Calls f with the tile width 1 <= w <= kCols as a compile-time constant.
template <int W = kCols, class F>
inline void with_width(int64_t w, F&& f) {
  if constexpr (W >= 1) {
    if (w == W) return f(std::integral_constant<int, W>());
    with_width<W - 1>(w, f);
  }
}

// Columns first <= c < `rows` of an upper triangular matrix, its rows 0 <= k < `rows`, as
// [tiles of kCols columns][rows][kCols].
struct Panel {
  static constexpr int kStride = kCols;
  // Strip columns per pass over the panel: 128 x 48 floats are 24 KiB, three quarters of a
  // first-level cache.
  static constexpr int64_t kDepth = 128;
  const float* data;
  int64_t first, rows;

  const float* at(int64_t k, int64_t c) const {
    const int64_t column = c - first, in_tile = column % kCols;
    return data + (column - in_tile) * rows + k * kCols + in_tile;
  }
};

// Calls f(first column, width) for the columns [a, b) cut at the borders of a panel's tiles.
template <class P, class F>
inline void for_tiles(const P& panel, int64_t a, int64_t b, F&& f) {
  for (int64_t c = a; c < b;) {
    const int64_t width = std::min(b - c, kCols - (c - panel.first) % kCols);
    with_width(width, [&](auto w) { f(c, w); });
    c += width;
  }
}

// strip[:, a:b] -= strip[:, k0:k1] U[k0:k1, a:b], u a panel: u.at(k, c) is where U[k, c] lies and
// the columns to its right in the tile, P::kStride from row to row.
// P::kDepth columns of the strip at a time, which does not change the result.
template <int V, class P>
inline void update(float* strip, const P& u, int64_t a, int64_t b, int64_t k0, int64_t k1) {
  constexpr int L = V * Vec::kLanes;
  for (int64_t k = k0; k < k1; k += P::kDepth)
    for_tiles(u, a, b, [&](int64_t c, auto width) {
      update_tile<V, width, P::kStride>(strip + c * L, strip + k * L, u.at(k, c),
                                        std::min(P::kDepth, k1 - k));
    });
}

// Memory that one call gave back, for the next one: fresh pages fault when they are first touched,
// which took as long as the rest of a 576 x 576 sweep's bookkeeping. At most kMost bytes a thread.
//
// A block goes to the same member of a team again, `owner`: lines that another core has written
// come from its cache one by one. With strips that changed hands two threads took some 6 %
// longer for a solve of 576 columns. 0 is the calling thread, and whoever shares its memory.
class Spare {
 public:
  struct Block {
    void* data;
    size_t bytes;
    int owner;
  };

  Spare() { blocks_.reserve(kBlocks); }
  ~Spare() {
    for (const Block& block : blocks_) std::free(block.data);
  }

  Block take(size_t bytes, int owner) {
    for (Block& block : blocks_)
      if (block.owner == owner && block.bytes >= bytes && block.bytes / 2 <= bytes) {
        const Block found = block;
        block = blocks_.back();
        blocks_.pop_back();
        held_ -= found.bytes;
        return found;
      }
    return {std::aligned_alloc(64, bytes), bytes, owner};
  }

  void give(Block block) {
    if (blocks_.size() == kBlocks || held_ + block.bytes > kMost) return std::free(block.data);
    held_ += block.bytes;
    blocks_.push_back(block);
  }

  static Spare& of_this_thread() {
    thread_local Spare spare;
    return spare;
  }

 private:
  static constexpr size_t kBlocks = 256, kMost = size_t{32} << 20;
  std::vector<Block> blocks_;
  size_t held_ = 0;
};

// Uninitialised memory at a cache line, for the length of a kernel. Given back by the thread that
// took it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count, int owner = 0)
      : block_(Spare::of_this_thread().take((count * sizeof(T) + 64) / 64 * 64, owner)) {
    if (!block_.data) throw std::bad_alloc();
  }
  ~Buffer() { Spare::of_this_thread().give(block_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() const { return static_cast<T*>(block_.data); }

 private:
  Spare::Block block_;
};

// A buffer of `count` elements for each thread of a team.
template <class T>
class PerThread {
 public:
  PerThread(int threads, int64_t count) {
    for (int t = 0; t < threads; ++t) buffers_.emplace_back(count, t);
  }
  T* operator[](int64_t thread) const { return buffers_[thread]; }
  T* mine() const { return buffers_[omp_get_thread_num()]; }

 private:
  std::deque<Buffer<T>> buffers_;  // which need not be movable
};

// Strips dealt out to threads. A strip stays with one thread, and so in its cache. Where later ones
// have less to do, it matters that every other round goes backwards.
struct Deal {
  int64_t strips;
  int threads;

  int64_t owner(int64_t s) const {
    const int64_t turn = s % (2 * threads);
    return turn < threads ? turn : 2 * threads - 1 - turn;
  }
  // A team may turn out smaller than asked for.
  bool is_mine(int64_t s) const { return owner(s) % omp_get_num_threads() == omp_get_thread_num(); }
  // The thread's own strip after s, or one past the last.
  int64_t next_of_mine(int64_t s) const {
    do ++s;
    while (s < strips && !is_mine(s));
    return s;
  }
  // Calls f(s) for the thread's own strips in [s0, s1).
  template <class F>
  void for_mine(int64_t s0, int64_t s1, F&& f) const {
    for (int64_t s = s0; s < s1; ++s)
      if (is_mine(s)) f(s);
  }
};

// `count` elements for each strip, in its thread's memory.
template <class T>
class PerStrip {
 public:
  PerStrip(const Deal& deal, int64_t count)
      : deal_(deal),
        count_(count),
        memory_(deal.threads, (deal.strips + deal.threads - 1) / deal.threads * count) {}
  T* operator[](int64_t s) const { return memory_[deal_.owner(s)] + s / deal_.threads * count_; }

 private:
  Deal deal_;
  int64_t count_;
  PerThread<T> memory_;
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
