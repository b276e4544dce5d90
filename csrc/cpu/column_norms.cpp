#include "cpu/column_norms.h"

#include <algorithm>

#include "cpu/simd.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// Columns a thread sweeps at a time: 4 vectors of accumulators stay in registers while the rows
// stream by, and each row contributes whole cache lines.
constexpr int kVecs = 4;

// Rows summed in one fp32 partial before it is added to the fp64 total. Bounds the rounding error
// of long calibration runs by that of 256 additions.
constexpr int64_t kRowChunk = 256;

template <class T>
void column_range(const T* x, int64_t rows, int64_t row_stride, const float* weight, float* acc,
                  int64_t c0, int64_t c1) {
  constexpr int kCols = kVecs * Vec::kLanes;
  int64_t c = c0;
  for (; c + kCols <= c1; c += kCols) {
    double total[kCols] = {};
    for (int64_t t0 = 0; t0 < rows; t0 += kRowChunk) {
      const int64_t t1 = std::min(rows, t0 + kRowChunk);
      Vec sum[kVecs];
      for (auto& s : sum) s = Vec::zero();
      for (int64_t t = t0; t < t1; ++t) {
        if (weight && weight[t] == 0.0f) continue;  // padding may hold infinities or NaN
        const T* row = x + t * row_stride + c;
        const Vec w = Vec::set1(weight ? weight[t] : 1.0f);
        for (int v = 0; v < kVecs; ++v) {
          const Vec a = Vec::load(row + v * Vec::kLanes);
          sum[v] = Vec::fma(a * w, a, sum[v]);
        }
      }
      float partial[kCols];
      for (int v = 0; v < kVecs; ++v) sum[v].store(partial + v * Vec::kLanes);
      for (int j = 0; j < kCols; ++j) total[j] += partial[j];
    }
    for (int j = 0; j < kCols; ++j) acc[c + j] += static_cast<float>(total[j]);
  }
  for (; c < c1; ++c) {
    double total = 0;
    for (int64_t t = 0; t < rows; ++t) {
      if (weight && weight[t] == 0.0f) continue;
      const double a = to_float(x[t * row_stride + c]);
      total += a * a * (weight ? weight[t] : 1.0f);
    }
    acc[c] += static_cast<float>(total);
  }
}

}  // namespace

void column_norms(const ColumnNormsArgs& args) {
  const int64_t rows = args.x.shape[0], cols = args.x.shape[1];
  const float* weight = args.weight ? args.weight->ptr<float>() : nullptr;
  float* acc = args.acc.ptr<float>();
  constexpr int64_t kCols = kVecs * Vec::kLanes;
  const int64_t tiles = (cols + kCols - 1) / kCols;
  with_float_type(args.x.dtype, [&](auto* tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
    const T* x = args.x.ptr<T>();
    const int64_t stride = args.x.stride[0];
    // A tile's columns belong to one thread: the result does not depend on the thread count.
#pragma omp parallel for num_threads(args.threads) schedule(static)
    for (int64_t i = 0; i < tiles; ++i)
      column_range<T>(x, rows, stride, weight, acc, i * kCols, std::min(cols, (i + 1) * kCols));
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
