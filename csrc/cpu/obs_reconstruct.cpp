// A row with k kept columns S solves H_SS x_S = (H w)_S by conjugate gradients, preconditioned by
// the inverse of D_S + A_S A_S^T: the diagonal plus low rank that H is about. H_SS is gathered
// once, as a packed lower triangle, and read once an iteration: k^2 multiply-adds from k^2 / 2
// loads. At 50 % kept that is a quarter of the arithmetic of a dense product that all rows would
// share, and the triangle stays in a second-level cache of 1 MiB up to some 700 kept columns.
// Applying the inverse (Woodbury) takes 2 k multiply-adds a rank.
//
// Rows share nothing, so the result depends on neither the thread count nor the other rows.
#include "cpu/obs_reconstruct.h"

#include <omp.h>

#include <cmath>
#include <memory>
#include <vector>

#include "cpu/obs_tile.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

constexpr int L = Vec::kLanes;

// Rows of a triangle that are multiplied together: each load and store of y serves this many.
#if defined(__AVX512F__)
constexpr int kGroup = 8;
#else
constexpr int kGroup = 4;
#endif
static_assert(L % kGroup == 0, "groups end inside a vector's padding");

inline int64_t padded(int64_t n) { return (n + L - 1) / L * L; }

// The kept columns of a row, and how to cut other rows to them.
//
// A vector of kept entries comes from 2 L consecutive columns by one permutation, or, where it
// spans more of them, from several such pieces. That is laid out once and serves every row of H:
// half the time of compressing each, whose results begin anywhere in a cache line.
class Kept {
 public:
  explicit Kept(int64_t columns)
      : index(padded(columns) + L),
        columns_(columns),
        first_(columns / L + 2),
        pieces_(columns + columns / L + 2) {}

  Buffer<int32_t> index;  // ascending
  int64_t count = 0;

  void read(const uint8_t* mask) {
    count = 0;
    for (int64_t c = 0; c < columns_; ++c)
      if (mask[c]) index[count++] = static_cast<int32_t>(c);
    if (permutes()) lay_out();
  }

  // Entries [L * block, L * block + L) of a row cut to the kept columns, of which the first `limit`
  // are wanted. The others, and lanes past the last kept column, are zero.
  Vec take(const float* row, int64_t block, int64_t limit = L) const {
#if defined(__AVX512F__)
    if (permutes()) {
      const auto wanted = static_cast<__mmask16>(limit >= L ? 0xffff : (1 << limit) - 1);
      const auto cut = [&](const Piece& piece) {
        return _mm512_maskz_permutex2var_ps(piece.lanes & wanted, _mm512_loadu_ps(row + piece.base),
                                            _mm512_load_si512(piece.source),
                                            _mm512_loadu_ps(row + piece.base + L));
      };
      // Two always (the second may be empty): at 50 % kept either number is as likely.
      const Piece* piece = pieces_ + first_[block];
      __m512 out = _mm512_or_ps(cut(piece[0]), cut(piece[1]));
      for (piece += 2; piece < pieces_ + first_[block + 1]; ++piece)
        out = _mm512_or_ps(out, cut(*piece));
      return {out};
    }
#endif
    float out[L] = {};
    const int64_t end = std::min(count - block * L, std::min<int64_t>(limit, L));
    for (int64_t l = 0; l < end; ++l) out[l] = row[index[block * L + l]];
    return Vec::load(out);
  }

  // Asks for the columns of a block of a row that is needed soon.
  void prefetch(const float* row, int64_t block) const {
    const float* p = row + index[block * L];
    __builtin_prefetch(p, 0, 2);
    __builtin_prefetch(p + 16, 0, 2);
  }

 private:
  struct alignas(64) Piece {
    int32_t source[L];  // of each lane among the 2 L columns from `base` on
    int32_t base;
    uint16_t lanes;
  };

  const int64_t columns_;
  Buffer<int32_t> first_;  // piece of each block
  Buffer<Piece> pieces_;

  // Rows shorter than a piece cannot be read two vectors at a time.
  bool permutes() const {
#if defined(__AVX512F__)
    return columns_ >= 2 * L;
#else
    return false;
#endif
  }

  void lay_out() {
    int32_t used = 0;
    for (int64_t i = 0; i < count; i += L) {
      first_[i / L] = used;
      const int64_t end = std::min<int64_t>(count, i + L);
      for (int64_t j = i; j < end;) {
        Piece& piece = pieces_[used++];
        piece = Piece{};
        piece.base = std::min<int32_t>(index[j], static_cast<int32_t>(columns_ - 2 * L));
        for (; j < end && index[j] - piece.base < 2 * L; ++j) {
          piece.source[j - i] = index[j] - piece.base;
          piece.lanes |= static_cast<uint16_t>(1u << (j - i));
        }
      }
      if (used == first_[i / L] + 1) {
        pieces_[used] = Piece{};
        pieces_[used].base = pieces_[used - 1].base;
        ++used;
      }
    }
    first_[(count + L - 1) / L] = used;
  }
};

