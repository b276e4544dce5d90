// The sweep is left-looking. Rows are cut into strips (see strip.h), and a strip's columns are
// brought up to date only when their turn comes, by one product with all errors so far:
//
//   W[:, tile] -= E[:, :tile] U[:tile, tile]
//
// where E = (w - q) / U_jj (see obs_errors.h: a kept weight that is not rounded has none). Solving
// a tile (kCols columns) and choosing its mask happen in cache in between. Every row sees the same
// operations in the same order whatever the strip width and the thread count, so the result depends
// on neither.
#include "cpu/obs_sweep.h"

#include <omp.h>

#include <optional>

#include "cpu/obs_errors.h"
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

// What a thread has of its own: the current block of columns, and masks and results of one strip in
// it, each [block][lanes].
struct Local {
  SweepBlock block;
  float* inv_diag;     // 1 / U_jj
  const float* scale;  // the factor of |w_j| in its score
  Cut cut;             // of the block, Rule::block
  int32_t *pruned, *preserved, *keys;
  float* kept;
};

// Every thread packs its own copy of a panel of up to this many floats, 2 MB: without a barrier,
// and it then lies in the thread's own cache, where a shared one would mostly lie in others'.
// Larger ones crowd each other out of the last-level cache.
constexpr int64_t kOwnPanel = int64_t{1} << 19;

template <int V, class Errors>
class Sweep {
 public:
  // `errors` are further arguments of Errors.
  template <class... Args>
  explicit Sweep(const ObsSweepArgs& args, Args... errors)
      : a_(args),
        rule_(rule_of(args)),
        rows_(args.w.shape[1]),
        cols_(args.w.shape[2]),
        strips_((rows_ + kLanes - 1) / kLanes),
        deal_{strips_, args.threads},
        errors_(deal_, cols_, errors...),
        block_(errors_.block()),
        own_panels_(args.threads > 1 && errors_.panel_floats() <= kOwnPanel),
        panel_(own_panels_ ? args.threads : 1, errors_.panel_floats()),
        inv_diag_(args.threads, cols_),
        grid_(args.grid ? 3 * strips_ * kLanes : 0),
        loss_(strips_ * kLanes),
        scratch_f_(args.threads, block_ * kLanes),
        scratch_i_(args.threads, 3 * block_ * kLanes),
        block_keys_(deal_, rule_ == Rule::block ? kLanes * block_ : 0),
        row_ties_(strips_ * kLanes) {
    if (rule_ == Rule::block) block_cut_.emplace(deal_, kLanes * block_);
  }

  void run() {
    for (int64_t b = 0; b < a_.w.shape[0]; ++b) matrix(b);
  }

 private:
  static constexpr int kLanes = V * Vec::kLanes;

  const ObsSweepArgs& a_;
  const Rule rule_;
  const int64_t rows_, cols_, strips_;
  const Deal deal_;
  const Errors errors_;
  const int64_t block_;
  const bool own_panels_;
  PerThread<float> panel_;
  PerThread<float> inv_diag_;
  Buffer<float> grid_;  // [strips][step, low, high][lanes]
  Buffer<double> loss_;
  PerThread<float> scratch_f_;
  PerThread<int32_t> scratch_i_;
  PerStrip<int32_t> block_keys_;  // [block][lanes]
  Buffer<int32_t> row_ties_;
  std::optional<BlockCut> block_cut_;

  // The current matrix of the batch.
  int64_t b_ = 0;
  const float* u_ = nullptr;

  int strip_rows(int64_t s) const {
    return static_cast<int>(std::min<int64_t>(kLanes, rows_ - s * kLanes));
  }
  int64_t element(int64_t s, int64_t col) const { return (b_ * rows_ + s * kLanes) * cols_ + col; }

