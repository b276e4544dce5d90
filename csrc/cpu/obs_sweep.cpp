// The sweep is left-looking. Rows are cut into strips (see strip.h), and a strip's columns are
// brought up to date only when their turn comes, by one product with all errors so far:
//
//   W[:, tile] -= E[:, :tile] U[:tile, tile]
//
// A strip holds W to the right of the current column and the errors E = (w - q) / U_jj to its
// left: one array of the size of W, written once, and nearly all arithmetic in one register-blocked
// micro-kernel. Solving a tile (kCols columns) and choosing its mask happen in cache in between.
// Every row sees the same operations in the same order whatever the strip width and the thread
// count, so the result depends on neither.
#include "cpu/obs_sweep.h"

#include <omp.h>

#include <optional>

#include "cpu/obs_select.h"
#include "cpu/obs_tile.h"
#include "cpu/strip.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

enum class Rule { given, nm, row, block };

inline Rule rule_of(const ObsSweepArgs& a) {
  if (a.given) return Rule::given;
  if (!a.counts) return Rule::nm;
  return a.counts->shape[1] == 1 ? Rule::block : Rule::row;
}

// One thread's masks and results of one strip x block, each [block][lanes].
struct Scratch {
  int32_t *pruned, *preserved, *keys;
  float* kept;
};

template <int V>
class Sweep {
 public:
  explicit Sweep(const ObsSweepArgs& args)
      : a_(args),
        rule_(rule_of(args)),
        rows_(args.w.shape[1]),
        cols_(args.w.shape[2]),
        block_(std::min(args.block, (cols_ + kCols - 1) / kCols * kCols)),
        strips_((rows_ + kLanes - 1) / kLanes),
        errors_(strips_ * kLanes * cols_),
        panel_((block_ + kCols) * cols_),
        inv_diag_(cols_),
        grid_(args.grid ? 3 * strips_ * kLanes : 0),
        loss_(strips_ * kLanes),
        scratch_f_(args.threads * block_ * kLanes),
        scratch_i_(3 * args.threads * block_ * kLanes),
        block_keys_(rule_ == Rule::block ? strips_ * kLanes * block_ : 0),
        row_ties_(strips_ * kLanes) {
    if (rule_ == Rule::block) block_cut_.emplace(strips_, kLanes * block_);
  }

  void run() {
    for (int64_t b = 0; b < a_.w.shape[0]; ++b) matrix(b);
  }

 private:
  static constexpr int kLanes = V * Vec::kLanes;

  const ObsSweepArgs& a_;
  const Rule rule_;
  const int64_t rows_, cols_, block_, strips_;
  Buffer<float> errors_;    // [strips][cols][lanes]
  Buffer<float> panel_;     // U[:i2, i1:i2], see Panel
  Buffer<float> inv_diag_;  // 1 / U_jj
  Buffer<float> grid_;      // [strips][step, low, high][lanes]
  Buffer<double> loss_;
  Buffer<float> scratch_f_;
  Buffer<int32_t> scratch_i_;
  Buffer<int32_t> block_keys_;  // [strips][block][lanes]
  Buffer<int32_t> row_ties_;
  std::optional<BlockCut> block_cut_;

  // The current matrix of the batch and the current block of columns.
  int64_t b_ = 0;
  const float* u_ = nullptr;
  const float* scale_ = nullptr;  // the factor of |w_j| in its score
  int64_t i1_ = 0, i2_ = 0;
  Cut cut_{kPreservedKey, 0};  // of the current block, Rule::block

  Panel panel() const { return {panel_, i1_, i2_}; }
  float* strip(int64_t s) const { return errors_ + s * kLanes * cols_; }
  int strip_rows(int64_t s) const {
    return static_cast<int>(std::min<int64_t>(kLanes, rows_ - s * kLanes));
  }
  int64_t element(int64_t s, int64_t col) const { return (b_ * rows_ + s * kLanes) * cols_ + col; }

  Scratch scratch() const {
    const int64_t n = block_ * kLanes, t = omp_get_thread_num();
    int32_t* p = scratch_i_ + 3 * t * n;
    return {p, p + n, p + 2 * n, scratch_f_ + t * n};
  }