// A symmetric k x k matrix: its diagonal, and below it groups of rows as
// [padded(last column) / L vectors][kGroup rows][L], zero where there is nothing. The products run
// through that in one stream, the only pattern that short rows leave to the prefetchers.
class Triangle {
 public:
  explicit Triangle(int64_t most) : panel_(panel_floats(most)), diagonal_(padded(most)) {}

  // The kept rows and columns of m.
  void gather(const float* m, int64_t ld, const Kept& kept) {
    const int64_t k = kept.count;
    k_ = k;
    std::fill_n(static_cast<float*>(diagonal_), padded(k), 0.0f);
    float* out = panel_;
    for (int64_t i = 0; i < k; i += kGroup) {
      const float *row[kGroup], *soon[kGroup];
      for (int r = 0; r < kGroup; ++r) {
        row[r] = m + kept.index[std::min(i + r, k - 1)] * ld;
        soon[r] = m + kept.index[std::min(i + kGroup + r, k - 1)] * ld;
        if (i + r < k) diagonal_[i + r] = row[r][kept.index[i + r]];
      }
      const int64_t width = padded(std::min(i + kGroup, k) - 1);
      for (int64_t j = 0; j < width; j += L)
        for (int r = 0; r < kGroup; ++r, out += L) {
          const int64_t limit = i + r < k ? std::max<int64_t>(i + r - j, 0) : 0;
          kept.take(row[r], j / L, limit).store(out);
          kept.prefetch(soon[r], j / L);
        }
    }
  }

  // y = A x; both are padded(k) long and x is zero past k.
  void multiply(const float* x, float* y) const {
    for (int64_t j = 0; j < k_; j += L) (Vec::load(diagonal_ + j) * Vec::load(x + j)).store(y + j);
    const float* a = panel_;
    for (int64_t i = 0; i < k_; i += kGroup) {
      const int64_t width = padded(std::min(i + kGroup, k_) - 1);
      Vec dot[kGroup], factor[kGroup];
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r) dot[r] = Vec::zero(), factor[r] = Vec::set1(x[i + r]);
      for (int64_t j = 0; j < width; j += L, a += kGroup * L) {
        const Vec in = Vec::load(x + j);
        Vec out[2] = {Vec::load(y + j), Vec::zero()};
#pragma GCC unroll 8
        for (int r = 0; r < kGroup; ++r) {
          const Vec v = Vec::load(a + r * L);
          dot[r] = Vec::fma(v, in, dot[r]);
          out[r % 2] = Vec::fma(v, factor[r], out[r % 2]);
        }
        (out[0] + out[1]).store(y + j);
      }
      for (int r = 0; r < kGroup; ++r) y[i + r] += dot[r].sum();
    }
  }

 private:
  static int64_t panel_floats(int64_t k) {
    int64_t total = 0;
    for (int64_t i = 0; i < k; i += kGroup) total += kGroup * padded(i + kGroup);
    return total;
  }

  int64_t k_ = 0;
  Buffer<float> panel_, diagonal_;
};

inline double dot(const float* a, const float* b, int64_t n) {
  Vec sum[2] = {Vec::zero(), Vec::zero()};
  for (int64_t j = 0; j < n; j += L)
    sum[j / L % 2] = Vec::fma(Vec::load(a + j), Vec::load(b + j), sum[j / L % 2]);
  return static_cast<double>((sum[0] + sum[1]).sum());
}

inline void add_multiple(float* y, float factor, const float* x, int64_t n) {
  const Vec f = Vec::set1(factor);
  for (int64_t j = 0; j < n; j += L) Vec::fma(f, Vec::load(x + j), Vec::load(y + j)).store(y + j);
}

// The preconditioner: (D + A A^T)^-1 = D^-1 - F G^-1 F^T for the kept columns, F = D^-1 A and
// G = I + A^T F. A^T and F^T are stored as rows of padded(k). Inverting takes double precision: the
// inverse is later subtracted from numbers nearly as large as it is.
class LowRank {
 public:
  LowRank(int64_t rank, int64_t most)
      : rank_(rank),
        stride_(padded(most) + L),
        a_(rank * stride_),
        f_(rank * stride_),
        inverse_(padded(most)),
        g_(kMost * kMost),
        t_(kMost),
        s_(kMost) {}

