// Cholesky factorisation and triangular inverse in one left-looking pass over blocks of columns.
//
// With J the reversal and H damped, J H J = L L^T gives U = J L^-1 J. Rows are cut into strips
// (strip.h). When the pass reaches a block of columns, strips below it hold rows of A = JHJ to the
// right and rows of L to the left; the block's own rows of L become a panel T = L^T and their
// strips start over with rows of the identity, from which they, too, are solved block by block:
//
//   rows below:       L[:, block]  = (A[:, block] - L[:, :block] T[:block, block]) T[block,
//   block]^-1 rows down to it:  X[:, block]  = (I[:, block] - X[:, :block] T[:block, block])
//   T[block, block]^-1
//
// where X = T^-1, and X[r][c] = L^-1[c][r] = U[C-1-c][C-1-r]. Both lines are the OBS sweep's two
// micro-kernels with every weight pruned, so that all but the blocks on the diagonal runs at their
// rate.
#include "cpu/obs_factor.h"

#include <omp.h>

#include <cmath>
#include <limits>

#include "cpu/obs_tile.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

constexpr int V = kMaxVecs;
constexpr int kLanes = V * Vec::kLanes;

// Columns per block, whole strips: 96. Twice as many would double the serial work on the diagonal.
constexpr int kBlock = 96;
static_assert(kBlock % kLanes == 0 && kLanes % kCols == 0, "blocks are whole strips and tiles");

class Factor {
 public:
  explicit Factor(const ObsFactorArgs& args)
      : h_(args.h.ptr<float>()),
        ld_(args.h.stride[0]),
        u_(args.u.ptr<float>()),
        dead_(args.dead.ptr<uint8_t>()),
        damping_(args.damping),
        threads_(args.threads),
        n_(args.h.shape[0]),
        strips_((n_ + kLanes - 1) / kLanes),
        data_(strips_ * kLanes * n_),
        panel_(kBlock * n_),
        inverse_(kBlock),
        diagonal_(kBlock * kBlock),
        diag_(n_),
        shift_(n_),
        least_(n_),
        all_(kCols * kLanes),
        kept_(threads_ * kCols * kLanes),
        loss_(threads_ * kLanes) {
    std::fill_n(static_cast<int32_t*>(all_), kCols * kLanes, -1);
    std::fill_n(static_cast<double*>(loss_), threads_ * kLanes, 0.0);
  }

  bool run() {
#pragma omp parallel num_threads(threads_)
    {
      look_at_rows();
#pragma omp single
      set_shift();
      for (int64_t i1 = 0; i1 < n_ && good_; i1 += kBlock) {
        const int64_t i2 = std::min(n_, i1 + kBlock);
        update_diagonal(i1, i2);
#pragma omp single
        good_ = factor_diagonal(i1, i2);
        pack_panel(i1, i2, i1, i2);
        for (int64_t s = 0; s < strips_; ++s)
          if (is_mine(s)) advance(s, i1, i2);
#pragma omp barrier
      }
    }
    return good_;
  }

 private:
  const float* h_;
  const int64_t ld_;
  float* u_;
  uint8_t* dead_;
  const double damping_;
  const int threads_;
  const int64_t n_, strips_;
  Buffer<float> data_;      // [strips][columns][lanes]
  Buffer<float> panel_;     // T[:i2, i1:i2], see Panel
  Buffer<float> inverse_;   // 1 / T_jj of the block
  Buffer<float> diagonal_;  // the block on the diagonal, [columns][rows]
  Buffer<float> diag_;      // of H
  Buffer<float> shift_;     // what is added to the diagonal of H
  Buffer<float> least_;     // a pivot must be above this
  // solve_tile's mask (all pruned), and its outputs that are of no use here.
  Buffer<int32_t> all_;
  Buffer<float> kept_;
  Buffer<double> loss_;
  bool good_ = true;

  float* strip(int64_t s) const { return data_ + s * kLanes * n_; }