  void matrix(int64_t b) {
    b_ = b;
    u_ = a_.u.ptr<float>() + (a_.u.shape[0] == 1 ? 0 : b * cols_ * cols_);
    scale_ = inv_diag_;
    if (a_.scale) scale_ = a_.scale->ptr<float>() + (a_.scale->shape[0] == 1 ? 0 : b * cols_);
    if (a_.grid) load_grid(a_.grid->ptr<float>() + b * 3 * rows_);
    std::fill_n(static_cast<double*>(loss_), strips_ * kLanes, 0.0);
#pragma omp parallel num_threads(a_.threads)
    {
      const Scratch mine = scratch();
      for (int64_t i1 = 0; i1 < cols_; i1 += block_) {
#pragma omp single
        i1_ = i1, i2_ = std::min(cols_, i1 + block_);
        pack_panel();
        if (rule_ == Rule::block) choose_in_block();
#pragma omp for schedule(static)
        for (int64_t s = 0; s < strips_; ++s) {
          if (rule_ != Rule::block) advance(s);
          solve(s, mine);
          store_strip(mine.kept, kLanes, strip_rows(s), i2_ - i1_,
                      a_.weight.ptr<float>() + element(s, i1_), cols_);
          store_strip_unset(mine.pruned, kLanes, strip_rows(s), i2_ - i1_,
                            a_.mask.ptr<uint8_t>() + element(s, i1_), cols_);
        }
      }
    }
    float* loss = a_.loss.ptr<float>() + b * rows_;
    for (int64_t r = 0; r < rows_; ++r) loss[r] = static_cast<float>(loss_[r]);
  }

  // `grid` is [3][rows]. Lanes past the last row get {1, 0, 0}.
  void load_grid(const float* grid) const {
    for (int64_t s = 0; s < strips_; ++s)
      for (int part = 0; part < 3; ++part)
        for (int l = 0; l < kLanes; ++l)
          grid_[(3 * s + part) * kLanes + l] =
              l < strip_rows(s) ? grid[part * rows_ + s * kLanes + l] : part == 0;
  }

