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

// What a thread has of its own: the current block of columns, and masks and results of one strip in
// it, each [block][lanes].
struct Local {
  float* panel_data;
  Panel panel;         // U[:i2, i1:i2] for the block [i1, i2)
  float* inv_diag;     // 1 / U_jj
  const float* scale;  // the factor of |w_j| in its score
  Cut cut;             // of the block, Rule::block
  int32_t *pruned, *preserved, *keys;
  float* kept;

  int64_t begin() const { return panel.first; }
  int64_t end() const { return panel.rows; }
  int64_t width() const { return panel.rows - panel.first; }
};

// Every thread packs its own copy of a panel of up to this many floats, 2 MB: without a barrier,
// and it then lies in the thread's own cache, where a shared one would mostly lie in others'.
// Larger ones crowd each other out of the last-level cache.
constexpr int64_t kOwnPanel = int64_t{1} << 19;

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
        deal_{strips_, args.threads},
        errors_(deal_, kLanes * cols_),
        panel_floats_((block_ + kCols) * cols_),
        own_panels_(args.threads > 1 && panel_floats_ <= kOwnPanel),
        panel_(own_panels_ ? args.threads : 1, panel_floats_),
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
  const int64_t rows_, cols_, block_, strips_;
  const Deal deal_;
  PerStrip<float> errors_;  // [cols][lanes]
  const int64_t panel_floats_;
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
    return {panel, {panel, 0, 0}, inv_diag_.mine(), scale, {kPreservedKey, 0}, p,
            p + n, p + 2 * n,     scratch_f_.mine()};
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
          store_strip(mine.kept, kLanes, strip_rows(s), mine.width(),
                      a_.weight.ptr<float>() + element(s, i1), cols_);
          store_strip_unset(mine.pruned, kLanes, strip_rows(s), mine.width(),
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
    mine.panel = {mine.panel_data, i1, i2};
    for (int64_t k = i1; k < i2; ++k) mine.inv_diag[k] = 1.0f / u_[k * cols_ + k];
    if (own_panels_) return pack_rows(0, i2, mine);
#pragma omp barrier  // the others may still use the last panel
    const int64_t team = omp_get_num_threads(), share = (i2 + team - 1) / team;
    const int64_t k0 = std::min(i2, omp_get_thread_num() * share);
    pack_rows(k0, std::min(i2, k0 + share), mine);
#pragma omp barrier
  }

  // Rows [k0, k1) of the panel.
  void pack_rows(int64_t k0, int64_t k1, const Local& mine) const {
    const int64_t i1 = mine.begin(), i2 = mine.end(), width = mine.width();
    for (int64_t k = k0; k < k1; ++k) {
      const float* row = u_ + k * cols_ + i1;
      for (int64_t c = 0; c < width; c += kCols) {
        float* out = mine.panel_data + (c * i2 + k * kCols);
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
  void advance(int64_t s, const Local& mine) const {
    const int64_t ld = a_.w.stride[1], i1 = mine.begin(), i2 = mine.end();
    const float* w = a_.w.ptr<float>() + b_ * a_.w.stride[0] + s * kLanes * ld + i1;
    load_strip(w, ld, strip_rows(s), i2 - i1, errors_[s] + i1 * kLanes, kLanes);
    update<V>(errors_[s], mine.panel, i1, i2, 0, i1);
  }

  // Visits the block's columns of strip s. A mask is chosen when all columns before it have been
  // visited: N:M chooses group by group, the other rules once for the block.
  void solve(int64_t s, const Local& mine) const {
    const int64_t i1 = mine.begin(), i2 = mine.end();
    if (a_.preserve)
      load_strip_unset(a_.preserve->ptr<uint8_t>() + element(s, i1), cols_, strip_rows(s), i2 - i1,
                       mine.preserved, kLanes);
    if (rule_ != Rule::nm) choose(s, i1, mine);
    const int64_t step = rule_ == Rule::nm ? a_.m : Panel::kDepth;
    for (int64_t g = i1; g < i2; g += step) {
      const int64_t end = std::min(i2, g + step);
      update<V>(errors_[s], mine.panel, g, end, i1, g);
      if (rule_ == Rule::nm) choose(s, g, mine);
      for_tiles(mine.panel, g, end, [&](int64_t c, auto width) {
        const int64_t at = (c - i1) * kLanes;
        const auto visit = [&](auto quantise) {
          solve_tile<V, width, Panel::kStride, quantise>(
              errors_[s] + c * kLanes, errors_[s] + g * kLanes, mine.panel.at(g, c), c - g,
              mine.inv_diag + c, mine.pruned + at, mine.kept + at, loss_ + s * kLanes,
              grid_ + 3 * s * kLanes);
        };
        a_.grid ? visit(std::true_type()) : visit(std::false_type());
      });
    }
  }

  // The mask of the group (N:M) or the block that starts at column g.
  void choose(int64_t s, int64_t g, const Local& mine) const {
    const int64_t width = rule_ == Rule::nm ? a_.m : mine.width();
    const int64_t at = (g - mine.begin()) * kLanes;
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
    score_keys(errors_[s] + g * kLanes, mine.scale + g, width, kLanes, keys);
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
        k[i] = counts[(l + i) * blocks + mine.begin() / block_];
      row_thresholds(mine.keys + l, mine.width(), kLanes, k, threshold, ties);
      prune_below(mine.keys + l, mine.width(), kLanes, threshold, ties, pruned + l);
    }
  }

  // --- rows x block: one cut for all strips -------------------------------------------------

  // Brings the block up to date in every strip and finds its cut. Called by the whole team.
  void choose_in_block(Local& mine) {
    const int64_t i1 = mine.begin(), width = mine.width();
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
    const int64_t width = mine.width();
    const Cut& cut = mine.cut;
    if (cut.ties == kAllTies) return prune_up_to(block_keys_[s], width, kLanes, cut.key, pruned);
    if (cut.ties == 0) return prune_up_to(block_keys_[s], width, kLanes, cut.key - 1, pruned);
    for (int l = 0; l < kLanes; l += Vec::kLanes)
      prune_below(block_keys_[s] + l, width, kLanes, Keys{} + cut.key,
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