  void gather(const float* low, const float* diagonal, int64_t ld, const Kept& kept) {
    const int64_t k = kept.count, n = padded(k);
    n_ = n;
    for (int64_t i = 0; i < k; ++i) inverse_[i] = 1.0f / diagonal[kept.index[i]];
    std::fill(inverse_ + k, inverse_ + n, 0.0f);
    for (int64_t r = 0; r < rank_; ++r) {
      float *a = a_ + r * stride_, *f = f_ + r * stride_;
      for (int64_t j = 0; j < n; j += L) {
        const Vec value = kept.take(low + r * ld, j / L);
        value.store(a + j);
        (value * Vec::load(inverse_ + j)).store(f + j);
      }
    }
    std::fill_n(static_cast<double*>(g_), kMost * kMost, 0.0);
    for (int64_t i = 0; i < rank_; i += kSide)
      for (int64_t j = 0; j <= i; j += kSide) gram_block(i, j);
    invert();
  }

  // z = (D + A A^T)^-1 r; both are padded and r is zero past the kept columns.
  void apply(const float* r, float* z) const {
    for (int64_t i = 0; i < rank_; i += kGroup) {
      Vec dot[kGroup];
#pragma GCC unroll 8
      for (int g = 0; g < kGroup; ++g) dot[g] = Vec::zero();
      const float* f = f_ + i * stride_;
      for (int64_t j = 0; j < n_; j += L) {
        const Vec in = Vec::load(r + j);
#pragma GCC unroll 8
        for (int g = 0; g < kGroup; ++g)
          dot[g] = Vec::fma(Vec::load(f + g * stride_ + j), in, dot[g]);
      }
      for (int g = 0; g < kGroup; ++g) t_[i + g] = dot[g].sum();
    }
    alignas(64) double sum[kMost] = {};
    for (int64_t i = 0; i < rank_; ++i)
      for (int j = 0; j < kMost; ++j) sum[j] += t_[i] * g_[i * kMost + j];
    for (int j = 0; j < kMost; ++j) s_[j] = static_cast<float>(sum[j]);
    int64_t j = 0;
    for (; j + 4 * L <= n_; j += 4 * L) combine<4>(r + j, z + j, j);
    for (; j < n_; j += L) combine<1>(r + j, z + j, j);
  }

 private:
  static constexpr int kSide = 4, kMost = kReconstructRank;

  const int64_t rank_, stride_;
  int64_t n_ = 0;
  Buffer<float> a_, f_, inverse_;
  Buffer<double> g_;     // [kMost][kMost]: G, then its inverse; zero past the rank
  Buffer<float> t_, s_;  // F^T r and G^-1 times it

  // A 4 x 4 block of G and its mirror image.
  void gram_block(int64_t i, int64_t j) {
    Vec sum[kSide][kSide];
#pragma GCC unroll 4
    for (int r = 0; r < kSide; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kSide; ++c) sum[r][c] = Vec::zero();
    const float *a = a_ + i * stride_, *f = f_ + j * stride_;
    for (int64_t v = 0; v < n_; v += L) {
      Vec in[kSide];
#pragma GCC unroll 4
      for (int c = 0; c < kSide; ++c) in[c] = Vec::load(f + c * stride_ + v);
#pragma GCC unroll 4
      for (int r = 0; r < kSide; ++r) {
        const Vec row = Vec::load(a + r * stride_ + v);
#pragma GCC unroll 4
        for (int c = 0; c < kSide; ++c) sum[r][c] = Vec::fma(row, in[c], sum[r][c]);
      }
    }
    for (int r = 0; r < kSide; ++r)
      for (int c = 0; c < kSide; ++c) {
        const double value = sum[r][c].sum() + (i + r == j + c ? 1.0 : 0.0);
        g_[(i + r) * kMost + j + c] = g_[(j + c) * kMost + i + r] = value;
      }
  }

  // G^-1 in place, by Gauss-Jordan steps: G is definite, its eigenvalues one or more.
  void invert() {
    for (int64_t p = 0; p < rank_; ++p) {
      alignas(64) double pivot[kMost];
      const double scale = 1.0 / g_[p * kMost + p];
      for (int j = 0; j < kMost; ++j) pivot[j] = g_[p * kMost + j] * scale;
      // Column p: row[p] = factor becomes -factor * scale without being written by itself.
      pivot[p] = 1.0 + scale;
      for (int64_t i = 0; i < rank_; ++i) {
        double* row = g_ + i * kMost;
        const double factor = row[p];
        for (int j = 0; j < kMost; ++j) row[j] -= factor * pivot[j];
      }
      pivot[p] = scale;
      std::copy_n(pivot, kMost, g_ + p * kMost);
    }
  }