  void pack_panel() {
    const int64_t width = i2_ - i1_;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < i2_; ++k) {
      const float* row = u_ + k * cols_ + i1_;
      if (k >= i1_) inv_diag_[k] = 1.0f / row[k - i1_];
      for (int64_t c = 0; c < width; c += kCols) {
        float* out = panel_ + (c * i2_ + k * kCols);
        const int64_t inside = std::min<int64_t>(kCols, width - c);
        if (inside == kCols) {
          std::copy_n(row + c, kCols, out);
        } else {
          std::copy_n(row + c, inside, out);
          std::fill(out + inside, out + kCols, 0.0f);
        }
      }
    }
  }

  // Loads the block's columns into strip s and applies all errors of earlier blocks to them.
  void advance(int64_t s) {
    const int64_t ld = a_.w.stride[1];
    const float* w = a_.w.ptr<float>() + b_ * a_.w.stride[0] + s * kLanes * ld + i1_;
    load_strip(w, ld, strip_rows(s), i2_ - i1_, strip(s) + i1_ * kLanes, kLanes);
    update<V>(strip(s), panel(), i1_, i2_, 0, i1_);
  }

  // Visits the block's columns of strip s. A mask is chosen when all columns before it have been
  // visited: N:M chooses group by group, the other rules once for the block.
  void solve(int64_t s, const Scratch& mine) {
    if (a_.preserve)
      load_strip_unset(a_.preserve->ptr<uint8_t>() + element(s, i1_), cols_, strip_rows(s),
                       i2_ - i1_, mine.preserved, kLanes);
    if (rule_ != Rule::nm) choose(s, i1_, mine);
    const int64_t step = rule_ == Rule::nm ? a_.m : kDepth;
    for (int64_t g = i1_; g < i2_; g += step) {
      const int64_t end = std::min(i2_, g + step);
      update<V>(strip(s), panel(), g, end, i1_, g);
      if (rule_ == Rule::nm) choose(s, g, mine);
      panel().for_tiles(g, end, [&](int64_t c, auto width) {
        const int64_t at = (c - i1_) * kLanes;
        const auto visit = [&](auto quantise) {
          solve_tile<V, width, quantise>(
              strip(s) + c * kLanes, strip(s) + g * kLanes, panel().at(g, c), c - g, inv_diag_ + c,
              mine.pruned + at, mine.kept + at, loss_ + s * kLanes, grid_ + 3 * s * kLanes);
        };
        a_.grid ? visit(std::true_type()) : visit(std::false_type());
      });
    }
  }

  // The mask of the group (N:M) or the block that starts at column g.
  void choose(int64_t s, int64_t g, const Scratch& mine) {
    const int64_t width = rule_ == Rule::nm ? a_.m : i2_ - i1_, at = (g - i1_) * kLanes;
    int32_t *pruned = mine.pruned + at, *preserved = mine.preserved + at;
    switch (rule_) {
      case Rule::given:
        load_strip_unset(a_.given->ptr<uint8_t>() + element(s, g), cols_, strip_rows(s), width,
                         pruned, kLanes);
        break;
      case Rule::nm:
        keys_of(s, g, width, preserved, mine.keys);
        prune_group(mine.keys, width, kLanes, static_cast<int32_t>(a_.m - a_.n), pruned);
        break;
      case Rule::row:
        keys_of(s, g, width, preserved, mine.keys);
        choose_in_rows(s, width, mine.keys, pruned);
        break;
      case Rule::block:
        prune_to_cut(s, width, pruned);
        break;
    }
    if (a_.preserve)
      for (int64_t i = 0; i < width * kLanes; ++i) pruned[i] |= preserved[i];
  }

  void keys_of(int64_t s, int64_t g, int64_t width, const int32_t* preserved, int32_t* keys) const {
    score_keys(strip(s) + g * kLanes, scale_ + g, width, kLanes, keys);
    static_assert(kPreservedKey == -1, "set by or-ing the lane mask in");
    if (a_.preserve)
      for (int64_t i = 0; i < width * kLanes; ++i) keys[i] |= preserved[i];
  }

  void choose_in_rows(int64_t s, int64_t width, const int32_t* keys, int32_t* pruned) const {
    const int64_t blocks = a_.counts->shape[2];
    const int32_t* counts = a_.counts->ptr<int32_t>() + (b_ * rows_ + s * kLanes) * blocks;
    for (int l = 0; l < kLanes; l += Vec::kLanes) {
      Keys k = {}, threshold, ties;
      for (int i = 0; i < Vec::kLanes && l + i < strip_rows(s); ++i)
        k[i] = counts[(l + i) * blocks + i1_ / block_];
      row_thresholds(keys + l, width, kLanes, k, threshold, ties);
      prune_below(keys + l, width, kLanes, threshold, ties, pruned + l);
    }
  }

  // --- rows x block: one cut for all strips -------------------------------------------------

  int32_t* block_keys(int64_t s) const { return block_keys_ + s * kLanes * block_; }

  // Brings the block up to date in every strip and finds its cut. Called by the whole team.
  void choose_in_block() {
    const int64_t width = i2_ - i1_;
    const Scratch mine = scratch();
    const int32_t count = a_.counts->ptr<int32_t>()[b_ * a_.counts->shape[2] + i1_ / block_];
    const int64_t wanted = std::min<int64_t>(count, rows_ * width);
#pragma omp for schedule(static)
    for (int64_t s = 0; s < strips_; ++s) {
      advance(s);
      if (a_.preserve)
        load_strip_unset(a_.preserve->ptr<uint8_t>() + element(s, i1_), cols_, strip_rows(s), width,
                         mine.preserved, kLanes);
      keys_of(s, i1_, width, mine.preserved, block_keys(s));
      block_cut_->add(s, block_keys(s), width, kLanes, strip_rows(s));
    }
    const Cut cut = block_cut_->find(wanted, rows_ * width, width * kLanes,
                                     [&](int64_t s) { return block_keys(s); });
    if (cut.ties > 0 && cut.ties < kAllTies && !a_.all_ties) share_ties(cut);
#pragma omp single
    cut_ = a_.all_ties && wanted > 0 ? Cut{cut.key, kAllTies} : cut;
  }

  // row_ties_: how many keys equal to the cut's each row prunes, earlier rows first.
  void share_ties(const Cut& cut) {
#pragma omp for schedule(static)
    for (int64_t s = 0; s < strips_; ++s)
      for (int l = 0; l < kLanes; ++l) {
        int32_t equal = 0;
        for (int64_t c = 0; c < i2_ - i1_; ++c) equal += block_keys(s)[c * kLanes + l] == cut.key;
        row_ties_[s * kLanes + l] = equal;
      }
#pragma omp single
    {
      int64_t left = cut.ties;
      for (int64_t r = 0; r < rows_; ++r) {
        row_ties_[r] = static_cast<int32_t>(std::min<int64_t>(left, row_ties_[r]));
        left -= row_ties_[r];
      }
    }
  }

  void prune_to_cut(int64_t s, int64_t width, int32_t* pruned) const {
    if (cut_.ties == kAllTies) return prune_up_to(block_keys(s), width, kLanes, cut_.key, pruned);
    if (cut_.ties == 0) return prune_up_to(block_keys(s), width, kLanes, cut_.key - 1, pruned);
    for (int l = 0; l < kLanes; l += Vec::kLanes)
      prune_below(block_keys(s) + l, width, kLanes, Keys{} + cut_.key,
                  keys_at(row_ties_ + s * kLanes + l), pruned + l);
  }
};

}  // namespace

void obs_sweep(const ObsSweepArgs& args) {
  if (args.weight.numel() == 0) return;
  // Wide strips are faster; narrow ones when there would be too few to keep the threads busy.
  const int64_t vectors = (args.w.shape[1] + Vec::kLanes - 1) / Vec::kLanes;
  if constexpr (kMaxVecs == 3)
    if (vectors >= 3 * args.threads) return Sweep<3>(args).run();
  Sweep<1>(args).run();
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
