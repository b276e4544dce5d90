// A step needs one column of the current inverse, and its diagonal. The inverse after t removals is
// inverse - V^T V with V the t removed columns, each over the root of its pivot (a pivoted Cholesky
// factorisation), so a column costs t C multiply-adds from V, which for half the weights of 1000
// just fits a second-level cache of 1 MiB, where a downdated inverse would be read and written
// whole. V is kept in groups of rows as [C / L vectors][kGroup rows][L]: one stream through it.
//
// Problems share nothing, so the result does not depend on the thread count.
#include "cpu/obs_greedy.h"

#include <omp.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu/obs_tile.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

constexpr int L = Vec::kLanes;
constexpr int kGroup = 8;
constexpr float kClosed = std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t n) { return (n + L - 1) / L * L; }

// One thread's problem.
class Greedy {
 public:
  explicit Greedy(const ObsGreedyArgs& args)
      : a_(args),
        cols_(args.w.shape[1]),
        steps_(args.order.shape[1]),
        width_(padded(cols_)),
        v_((steps_ + kGroup - 1) / kGroup * kGroup * width_),
        x_(width_),
        d_(width_),
        floor_(width_),
        open_(width_),
        penalty_(width_),
        column_(width_),
        score_(width_),
        left_(args.m ? cols_ / args.m : 0) {}

  void run(int64_t p) {
    const int64_t own = a_.inverse.shape[0] == 1 ? 0 : p;
    const float* inverse = a_.inverse.ptr<float>() + own * cols_ * cols_;
    const uint8_t* first = a_.first.data ? a_.first.ptr<uint8_t>() + p * cols_ : nullptr;
    int64_t* order = a_.order.ptr<int64_t>() + p * steps_;
    float* loss = a_.loss.ptr<float>() + p * steps_;
    load(inverse, a_.w.ptr<float>() + p * cols_);
    int64_t forced = 0, t = 0;
    for (; t < steps_; ++t) {
      while (first && forced < cols_ && !first[forced]) ++forced;
      const int64_t j = first && forced < cols_ ? forced++ : cheapest();
      if (j < 0) break;
      order[t] = j;
      loss[t] = remove(inverse + j * cols_, j, t);
    }
    for (; t < steps_; ++t) order[t] = -1, loss[t] = 0.0f;
  }

 private:
  const ObsGreedyArgs& a_;
  const int64_t cols_, steps_, width_;
  Buffer<float> v_, x_, d_, floor_;
  // 1 for the weights still there, else 0; 0 for those that may go, else infinite.
  Buffer<float> open_, penalty_, column_, score_;
  std::vector<int64_t> left_;  // how many of each group may still go

  void load(const float* inverse, const float* w) {
    for (int64_t j = 0; j < width_; ++j) {
      const bool there = j < cols_;
      x_[j] = there ? w[j] : 0.0f;
      d_[j] = there ? inverse[j * cols_ + j] : 1.0f;
      // Rounding may not turn a pivot that all but vanished into a negative one.
      floor_[j] = d_[j] * std::numeric_limits<float>::epsilon();
      open_[j] = there ? 1.0f : 0.0f;
      penalty_[j] = there ? 0.0f : kClosed;
      column_[j] = 0.0f;
    }
    for (auto& group : left_) group = a_.m - a_.n;
    if (a_.m && a_.m == a_.n) std::fill_n(static_cast<float*>(penalty_), width_, kClosed);
  }

  // The index of the least score, the lowest of equal ones; -1 if none may go.
  int64_t cheapest() {
    float least[L];
    for (int l = 0; l < L; ++l) least[l] = kClosed;
    float *score = score_, *x = x_, *d = d_, *penalty = penalty_;
    for (int64_t j = 0; j < width_; j += L)
      for (int l = 0; l < L; ++l) {
        const float s = x[j + l] * x[j + l] / d[j + l] + penalty[j + l];
        score[j + l] = s;
        least[l] = s < least[l] ? s : least[l];
      }
    float best = kClosed;
    for (int l = 0; l < L; ++l) best = least[l] < best ? least[l] : best;
    if (best == kClosed) return -1;
    int64_t j = 0;
    while (score[j] != best) ++j;
    return j;
  }

  float* panel(int64_t group) { return v_ + group * kGroup * width_; }

  // Takes weight j away as step t; `row` is its column of the inverse at the start. What it cost.
  float remove(const float* row, int64_t j, int64_t t) {
    std::copy_n(row, cols_, static_cast<float*>(column_));
    const int64_t groups = (t + kGroup - 1) / kGroup;
    for (int64_t g = 0; g < groups; ++g) subtract(panel(g), j);
    const int64_t r = t % kGroup;
    float* rows = panel(t / kGroup);
    if (r == 0) std::fill_n(rows, kGroup * width_, 0.0f);
    const float scale = 1.0f / std::sqrt(d_[j]), change = x_[j] * scale;
    float *x = x_, *d = d_, *floor = floor_, *open = open_, *column = column_;
    for (int64_t q = 0; q < width_; q += L)
      for (int l = 0; l < L; ++l) {
        const float v = column[q + l] * open[q + l] * scale;
        const float left = d[q + l] - v * v;
        rows[q * kGroup + r * L + l] = v;
        x[q + l] -= v * change;
        d[q + l] = left > floor[q + l] ? left : floor[q + l];
      }
    close(j);
    return 0.5f * change * change;
  }

  // column -= its share of kGroup removed columns.
  void subtract(const float* rows, int64_t j) {
    Vec factor[kGroup];
    const float* at = rows + j / L * L * kGroup + j % L;
#pragma GCC unroll 8
    for (int r = 0; r < kGroup; ++r) factor[r] = Vec::set1(at[r * L]);
    float* column = column_;
    for (int64_t q = 0; q < width_; q += L, rows += kGroup * L) {
      Vec out[2] = {Vec::load(column + q), Vec::zero()};
#pragma GCC unroll 8
      for (int r = 0; r < kGroup; ++r)
        out[r % 2] = Vec::fnma(factor[r], Vec::load(rows + r * L), out[r % 2]);
      (out[0] + out[1]).store(column + q);
    }
  }

  void close(int64_t j) {
    open_[j] = 0.0f;
    penalty_[j] = kClosed;
    if (!a_.m || --left_[j / a_.m] > 0) return;
    std::fill_n(penalty_ + j / a_.m * a_.m, a_.m, kClosed);
  }
};

}  // namespace

void obs_greedy(const ObsGreedyArgs& args) {
  const int64_t problems = args.w.shape[0];
  // Allocated here: an exception must not leave the parallel region.
  std::vector<std::unique_ptr<Greedy>> solvers;
  for (int t = 0; t < args.threads; ++t) solvers.push_back(std::make_unique<Greedy>(args));
#pragma omp parallel for schedule(dynamic, 1) num_threads(args.threads)
  for (int64_t p = 0; p < problems; ++p) solvers[omp_get_thread_num()]->run(p);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