  Local local() const {
    const int64_t n = block_ * kLanes;
    int32_t* p = scratch_i_.mine();
    const float* scale = inv_diag_.mine();
    if (a_.scale) scale = a_.scale->ptr<float>() + (a_.scale->shape[0] == 1 ? 0 : b_ * cols_);
    float* panel = own_panels_ ? panel_.mine() : panel_[0];
    return {{panel, 0, 0}, inv_diag_.mine(), scale, {kPreservedKey, 0}, p, p + n,
            p + 2 * n,     scratch_f_.mine()};
  }

  void matrix(int64_t b) {
    b_ = b;
    u_ = a_.u.ptr<float>() + (a_.u.shape[0] == 1 ? 0 : b * cols_ * cols_);
    if (a_.grid) load_grid(a_.grid->ptr<float>() + b * 3 * rows_);
    std::fill_n(static_cast<double*>(loss_), strips_ * kLanes, 0.0);
#pragma omp parallel num_threads(a_.threads)
    {
      Local mine = local();
      for (int64_t i1 = 0; i1 < cols_; i1 += block_) {
        take_block(i1, mine);
        if (rule_ == Rule::block) choose_in_block(mine);
        deal_.for_mine(0, strips_, [&](int64_t s) {
          if (rule_ != Rule::block) advance(s, mine);
          solve(s, mine);
          store_strip(mine.kept, kLanes, strip_rows(s), mine.block.width(),
                      a_.weight.ptr<float>() + element(s, i1), cols_);
          store_strip_unset(mine.pruned, kLanes, strip_rows(s), mine.block.width(),
                            a_.mask.ptr<uint8_t>() + element(s, i1), cols_);
        });
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

  // Goes on to the block of columns at i1. Called by the whole team.
  void take_block(int64_t i1, Local& mine) const {
    const int64_t i2 = std::min(cols_, i1 + block_);
    mine.block.first = i1, mine.block.end = i2;
    for (int64_t k = i1; k < i2; ++k) mine.inv_diag[k] = 1.0f / u_[k * cols_ + k];
    if (own_panels_) return errors_.pack(u_, 0, i2, mine.block);
#pragma omp barrier  // the others may still use the last panel
    const int64_t team = omp_get_num_threads(), share = (i2 + team - 1) / team;
    const int64_t k0 = std::min(i2, omp_get_thread_num() * share);
    errors_.pack(u_, k0, std::min(i2, k0 + share), mine.block);
#pragma omp barrier
  }

  // Loads the block's columns into strip s and applies all errors of earlier blocks to them.
  void advance(int64_t s, const Local& mine) const {
    const int64_t ld = a_.w.stride[1];
    const float* w = a_.w.ptr<float>() + b_ * a_.w.stride[0] + s * kLanes * ld + mine.block.first;
    const int64_t next = deal_.next_of_mine(s);
    const float* after = next < strips_ ? w + (next - s) * kLanes * ld : w;
    errors_.load(s, mine.block, w, after, ld, strip_rows(s));
  }

  // Visits the block's columns of strip s. A mask is chosen when all columns before it have been
  // visited: N:M chooses group by group, the other rules once for the block.
  void solve(int64_t s, const Local& mine) const {
    const SweepBlock& block = mine.block;
    if (a_.preserve)
      load_strip_unset(a_.preserve->ptr<uint8_t>() + element(s, block.first), cols_, strip_rows(s),
                       block.width(), mine.preserved, kLanes);
    if (rule_ != Rule::nm) choose(s, block.first, mine);
    for (int64_t g = block.first; g < block.end; g += errors_.stage()) {
      const int64_t end = std::min(block.end, g + errors_.stage());
      errors_.catch_up(s, block, g, end);
      solve_stage(s, g, end, mine);
      errors_.record(s, block, g, end);
    }
  }

  // Columns [g, end) of strip s, which are up to date with all before g.
  void solve_stage(int64_t s, int64_t g, int64_t end, const Local& mine) const {
    const typename Errors::StagePanel panel = errors_.panel(mine.block, g);
    float* strip = errors_.column(s, mine.block, g);
    const int64_t width = end - g, step = rule_ == Rule::nm ? a_.m : Panel::kDepth;
    for (int64_t i = 0; i < width; i += step) {
      const int64_t stop = std::min(width, i + step);
      update<V>(strip, panel, i, stop, 0, i);
      if (rule_ == Rule::nm) choose(s, g + i, mine);
      for_tiles(panel, i, stop, [&](int64_t c, auto tile) {
        const int64_t at = (g - mine.block.first + c) * kLanes;
        const auto visit = [&](auto quantise) {
          solve_tile<V, tile, Errors::StagePanel::kStride, quantise>(
              strip + c * kLanes, strip + i * kLanes, panel.at(i, c), c - i, mine.inv_diag + g + c,
              mine.pruned + at, mine.kept + at, loss_ + s * kLanes, grid_ + 3 * s * kLanes);
        };
        a_.grid ? visit(std::true_type()) : visit(std::false_type());
      });
    }
  }

  // The mask of the group (N:M) or the block that starts at column g.
  void choose(int64_t s, int64_t g, const Local& mine) const {
    const int64_t width = rule_ == Rule::nm ? a_.m : mine.block.width();
    const int64_t at = (g - mine.block.first) * kLanes;
    int32_t *pruned = mine.pruned + at, *preserved = mine.preserved + at;
    switch (rule_) {
      case Rule::given:
        load_strip_unset(a_.given->ptr<uint8_t>() + element(s, g), cols_, strip_rows(s), width,
                         pruned, kLanes);
        break;
      case Rule::nm:
        keys_of(s, g, width, mine, preserved, mine.keys);
        prune_group(mine.keys, width, kLanes, static_cast<int32_t>(a_.m - a_.n), pruned);
        break;
      case Rule::row:
        keys_of(s, g, width, mine, preserved, mine.keys);
        choose_in_rows(s, mine, pruned);
        break;
      case Rule::block:
        prune_to_cut(s, mine, pruned);
        break;
    }
    if (a_.preserve)
      for (int64_t i = 0; i < width * kLanes; ++i) pruned[i] |= preserved[i];
  }

  void keys_of(int64_t s, int64_t g, int64_t width, const Local& mine, const int32_t* preserved,
               int32_t* keys) const {
    score_keys(errors_.column(s, mine.block, g), mine.scale + g, width, kLanes, keys);
    static_assert(kPreservedKey == -1, "set by or-ing the lane mask in");
    if (a_.preserve)
      for (int64_t i = 0; i < width * kLanes; ++i) keys[i] |= preserved[i];
  }

  void choose_in_rows(int64_t s, const Local& mine, int32_t* pruned) const {
    const int64_t blocks = a_.counts->shape[2];
    const int32_t* counts = a_.counts->ptr<int32_t>() + (b_ * rows_ + s * kLanes) * blocks;
    for (int l = 0; l < kLanes; l += Vec::kLanes) {
      Keys k = {}, threshold, ties;
      for (int i = 0; i < Vec::kLanes && l + i < strip_rows(s); ++i)
        k[i] = counts[(l + i) * blocks + mine.block.first / block_];
      row_thresholds(mine.keys + l, mine.block.width(), kLanes, k, threshold, ties);
      prune_below(mine.keys + l, mine.block.width(), kLanes, threshold, ties, pruned + l);
    }
  }

  // --- rows x block: one cut for all strips -------------------------------------------------

  // Brings the block up to date in every strip and finds its cut. Called by the whole team.
  void choose_in_block(Local& mine) {
    const int64_t i1 = mine.block.first, width = mine.block.width();
    const int32_t count = a_.counts->ptr<int32_t>()[b_ * a_.counts->shape[2] + i1 / block_];
    const int64_t wanted = std::min<int64_t>(count, rows_ * width);
    deal_.for_mine(0, strips_, [&](int64_t s) {
      advance(s, mine);
      if (a_.preserve)
        load_strip_unset(a_.preserve->ptr<uint8_t>() + element(s, i1), cols_, strip_rows(s), width,
                         mine.preserved, kLanes);
      keys_of(s, i1, width, mine, mine.preserved, block_keys_[s]);
      block_cut_->add(s, block_keys_[s], width, kLanes, strip_rows(s));
    });
    const Cut cut = block_cut_->find(wanted, rows_ * width, width * kLanes,
                                     [&](int64_t s) { return block_keys_[s]; });
    if (cut.ties > 0 && cut.ties < kAllTies && !a_.all_ties) share_ties(cut, width);
    mine.cut = a_.all_ties && wanted > 0 ? Cut{cut.key, kAllTies} : cut;
  }

  // row_ties_: how many keys equal to the cut's each row prunes, earlier rows first.
  void share_ties(const Cut& cut, int64_t width) {
#pragma omp for schedule(static)
    for (int64_t s = 0; s < strips_; ++s)
      for (int l = 0; l < kLanes; ++l) {
        int32_t equal = 0;
        for (int64_t c = 0; c < width; ++c) equal += block_keys_[s][c * kLanes + l] == cut.key;
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

  void prune_to_cut(int64_t s, const Local& mine, int32_t* pruned) const {
    const int64_t width = mine.block.width();
    const Cut& cut = mine.cut;
    if (cut.ties == kAllTies) return prune_up_to(block_keys_[s], width, kLanes, cut.key, pruned);
    if (cut.ties == 0) return prune_up_to(block_keys_[s], width, kLanes, cut.key - 1, pruned);
    for (int l = 0; l < kLanes; l += Vec::kLanes)
      prune_below(block_keys_[s] + l, width, kLanes, Keys{} + cut.key,
                  keys_at(row_ties_ + s * kLanes + l), pruned + l);
  }
};

// The share of the weights that will be pruned; masks to preserve may add to it.
double pruned_share(const ObsSweepArgs& a) {
  const double size = static_cast<double>(a.w.numel());
  if (a.given) {
    const uint8_t* kept = a.given->ptr<uint8_t>();
    int64_t sum = 0;
#pragma omp parallel for reduction(+ : sum) num_threads(a.threads)
    for (int64_t i = 0; i < a.w.numel(); ++i) sum += kept[i];
    return 1.0 - static_cast<double>(sum) / size;
  }
  if (!a.counts) return 1.0 - static_cast<double>(a.n) / static_cast<double>(a.m);
  const int32_t* counts = a.counts->ptr<int32_t>();
  double sum = 0;
  for (int64_t i = 0; i < a.counts->numel(); ++i) sum += counts[i];
  return sum / size;
}

template <int V>
void sweep(const ObsSweepArgs& args) {
  constexpr double kMostPruned = 0.68;  // measured on AVX-512, 576 and 2048 columns: level
  using Pruned = PrunedErrors<V>;
  const Rule rule = rule_of(args);
  const int64_t unit = rule == Rule::nm ? args.m : 1;
  const bool few = kMaxVecs == 3 && !args.grid && unit <= Pruned::kWidest;
  if (!few || pruned_share(args) > kMostPruned)
    return Sweep<V, DenseErrors<V>>(args, args.block).run();
  // Where blocks mean nothing, a stage each.
  const bool free = rule == Rule::nm || rule == Rule::given;
  const int64_t block = free ? Pruned::kWidest / unit * unit : args.block;
  Sweep<V, Pruned>(args, block, unit).run();
}

}  // namespace

void obs_sweep(const ObsSweepArgs& args) {
  if (args.weight.numel() == 0) return;
  // Wide strips are faster; narrow ones when there would be too few to keep the threads busy.
  const int64_t vectors = (args.w.shape[1] + Vec::kLanes - 1) / Vec::kLanes;
  if constexpr (kMaxVecs == 3)
    if (vectors >= 3 * args.threads) return sweep<3>(args);
  sweep<1>(args);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
