// Cholesky factorisation and triangular inverse in one left-looking pass over blocks of columns.
//
// With J the reversal and H damped, J H J = L L^T gives U = J L^-1 J. Rows are cut into strips
// (strip.h). When the pass reaches a block of columns, strips below it hold rows of A = JHJ to the
// right and rows of L to the left. The strips that hold the block's own rows of L, to its left, are
// the panel T = L^T; what they held of the block itself has moved to a square of its own. From
// there on they hold rows of the identity, from which they, too, are solved block by block:
//
//   rows below:       L[:, block]  = (A[:, block] - L[:, :block] T[:block, block]) T[block,
//   block]^-1 rows down to it:  X[:, block]  = (I[:, block] - X[:, :block] T[:block, block])
//   T[block, block]^-1
//
// where X = T^-1, and X[r][c] = L^-1[c][r] = U[C-1-c][C-1-r]. Both lines are products and
// triangular solves of tiles as in the OBS sweep, so that all but the blocks on the diagonal runs
// at its rate.
//
// A strip belongs to one thread throughout: only what others need of it, the panel, ever crosses
// from cache to cache. Threads wait for nothing but the panel and the square of a block, and those
// are made ahead: strips that the next block needs come first, and its square is factored as soon
// as they are done, while other threads are still at the block before.
#include "cpu/obs_factor.h"

#include <omp.h>
#include <sched.h>

#include <atomic>
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

// Rows [0, first) of T's columns from `first` on, where strips hold them.
struct StripPanel {
  static constexpr int kStride = kLanes;
  static constexpr int64_t kDepth = 96;  // two tiles share a line: less depth fits than in a Panel
  const PerStrip<float>& strips;
  int64_t first;

  const float* at(int64_t k, int64_t c) const {
    return strips[c / kLanes] + k * kLanes + c % kLanes;
  }
};

// The block of T on the diagonal that starts at `first`, [columns][rows] of L.
struct Square {
  static constexpr int kStride = kBlock;
  float* data;
  int64_t first;

  float* at(int64_t k, int64_t c) const { return data + (k - first) * kBlock + (c - first); }
};

// How far a strip has come in becoming part of a panel.
enum Stage : int32_t {
  kBehind,
  kFinal,    // its rows of L are final up to the block on the diagonal
  kUpdated,  // and the block itself is ready to be factored
};

// Spins for a while, then lets others run: they may be who is waited for.
template <class F>
void wait_until(F&& ready) {
  constexpr int kSpins = 1 << 10;
  for (int i = 0; !ready(); ++i) {
    if (i >= kSpins) sched_yield();
#if defined(__x86_64__)
    else
      __builtin_ia32_pause();
#endif
  }
}

class Factor {
 public:
  explicit Factor(const ObsFactorArgs& args)
      : h_(args.h.ptr<float>()),
        ld_(args.h.stride[0]),
        u_(args.u.ptr<float>()),
        dead_(args.dead.ptr<uint8_t>()),
        damping_(args.damping),
        n_(args.h.shape[0]),
        blocks_((n_ + kBlock - 1) / kBlock),
        deal_{(n_ + kLanes - 1) / kLanes, args.threads},
        strips_(deal_, kLanes * n_),
        squares_(blocks_ * kBlock * kBlock),
        inverse_(n_),
        diag_(n_),
        shift_(n_),
        least_(n_),
        stage_(deal_.strips) {
    for (int64_t s = 0; s < deal_.strips; ++s) stage_[s].store(kBehind, std::memory_order_relaxed);
  }

  bool run() {
#pragma omp parallel num_threads(deal_.threads)
    {
      look_at_rows();
#pragma omp single
      set_shift();
      // A late thread may find that a pivot has failed: no thread gets to wait for it then.
      if (good_) factor();
    }
    return good_;
  }

 private:
  const float* h_;
  const int64_t ld_;
  float* u_;
  uint8_t* dead_;
  const double damping_;
  const int64_t n_, blocks_;
  const Deal deal_;
  PerStrip<float> strips_;            // [columns][lanes]
  Buffer<float> squares_;             // [blocks][columns][rows], see Square
  Buffer<float> inverse_;             // 1 / T_jj
  Buffer<float> diag_;                // of H
  Buffer<float> shift_;               // what is added to the diagonal of H
  Buffer<float> least_;               // a pivot must be above this
  Buffer<std::atomic<Stage>> stage_;  // of each strip, raised by its thread
  std::atomic<int64_t> factored_{0};  // squares that are done
  std::atomic<bool> good_{true};