  // A strip stays with one thread, and so in its cache. Those further down have less to do: every
  // other round of the threads goes backwards.
  bool is_mine(int64_t s) const {
    const int64_t team = omp_get_num_threads(), turn = s % (2 * team);
    return omp_get_thread_num() == (turn < team ? turn : 2 * team - 1 - turn);
  }

  // Collects the diagonal, and finds out whether all of H is finite: x * 0 is NaN if x is not.
  // Called by the team.
  void look_at_rows() {
    Vec sum = Vec::zero();
    float rest = 0.0f;
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < n_; ++r) {
      const float* row = h_ + r * ld_;
      int64_t c = 0;
      for (; c + Vec::kLanes <= n_; c += Vec::kLanes)
        sum = Vec::fma(Vec::load(row + c), Vec::zero(), sum);
      for (; c < n_; ++c) rest += row[c] * 0.0f;
      diag_[r] = row[r];
    }
#pragma omp critical(pyprune_obs_factor)
    if (!(sum.sum() + rest == 0.0f)) good_ = false;
#pragma omp barrier
  }

  // An input is dead whose diagonal is zero, and it then counts as one. A pivot within the rounding
  // error of the subtractions it is left over from, about sqrt(n) eps of its diagonal, would have
  // its sign by luck.
  void set_shift() {
    double sum = 0;
    for (int64_t j = 0; j < n_; ++j) {
      dead_[j] = diag_[j] == 0.0f;
      sum += dead_[j] ? 1.0 : diag_[j];
    }
    const double damping = damping_ * (sum / static_cast<double>(n_));
    const float noise = std::sqrt(static_cast<float>(n_)) * std::numeric_limits<float>::epsilon();
    for (int64_t j = 0; j < n_; ++j) {
      shift_[j] = static_cast<float>(dead_[j] + damping);
      least_[j] = std::max(0.0f, noise * (diag_[j] + shift_[j]));
    }
  }

  // Makes the block's columns of a strip final.
  void advance(int64_t s, int64_t i1, int64_t i2) const {
    const Panel panel{panel_, i1, i2};
    const int64_t row = s * kLanes;
    const bool below = row >= i2;
    if (below)
      load(s, i1, i2);
    else
      load_identity(s, i1, i2);
    const int64_t from = below ? 0 : row;
    update<V>(strip(s), panel, i1, i2, from, i1);
    solve(s, panel, std::max(from, i1), i2);
    if (!below) store(s, std::max(from, i1), i2);
  }

  // Columns [a, b) of strip s from A: lanes run down a row of H, backwards.
  void load(int64_t s, int64_t a, int64_t b) const {
    const int64_t last = n_ - 1 - s * kLanes, lanes = std::min<int64_t>(kLanes, last + 1);
    for (int64_t c = a; c < b; ++c) {
      const float* row = h_ + (n_ - 1 - c) * ld_ + last;
      float* out = strip(s) + c * kLanes;
      for (int64_t l = 0; l < lanes; ++l) out[l] = row[-l];
      for (int64_t l = lanes; l < kLanes; ++l) out[l] = 0.0f;
      if (c >= s * kLanes && c < (s + 1) * kLanes) out[c - s * kLanes] += shift_[n_ - 1 - c];
    }
  }

  void load_identity(int64_t s, int64_t a, int64_t b) const {
    std::fill(strip(s) + a * kLanes, strip(s) + b * kLanes, 0.0f);
    for (int64_t c = std::max(a, s * kLanes); c < std::min(b, (s + 1) * kLanes); ++c)
      strip(s)[c * kLanes + c - s * kLanes] = 1.0f;
  }

  // The rows of U that have their diagonal in this strip get their zeros, too.
  void store(int64_t s, int64_t a, int64_t b) const {
    const int64_t last = n_ - 1 - s * kLanes, lanes = std::min<int64_t>(kLanes, last + 1);
    for (int64_t c = a; c < b; ++c) {
      const float* in = strip(s) + c * kLanes;
      float* row = u_ + (n_ - 1 - c) * n_;
      for (int64_t l = 0; l < lanes; ++l) row[last - l] = in[l];
      if (c / kLanes == s) std::fill_n(row, last + 1 - lanes, 0.0f);
    }
  }

  // Packs the panel above the block on the diagonal, loads that block and brings it up to date,
  // tile by tile for the whole team.
  void update_diagonal(int64_t i1, int64_t i2) {
    const int64_t first = i1 / kLanes, last = (i2 + kLanes - 1) / kLanes;
#pragma omp for schedule(static)
    for (int64_t s = first; s < last; ++s) load(s, i1, i2);
    pack_panel(i1, i2, 0, i1);
    const Panel panel{panel_, i1, i2};
    // In turns: the first strip has half as many tiles as the second.
#pragma omp for collapse(2) schedule(static, 1)
    for (int64_t s = first; s < last; ++s)
      for (int64_t c = i1; c < i1 + kBlock; c += kCols)
        if (c < std::min(i2, (s + 1) * kLanes))
          update<V>(strip(s), panel, c, std::min(i2, c + kCols), 0, i1);
  }

  // Rows [k0, k1) of the panel: [tile][k][j] = L[i1 + tile * kCols + j][k]. Called by the team.
  void pack_panel(int64_t i1, int64_t i2, int64_t k0, int64_t k1) const {
#pragma omp for schedule(static)
    for (int64_t k = k0; k < k1; ++k)
      for (int64_t r = i1; r < i2; r += kCols) {
        const float* in = strip(r / kLanes) + k * kLanes + r % kLanes;
        std::copy_n(in, kCols, panel_ + (r - i1) * i2 + k * kCols);
      }
  }

  // Cholesky of the block on the diagonal, column by column. False if a pivot will not do.
  bool factor_diagonal(int64_t i1, int64_t i2) const {
    const int64_t n = i2 - i1, first = i1 / kLanes;
    float (*const a)[kBlock] = reinterpret_cast<float (*)[kBlock]>(static_cast<float*>(diagonal_));
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < n; i += kLanes)
        std::copy_n(strip(first + i / kLanes) + (i1 + j) * kLanes, kLanes, a[j] + i);
    for (int64_t j = 0; j < n; ++j) {
      if (!(a[j][j] > least_[n_ - 1 - (i1 + j)]) || std::isinf(a[j][j])) return false;
      const float pivot = std::sqrt(a[j][j]), inverse = 1.0f / pivot;
      inverse_[j] = inverse;
      // In whole vectors: a load that spans several stores would have to wait for them.
      for (int64_t i = j / Vec::kLanes * Vec::kLanes; i < kBlock; i += Vec::kLanes)
        (Vec::load(a[j] + i) * Vec::set1(inverse)).store(a[j] + i);
      for (int64_t k = j + 1; k < n; ++k) {
        const float factor = a[j][k];
        for (int64_t i = k / Vec::kLanes * Vec::kLanes; i < kBlock; i += Vec::kLanes)
          Vec::fnma(Vec::load(a[j] + i), Vec::set1(factor), Vec::load(a[k] + i)).store(a[k] + i);
      }
    }
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < n; i += kLanes)
        std::copy_n(a[j] + i, kLanes, strip(first + i / kLanes) + (i1 + j) * kLanes);
    return true;
  }

  void solve(int64_t s, const Panel& panel, int64_t a, int64_t b) const {
    float* kept = kept_ + omp_get_thread_num() * kCols * kLanes;
    double* loss = loss_ + omp_get_thread_num() * kLanes;
    panel.for_tiles(a, b, [&](int64_t c, auto width) {
      solve_tile<V, width>(strip(s) + c * kLanes, strip(s) + a * kLanes, panel.at(a, c), c - a,
                           inverse_ + (c - panel.first), all_, kept, loss);
    });
  }
};

}  // namespace

void obs_factor(const ObsFactorArgs& args) {
  *args.good = args.h.numel() == 0 || Factor(args).run();
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