  // z = D^-1 r - F s for N vectors.
  template <int N>
  void combine(const float* r, float* z, int64_t at) const {
    Vec out[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) out[v] = Vec::load(r + v * L) * Vec::load(inverse_ + at + v * L);
    for (int64_t i = 0; i < rank_; ++i) {
      const Vec factor = Vec::set1(s_[i]);
      const float* f = f_ + i * stride_ + at;
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) out[v] = Vec::fnma(factor, Vec::load(f + v * L), out[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) out[v].store(z + v * L);
  }
};

// One thread's row.
class RowSolver {
 public:
  RowSolver(const ObsReconstructArgs& args, int64_t most)
      : a_(args),
        cols_(args.x.shape[1]),
        h_(most),
        near_(args.low.shape[0], most),
        kept_(cols_),
        x_(padded(most)),
        r_(padded(most)),
        z_(padded(most)),
        p_(padded(most)),
        hp_(padded(most)) {}

  void run(int64_t row) {
    const int64_t k = load(row);
    const double scale_noise = a_.noise.ptr<double>()[row];
    double& loss = a_.loss.ptr<double>()[row];
    a_.gap.ptr<double>()[row] = 0.0;
    a_.iterations.ptr<int32_t>()[row] = 0;
    if (dot(r_, r_, padded(k)) == 0.0) return;  // nothing kept, nothing lost, or solved already
    h_.gather(a_.h.ptr<float>(), cols_, kept_);
    near_.gather(a_.low.ptr<float>(), a_.diagonal.ptr<float>(), cols_, kept_);
    const int64_t n = padded(k);
    near_.apply(r_, z_);
    std::copy_n(static_cast<float*>(z_), n, static_cast<float*>(p_));
    // With M the preconditioner no eigenvalue of M H_SS is below `least`, so that radau * r M r
    // bounds the loss still to gain (Meurant & Tichy 2013, Gauss-Radau).
    double rz = dot(r_, z_, n), radau = 1.0 / a_.least;
    int32_t it = 0;
    while (!(radau * rz <= a_.tolerance * (std::max(loss, 0.0) + scale_noise)) &&
           it < a_.max_iterations) {
      h_.multiply(p_, hp_);
      const double curvature = dot(p_, hp_, n);
      if (!(curvature > 0.0)) break;
      const double step = rz / curvature;
      add_multiple(x_, static_cast<float>(step), p_, n);
      add_multiple(r_, static_cast<float>(-step), hp_, n);
      loss -= step * rz;
      near_.apply(r_, z_);
      const double next = dot(r_, z_, n);
      const double left = radau - step;  // rounding can take it below zero; 1 / least holds
      radau = left > 0.0 ? left / (a_.least * left + next / rz) : 1.0 / a_.least;
      const Vec ratio = Vec::set1(static_cast<float>(next / rz));
      for (int64_t j = 0; j < n; j += L)
        Vec::fma(ratio, Vec::load(p_ + j), Vec::load(z_ + j)).store(p_ + j);
      rz = next;
      ++it;
    }
    float* out = a_.x.ptr<float>() + row * cols_;
    for (int64_t i = 0; i < k; ++i) out[kept_.index[i]] = x_[i];
    loss = std::max(loss, 0.0);
    a_.gap.ptr<double>()[row] = radau * rz;
    a_.iterations.ptr<int32_t>()[row] = it;
  }

 private:
  const ObsReconstructArgs& a_;
  const int64_t cols_;
  Triangle h_;
  LowRank near_;
  Kept kept_;
  Buffer<float> x_, r_, z_, p_, hp_;

  // The kept columns of a row, their number returned.
  int64_t load(int64_t row) {
    kept_.read(a_.mask.ptr<uint8_t>() + row * cols_);
    const int64_t k = kept_.count;
    const float* x = a_.x.ptr<float>() + row * cols_;
    const float* r = a_.residual.ptr<float>() + row * cols_;
    for (int64_t i = 0; i < k; ++i) x_[i] = x[kept_.index[i]], r_[i] = r[kept_.index[i]];
    for (int64_t i = k; i < padded(k); ++i) x_[i] = r_[i] = 0.0f;
    return k;
  }
};

int64_t most_kept(const TensorView& mask) {
  int64_t most = 0;
  for (int64_t r = 0; r < mask.shape[0]; ++r) {
    const uint8_t* row = mask.ptr<uint8_t>() + r * mask.shape[1];
    int64_t kept = 0;
    for (int64_t c = 0; c < mask.shape[1]; ++c) kept += row[c] != 0;
    most = std::max(most, kept);
  }
  return most;
}

}  // namespace

void obs_reconstruct(const ObsReconstructArgs& args) {
  const int64_t rows = args.x.shape[0], most = most_kept(args.mask);
  // Allocated here: an exception must not leave the parallel region.
  std::vector<std::unique_ptr<RowSolver>> solvers;
  for (int t = 0; t < args.threads; ++t) solvers.push_back(std::make_unique<RowSolver>(args, most));
#pragma omp parallel for schedule(dynamic, 4) num_threads(args.threads)
  for (int64_t row = 0; row < rows; ++row) solvers[omp_get_thread_num()]->run(row);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