  int64_t begin_of(int64_t b) const { return b * kBlock; }
  int64_t end_of(int64_t b) const { return std::min(n_, (b + 1) * kBlock); }
  Square square(int64_t b) const { return {squares_ + b * kBlock * kBlock, begin_of(b)}; }

  // The first strip that has rows of block b.
  int64_t strip_of(int64_t b) const { return std::min(deal_.strips, b * (kBlock / kLanes)); }

  bool reached(int64_t b, Stage stage) const {
    for (int64_t s = strip_of(b); s < strip_of(b + 1); ++s)
      if (stage_[s].load(std::memory_order_acquire) < stage) return false;
    return true;
  }

  // Every thread of the team runs this.
  void factor() {
    deal_.for_mine(0, strip_of(1),
                   [&](int64_t s) { stage_[s].store(kFinal, std::memory_order_release); });
    Stage stage = kBehind;
    wait_until([&] { return prepare(0, stage); });
    for (int64_t b = 0; b < blocks_; ++b) {
      wait_until([&] { return factored_.load(std::memory_order_acquire) > b || !good_; });
      if (!good_) return;
      const int64_t next = b + 1, s1 = strip_of(next), s2 = strip_of(next + 1);
      deal_.for_mine(s1, s2, [&](int64_t s) {
        advance(s, b);
        stage_[s].store(kFinal, std::memory_order_release);
      });
      stage = kBehind;
      bool prepared = next == blocks_ || prepare(next, stage);
      const auto rest = [&](int64_t s) {
        advance(s, b);
        prepared = prepared || prepare(next, stage);
      };
      deal_.for_mine(s2, deal_.strips, rest);
      deal_.for_mine(0, s1, rest);
      wait_until([&] { return prepared || prepare(next, stage); });
    }
  }

  // Does what can be done now of this thread's share in the square of block b, `stage` how far that
  // has come; whether nothing is left of it. Whose strip is the last one factors the square.
  bool prepare(int64_t b, Stage& stage) {
    const int64_t i1 = begin_of(b), i2 = end_of(b);
    if (stage == kBehind) {
      if (!reached(b, kFinal)) return false;
      deal_.for_mine(strip_of(b), strip_of(b + 1), [&](int64_t s) {
        update_diagonal(s, i1, i2);
        stage_[s].store(kUpdated, std::memory_order_release);
      });
      stage = kUpdated;
    }
    if (!deal_.is_mine(strip_of(b + 1) - 1)) return true;
    if (!reached(b, kUpdated)) return false;
    if (factor_square(b))
      factored_.store(b + 1, std::memory_order_release);
    else
      good_ = false;
    return true;
  }

