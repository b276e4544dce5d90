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

// The kept columns of a row.
struct Kept {
  explicit Kept(int64_t columns) : index(columns), bits(columns / L + 1), offset(columns / L + 2) {}

  Buffer<int32_t> index;   // ascending
  Buffer<uint16_t> bits;   // of each vector of columns, the kept ones
  Buffer<int32_t> offset;  // how many are kept before it
  int64_t count = 0;

  void read(const uint8_t* mask, int64_t columns) {
    count = 0;
    int64_t v = 0;
    for (int64_t c = 0; c < columns; ++v) {
      offset[v] = static_cast<int32_t>(count);
      uint16_t set = 0;
      for (int l = 0; l < L && c < columns; ++l, ++c)
        if (mask[c]) set |= uint16_t(1u << l), index[count++] = static_cast<int32_t>(c);
      bits[v] = set;
    }
    offset[v] = static_cast<int32_t>(count);
  }
};

// The first n kept entries of a row; up to L floats after them are overwritten. `next` is the row
// that follows: rows lie too far apart for the prefetchers.
inline void compress(const float* row, const float* next, const Kept& kept, int64_t n, float* out) {
#if defined(__AVX512F__)
  for (int64_t v = 0; kept.offset[v] < n; ++v) {
    __builtin_prefetch(next + v * L);
    const __m512 x = _mm512_maskz_loadu_ps(kept.bits[v], row + v * L);
    _mm512_storeu_ps(out + kept.offset[v], _mm512_maskz_compress_ps(kept.bits[v], x));
  }
#else
  for (int64_t j = 0; j < n; ++j) {
    __builtin_prefetch(next + kept.index[j]);
    out[j] = row[kept.index[j]];
  }
#endif
}

// A symmetric k x k matrix: its diagonal, and below it groups of rows as
// [padded(last column) / L vectors][kGroup rows][L], zero where there is nothing. The products run
// through that in one stream, the only pattern that short rows leave to the prefetchers.
class Triangle {
 public:
  explicit Triangle(int64_t most)
      : panel_(panel_floats(most)), diagonal_(padded(most)), rows_(kGroup * padded(most) + L) {}

  // The kept rows and columns of m.
  void gather(const float* m, int64_t ld, const Kept& kept) {
    const int64_t k = kept.count;
    k_ = k;
    std::fill_n(static_cast<float*>(diagonal_), padded(k), 0.0f);
    float* out = panel_;
    for (int64_t i = 0; i < k; i += kGroup) {
      const int64_t width = padded(std::min(i + kGroup, k) - 1);
      for (int r = 0; r < kGroup; ++r) {
        float* row = rows_ + r * width;
        const int64_t filled = i + r < k ? i + r : 0;
        if (i + r < k) {
          const float* source = m + kept.index[i + r] * ld;
          diagonal_[i + r] = source[kept.index[i + r]];
          compress(source, m + kept.index[std::min(i + r + 1, k - 1)] * ld, kept, filled, row);
        }
        std::fill(row + filled, row + width, 0.0f);
      }
      for (int64_t j = 0; j < width; j += L)
        for (int r = 0; r < kGroup; ++r, out += L) Vec::load(rows_ + r * width + j).store(out);
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
  Buffer<float> panel_, diagonal_, rows_;
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
// G = I + A^T F. A^T and F^T are stored as rows of padded(k).
class LowRank {
 public:
  LowRank(int64_t rank, int64_t most)
      : rank_(rank),
        stride_(padded(most) + L),
        a_(rank * stride_),
        f_(rank * stride_),
        inverse_(padded(most)),
        g_(rank * rank),
        t_(rank),
        s_(rank) {}

  void gather(const float* low, const float* diagonal, int64_t ld, const Kept& kept) {
    const int64_t k = kept.count, n = padded(k);
    n_ = n;
    for (int64_t i = 0; i < k; ++i) inverse_[i] = 1.0f / diagonal[kept.index[i]];
    std::fill(inverse_ + k, inverse_ + n, 0.0f);
    for (int64_t r = 0; r < rank_; ++r) {
      float *a = a_ + r * stride_, *f = f_ + r * stride_;
      compress(low + r * ld, low + (r + 1 < rank_ ? r + 1 : r) * ld, kept, k, a);
      std::fill(a + k, a + n, 0.0f);
      for (int64_t j = 0; j < n; j += L) (Vec::load(a + j) * Vec::load(inverse_ + j)).store(f + j);
    }
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
    for (int64_t i = 0; i < rank_; ++i) {
      double sum = 0.0;
      for (int64_t q = 0; q < rank_; ++q) sum += g_[q * rank_ + i] * t_[q];
      s_[i] = static_cast<float>(sum);
    }
    int64_t j = 0;
    for (; j + 4 * L <= n_; j += 4 * L) combine<4>(r + j, z + j, j);
    for (; j < n_; j += L) combine<1>(r + j, z + j, j);
  }

 private:
  static constexpr int kSide = 4;

  const int64_t rank_, stride_;
  int64_t n_ = 0;
  Buffer<float> a_, f_, inverse_;
  Buffer<double> g_;     // G, then its inverse
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
        g_[(i + r) * rank_ + j + c] = g_[(j + c) * rank_ + i + r] = value;
      }
  }

  // G^-1 in place, by Gauss-Jordan steps: G is definite, its eigenvalues one or more.
  void invert() {
    for (int64_t p = 0; p < rank_; ++p) {
      double* pivot_row = g_ + p * rank_;
      const double pivot = 1.0 / pivot_row[p];
      pivot_row[p] = 1.0;
      for (int64_t j = 0; j < rank_; ++j) pivot_row[j] *= pivot;
      for (int64_t i = 0; i < rank_; ++i) {
        if (i == p) continue;
        double* row = g_ + i * rank_;
        const double factor = row[p];
        row[p] = 0.0;
        for (int64_t j = 0; j < rank_; ++j) row[j] -= factor * pivot_row[j];
      }
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
    kept_.read(a_.mask.ptr<uint8_t>() + row * cols_, cols_);
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
