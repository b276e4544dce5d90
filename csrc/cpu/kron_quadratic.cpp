// H's columns are cut into panels, W's rows into items. A block of the product H W^T is formed in
// registers, multiplied by the W^T it meets and added up along its columns, so that no product is
// ever stored. By symmetry a panel of columns of H needs only the rows above it, twice, and the
// block on the diagonal:
//
//   out[i] = sum over panels J of sum_{j in J} W[i, j] (2 sum_{k before J} + sum_{k in J}) H[k, j]
//   W[i, k]
//
// Round by round of k all threads pack the panels of H, then share out the items. A row is one
// item's and its terms follow in order, so the result depends on no thread count.
#include "cpu/kron_quadratic.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu/gemm_tile.h"
#include "cpu/strip.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// Values of k a round: whole panels, so that a panel's diagonal block falls into one round.
constexpr int64_t kRound = kDepth / kPanel * kPanel;

// sum[r] += value[r] * W[i0 + r, column] for the rows r of an item. Lanes past the item's last row
// are zero in W and stay zero.
struct Contract {
  const float* w;  // W^T from the panel's first column on, [columns][kPanel]
  float* sum;      // [kPanel]
  void prefetch(int row, int column) const { __builtin_prefetch(w + row * kPanel + column); }
  void operator()(int row, int column, int, Vec value) const {
    const Vec old = Vec::load(sum + column);
    Vec::fma(value, Vec::load(w + row * kPanel + column), old).store(sum + column);
  }
};

class Quadratic {
 public:
  explicit Quadratic(const KronQuadraticArgs& args)
      : a_(args),
        rows_(args.w.shape[0]),
        cols_(args.w.shape[1]),
        panels_(panels_of(cols_)),
        item_rows_(item_rows(rows_, args.threads)),
        packed_h_(float_buffer(panels_ * kPanelFloats)),
        packed_w_(float_buffer(args.threads * cols_ * kPanel)),
        out_(rows_, 0.0) {}

  void run() {
    const int64_t items = (rows_ + item_rows_ - 1) / item_rows_;
#pragma omp parallel num_threads(a_.threads)
    for (int64_t k0 = 0; k0 < cols_; k0 += kRound) {
      const int64_t depth = std::min(kRound, cols_ - k0);
      const RowSource<float> h{a_.h.ptr<float>(), a_.h.stride[0], nullptr, nullptr, cols_, false};
#pragma omp for schedule(static)
      for (int64_t j = k0 / kPanel; j < panels_; ++j)
        pack_panel(h, k0, depth, j * kPanel, packed_h_.get() + j * kPanelFloats);
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < items; ++item) add_item(item * item_rows_, k0, depth);
    }
    for (int64_t r = 0; r < rows_; ++r) a_.out.ptr<float>()[r] = static_cast<float>(out_[r]);
  }

 private:
  const KronQuadraticArgs& a_;
  const int64_t rows_, cols_, panels_, item_rows_;
  const FloatBuffer packed_h_;  // [panels][kPanelFloats]: this round's k of each panel
  const FloatBuffer packed_w_;  // [threads][columns][kPanel]: W^T from the round's first k on
  std::vector<double> out_;

  // A panel's rows, fewer when that leaves fewer than four items a thread.
  static int64_t item_rows(int64_t rows, int threads) {
    const int64_t share = rows / (4 * int64_t{threads}) / Vec::kLanes * Vec::kLanes;
    return std::clamp<int64_t>(share, Vec::kLanes, kPanel);
  }

  // Rows [i0, i0 + rows) of W from column k0 on.
  void pack_rows(int64_t i0, int64_t rows, int64_t k0, float* packed) const {
    const float* w = a_.w.ptr<float>();
    if (a_.w.stride[1] == 1 || cols_ == 1) {
      w += i0 * a_.w.stride[0] + k0;
      load_strip(w, a_.w.stride[0], static_cast<int>(rows), cols_ - k0, packed, kPanel);
    } else {
      const RowSource<float> source{w, a_.w.stride[1], nullptr, nullptr, i0 + rows, false};
      pack_panel(source, k0, cols_ - k0, i0, packed);
    }
  }

  // Adds what the round [k0, k0 + depth) contributes to the rows of an item.
  void add_item(int64_t i0, int64_t k0, int64_t depth) {
    const int64_t rows = std::min(item_rows_, rows_ - i0);
    float* w = packed_w_.get() + omp_get_thread_num() * cols_ * kPanel;
    pack_rows(i0, rows, k0, w);
    for (int64_t j = k0 / kPanel; j < panels_; ++j) {
      const int64_t c0 = j * kPanel - k0, c1 = std::min(cols_ - k0, c0 + kPanel);
      const float *h = packed_h_.get() + j * kPanelFloats, *columns = w + c0 * kPanel;
      const int width = static_cast<int>(c1 - c0);
      // The round's k before the panel count twice; those within it once.
      if (c0 > 0) add_block(h, w, std::min(c0, depth), width, i0, rows, columns, 2.0);
      if (c0 < depth) add_block(h + c0 * kPanel, columns, c1 - c0, width, i0, rows, columns, 1.0);
    }
  }

  void add_block(const float* h, const float* w, int64_t depth, int width, int64_t i0, int64_t rows,
                 const float* columns, double times) {
    alignas(64) float sum[kPanel] = {};
    panel_product<FloatWords>(h, w, depth, width, static_cast<int>(rows), false,
                              Contract{columns, sum});
    for (int64_t r = 0; r < rows; ++r) out_[i0 + r] += times * sum[r];
  }
};

}  // namespace

void kron_quadratic(const KronQuadraticArgs& args) {
  if (args.w.numel() == 0) {
    std::fill_n(args.out.ptr<float>(), args.out.shape[0], 0.0f);
    return;
  }
  Quadratic(args).run();
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