  // Collects the diagonal, and finds out whether H is finite above it: x * 0 is NaN if x is not.
  // An entry below that is not finite makes its row's pivot infinite, NaN or negative. Called by
  // the team.
  void look_at_rows() {
    constexpr int kSums = 4;
    Vec sum[kSums];
    for (Vec& part : sum) part = Vec::zero();
    float rest = 0.0f;
#pragma omp for schedule(static, 8) nowait
    for (int64_t r = 0; r < n_; ++r) {
      const float* row = h_ + r * ld_;
      int64_t c = r;
      for (; c + kSums * Vec::kLanes <= n_; c += kSums * Vec::kLanes)
#pragma GCC unroll 4
        for (int i = 0; i < kSums; ++i)
          sum[i] = Vec::fma(Vec::load(row + c + i * Vec::kLanes), Vec::zero(), sum[i]);
      for (; c < n_; ++c) rest += row[c] * 0.0f;
      diag_[r] = row[r];
    }
    if (!((sum[0] + sum[1] + sum[2] + sum[3]).sum() + rest == 0.0f)) good_ = false;
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

  // Makes the columns of block b final in strip s.
  void advance(int64_t s, int64_t b) const {
    const int64_t i1 = begin_of(b), i2 = end_of(b), row = s * kLanes;
    const bool below = row >= i2;
    if (below)
      load(s, i1, i2);
    else
      load_identity(s, i1, i2);
    const int64_t from = below ? 0 : row;
    update<V>(strips_[s], StripPanel{strips_, i1}, i1, i2, from, i1);
    solve(s, square(b), std::max(from, i1), i2);
    if (!below) store(s, std::max(from, i1), i2);
  }

  // Columns [a, b) of strip s from A: lanes run down a row of H, backwards.
  void load(int64_t s, int64_t a, int64_t b) const {
    const int64_t last = n_ - 1 - s * kLanes, lanes = std::min<int64_t>(kLanes, last + 1);
    for (int64_t c = a; c < b; ++c) {
      const float* row = h_ + (n_ - 1 - c) * ld_ + last;
      float* out = strips_[s] + c * kLanes;
      if (lanes == kLanes) {  // vectors, as the number is known
        for (int64_t l = 0; l < kLanes; ++l) out[l] = row[-l];
      } else {
        for (int64_t l = 0; l < lanes; ++l) out[l] = row[-l];
        for (int64_t l = lanes; l < kLanes; ++l) out[l] = 0.0f;
      }
      if (c >= s * kLanes && c < (s + 1) * kLanes) out[c - s * kLanes] += shift_[n_ - 1 - c];
    }
  }

  void load_identity(int64_t s, int64_t a, int64_t b) const {
    std::fill(strips_[s] + a * kLanes, strips_[s] + b * kLanes, 0.0f);
    for (int64_t c = std::max(a, s * kLanes); c < std::min(b, (s + 1) * kLanes); ++c)
      strips_[s][c * kLanes + c - s * kLanes] = 1.0f;
  }

  // The rows of U that have their diagonal in this strip get their zeros, too.
  void store(int64_t s, int64_t a, int64_t b) const {
    const int64_t last = n_ - 1 - s * kLanes, lanes = std::min<int64_t>(kLanes, last + 1);
    for (int64_t c = a; c < b; ++c) {
      const float* in = strips_[s] + c * kLanes;
      float* row = u_ + (n_ - 1 - c) * n_;
      if (lanes == kLanes)
        for (int64_t l = 0; l < kLanes; ++l) row[last - l] = in[l];
      else
        for (int64_t l = 0; l < lanes; ++l) row[last - l] = in[l];
      if (c / kLanes == s) std::fill_n(row, last + 1 - lanes, 0.0f);
    }
  }

  // Loads columns [i1, i2), a block on the diagonal that strip s has rows of, and brings them up to
  // date as far as they are below the diagonal.
  void update_diagonal(int64_t s, int64_t i1, int64_t i2) const {
    load(s, i1, i2);
    update<V>(strips_[s], StripPanel{strips_, i1}, i1, std::min(i2, (s + 1) * kLanes), 0, i1);
  }

  // Cholesky of block b on the diagonal, column by column. False if a pivot will not do.
  bool factor_square(int64_t b) const {
    const int64_t i1 = begin_of(b), n = end_of(b) - i1, first = i1 / kLanes;
    float (*const a)[kBlock] = reinterpret_cast<float (*)[kBlock]>(square(b).data);
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < n; i += kLanes)
        std::copy_n(strips_[first + i / kLanes] + (i1 + j) * kLanes, kLanes, a[j] + i);
    for (int64_t j = 0; j < n; ++j) {
      if (!(a[j][j] > least_[n_ - 1 - (i1 + j)]) || std::isinf(a[j][j])) return false;
      const float pivot = std::sqrt(a[j][j]), inverse = 1.0f / pivot;
      inverse_[i1 + j] = inverse;
      // In whole vectors: a load that spans several stores would have to wait for them.
      for (int64_t i = j / Vec::kLanes * Vec::kLanes; i < kBlock; i += Vec::kLanes)
        (Vec::load(a[j] + i) * Vec::set1(inverse)).store(a[j] + i);
      for (int64_t k = j + 1; k < n; ++k) {
        const float factor = a[j][k];
        for (int64_t i = k / Vec::kLanes * Vec::kLanes; i < kBlock; i += Vec::kLanes)
          Vec::fnma(Vec::load(a[j] + i), Vec::set1(factor), Vec::load(a[k] + i)).store(a[k] + i);
      }
    }
    return true;
  }

  void solve(int64_t s, const Square& square, int64_t a, int64_t b) const {
    for_tiles(square, a, b, [&](int64_t c, auto width) {
      divide_tile<V, width, Square::kStride>(strips_[s] + c * kLanes, strips_[s] + a * kLanes,
                                             square.at(a, c), c - a, inverse_ + c);
    });
  }
};

}  // namespace

void obs_factor(const ObsFactorArgs& args) {
  *args.good = args.h.numel() == 0 || Factor(args).run();
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
