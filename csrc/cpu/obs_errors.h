// What an OBS sweep remembers of the columns it has visited: the errors E of a strip's rows, and
// how they bring later columns up to date,
//
//   W[:, later] -= E[:, :visited] U[:visited, later].
//
// DenseErrors holds E like the strip itself. PrunedErrors leaves out that a kept weight has no
// error: it holds every row's errors without the zeros, and multiplies a row of E by the rows of U
// that it has use for. That takes a load of U per multiply-add where a tile of a strip needs half a
// load: 0.8 of the multipliers' rate instead of 0.9, for the share of the products that is pruned.
// Both do the same operations on every element in the same order, but for subtractions of zero.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/expand.h"
#include "cpu/obs_tile.h"
#include "cpu/strip.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// A block of columns [first, end) and, packed as the kind of errors wants it, U[:end, first:end].
struct SweepBlock {
  float* data;
  int64_t first, end;

  int64_t width() const { return end - first; }
};

template <int V>
class DenseErrors {
 public:
  using StagePanel = Panel;

  DenseErrors(const Deal& deal, int64_t cols, int64_t block)
      : block_(std::min(block, (cols + kCols - 1) / kCols * kCols)),
        cols_(cols),
        strips_(deal, kLanes * cols) {}

  int64_t block() const { return block_; }
  int64_t stage() const { return block_; }
  int64_t panel_floats() const { return (block_ + kCols) * cols_; }

  // Rows [k0, k1) of U into the block's panel.
  void pack(const float* u, int64_t k0, int64_t k1, const SweepBlock& block) const {
    for (int64_t k = k0; k < k1; ++k) {
      const float* row = u + k * cols_ + block.first;
      for (int64_t c = 0; c < block.width(); c += kCols) {
        float* out = block.data + (c * block.end + k * kCols);
        const int64_t inside = std::min<int64_t>(kCols, block.width() - c);
        std::copy_n(row + c, inside, out);
        std::fill(out + inside, out + kCols, 0.0f);
      }
    }
  }

  // Column c of strip s, [lanes]; those of the block follow.
  float* column(int64_t s, const SweepBlock&, int64_t c) const { return strips_[s] + c * kLanes; }

  // U[first:end, first:end], at(0, 0) its first element.
  Panel panel(const SweepBlock& block, int64_t) const {
    return {block.data + block.first * kCols, 0, block.end};
  }

  // Loads the block's columns of strip s from `w` and applies all errors before the block. `next`:
  // where the strip begins that comes after it, or w.
  void load(int64_t s, const SweepBlock& block, const float* w, const float*, int64_t ld,
            int rows) const {
    load_strip(w, ld, rows, block.width(), strips_[s] + block.first * kLanes, kLanes);
    update<V>(strips_[s], Panel{block.data, block.first, block.end}, block.first, block.end, 0,
              block.first);
  }

  void catch_up(int64_t, const SweepBlock&, int64_t, int64_t) const {}
  void record(int64_t, const SweepBlock&, int64_t, int64_t) const {}

 private:
  static constexpr int kLanes = V * Vec::kLanes;

  const int64_t block_, cols_;
  PerStrip<float> strips_;  // [cols][lanes]: W from the current column on, E before it
};

template <int V>
class PrunedErrors {
  static constexpr int kLanes = V * Vec::kLanes;
  // Columns per stage. A row's part of a later stage stays in registers (4 or 8 accumulators), and
  // a stage's rows of U for it, 16 KiB, in a first-level cache.
  static constexpr int kStage = 64;
  static constexpr int kVecs = kStage / Vec::kLanes;
  static constexpr int kLine = 16;  // floats of a cache line
  // Rows at a time: two chains of additions for each multiplier where there are registers for them.
  static constexpr int kTogether = kVecs <= 4 ? 2 : 1;
  static_assert(kLanes % kTogether == 0, "strips are whole groups of rows");

 public:
  struct StagePanel {
    static constexpr int kStride = kStage;
    static constexpr int64_t kDepth = kStage;
    static constexpr int64_t first = 0;
    const float* data;

    const float* at(int64_t k, int64_t c) const { return data + k * kStage + c; }
  };

  // `unit`: stages are whole numbers of this many columns, at most kWidest.
  PrunedErrors(const Deal& deal, int64_t cols, int64_t block, int64_t unit)
      : stage_(kStage / unit * unit),
        block_(std::min(block, (cols + stage_ - 1) / stage_ * stage_)),
        cols_(cols),
        in_block_((block_ + stage_ - 1) / stage_),
        stages_((cols_ + block_ - 1) / block_ * in_block_),
        columns_(deal, kLanes * block_),
        values_(deal, kLanes * cols_ + Vec::kLanes),
        rows_(deal, kLanes * cols_ + Vec::kLanes),
        counts_(deal, kLanes * stages_),
        starts_(deal, stages_ + 1),
        rectangle_(deal.threads, kLanes * kStage) {
    for (int t = 0; t < deal.threads; ++t) std::fill_n(rectangle_[t], kLanes * kStage, 0.0f);
  }

  static constexpr int64_t kWidest = kStage;

  int64_t block() const { return block_; }
  int64_t stage() const { return stage_; }
  int64_t panel_floats() const { return in_block_ * kStage * cols_; }

  void pack(const float* u, int64_t k0, int64_t k1, const SweepBlock& block) const {
    for (int64_t g = block.first; g < block.end; g += stage_) {
      const int64_t end = std::min(block.end, g + stage_);
      for (int64_t k = k0; k < std::min(k1, end); ++k) {
        float* out = panel_row(block, g, k);
        std::copy_n(u + k * cols_ + g, end - g, out);
        std::fill(out + (end - g), out + kStage, 0.0f);
      }
    }
  }

  float* column(int64_t s, const SweepBlock& block, int64_t c) const {
    return columns_[s] + (c - block.first) * kLanes;
  }

  StagePanel panel(const SweepBlock& block, int64_t g) const { return {panel_row(block, g, g)}; }

  void load(int64_t s, const SweepBlock& block, const float* w, const float* next, int64_t ld,
            int rows) const {
    if (block.first == 0) return load_strip(w, ld, rows, block.width(), columns_[s], kLanes);
    float* x = rectangle_.mine();
    const int64_t before = stage_of(block.first);
    // Rows of wider blocks the hardware foresees.
    const int64_t ahead = in_block_ == 1 ? next - w : 0;
    for (int64_t g = block.first; g < block.end; g += stage_, w += stage_) {
      const int64_t width = std::min(block.end - g, stage_);
      if (rows == kLanes && g + kStage <= cols_) {
        apply(s, block, g, 0, before, w, ld, ahead);
      } else {
        for (int r = 0; r < rows; ++r) std::copy_n(w + r * ld, width, x + r * kStage);
        apply(s, block, g, 0, before, x, kStage);
      }
      load_strip(x, kStage, kLanes, width, column(s, block, g), kLanes);
    }
  }

  // Applies the errors of the block's stages before the one of columns [g, end) to it.
  void catch_up(int64_t s, const SweepBlock& block, int64_t g, int64_t end) const {
    if (g == block.first) return;
    float* x = rectangle_.mine();
    store_strip(column(s, block, g), kLanes, kLanes, end - g, x, kStage);
    apply(s, block, g, stage_of(block.first), stage_of(g), x, kStage);
    load_strip(x, kStage, kLanes, end - g, column(s, block, g), kLanes);
  }

  // Takes the errors of columns [g, end), a whole stage, out of the strip.
  void record(int64_t s, const SweepBlock& block, int64_t g, int64_t end) const {
    if (end == cols_) return;
    float* x = rectangle_.mine();
    store_strip(column(s, block, g), kLanes, kLanes, end - g, x, kStage);
    const int64_t t = stage_of(g);
    int64_t* const starts = starts_[s];
    if (t == 0) starts[0] = 0;
    int64_t at = starts[t];
    for (int l = 0; l < kLanes; ++l) {
      const int64_t count = without_zeros(x + l * kStage, end - g, values_[s] + at, rows_[s] + at);
      counts_[s][t * kLanes + l] = static_cast<int32_t>(count);
      at += count;
    }
    starts[t + 1] = at;
  }

 private:
  const int64_t stage_, block_, cols_, in_block_, stages_;
  PerStrip<float> columns_;  // [block][lanes]: W from the current column on, E before it
  // The errors, stage by stage and row by row; which row of the stage's part of a panel each is for
  // (its offset there); how many a stage and row have; where a stage's begin.
  PerStrip<float> values_;
  PerStrip<uint16_t> rows_;
  PerStrip<int32_t> counts_;    // [stages][lanes]
  PerStrip<int64_t> starts_;    // [stages + 1]
  PerThread<float> rectangle_;  // [lanes][kStage]

  int64_t stage_of(int64_t column) const {
    return column / block_ * in_block_ + column % block_ / stage_;
  }
  int64_t column_of(int64_t stage) const {
    return stage / in_block_ * block_ + stage % in_block_ * stage_;
  }
  // U[k, g: g + stage] in the panel of the block, for a stage that starts at column g of it.
  float* panel_row(const SweepBlock& block, int64_t g, int64_t k) const {
    return block.data + ((g - block.first) / stage_ * cols_ + k) * kStage;
  }

  // rectangle = x - E U for the block's stage at column g and the errors of stages [t0, t1), of
  // which there are some; x [lanes][>= kStage columns] has a row stride of ld and may be the
  // rectangle. What lies `ahead` of x is fetched meanwhile: rows are short and far apart, and each
  // would be waited for.
  void apply(int64_t s, const SweepBlock& block, int64_t g, int64_t t0, int64_t t1, const float* x,
             int64_t ld, int64_t ahead = 0) const {
    float* out = rectangle_.mine();
    const float* const fetched = x + ahead;
    const int64_t apart = ld;
    for (int64_t t = t0; t < t1; ++t, x = out, ld = kStage) {
      const float* u = panel_row(block, g, column_of(t));
      const int64_t start = starts_[s][t];
      const float* values = values_[s] + start;
      const uint16_t* rows = rows_[s] + start;
      const int32_t* counts = counts_[s] + t * kLanes;
      for (int l = 0; l < kLanes; l += kTogether) {
        if (ahead != 0 && t == t0)
          for (int r = l; r < l + kTogether; ++r)
            for (int64_t c = 0; c < kStage; c += kLine)
              __builtin_prefetch(fetched + r * apart + c, 0, 2);
        subtract_rows(x + l * ld, ld, values, rows, counts + l, u, out + l * kStage);
      }
    }
  }

  // kTogether rows: out = x - the sum of values[i] times the row of u at offset rows[i], counts[r]
  // of them for row r. Moves on to what follows these values and rows.
  static void subtract_rows(const float* x, int64_t ld, const float*& values, const uint16_t*& rows,
                            const int32_t* counts, const float* u, float* out) {
    constexpr int L = Vec::kLanes;
    Vec acc[kTogether][kVecs];
    const auto subtract = [&](int r, int32_t i) {
      const Vec e = Vec::set1(values[r * counts[0] + i]);
      const float* row = u + rows[r * counts[0] + i];
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::fnma(e, Vec::load(row + v * L), acc[r][v]);
    };
#pragma GCC unroll 2
    for (int r = 0; r < kTogether; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = Vec::load(x + r * ld + v * L);
    const int32_t both = std::min(counts[0], counts[kTogether - 1]);
    for (int32_t i = 0; i < both; ++i)
#pragma GCC unroll 2
      for (int r = 0; r < kTogether; ++r) subtract(r, i);
#pragma GCC unroll 2
    for (int r = 0; r < kTogether; ++r) {
      for (int32_t i = both; i < counts[r]; ++i) subtract(r, i);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v].store(out + r * kStage + v * L);
    }
    for (int r = 0; r < kTogether; ++r) values += counts[r], rows += counts[r];
  }

  // Copies what is not zero of x[:n] to `values`, and its index times kStage to `rows`; returns how
  // many. May write up to n rounded up to whole vectors.
  static int64_t without_zeros(const float* x, int64_t n, float* values, uint16_t* rows) {
    int64_t count = 0;
#if defined(__AVX512F__)
    const __m512i step = _mm512_set1_epi32(Vec::kLanes * kStage);
    __m512i row =
        _mm512_mullo_epi32(_mm512_set1_epi32(kStage),
                           _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int64_t k = 0; k < n; k += Vec::kLanes, row = _mm512_add_epi32(row, step)) {
      const __mmask16 inside = n - k < Vec::kLanes ? (1u << (n - k)) - 1 : 0xffff;
      const __m512 e = _mm512_loadu_ps(x + k);
      const __mmask16 some = _mm512_mask_cmp_ps_mask(inside, e, _mm512_setzero_ps(), _CMP_NEQ_UQ);
      // To a register first: compressing to memory is many times slower on some processors.
      _mm512_storeu_si512(values + count, compress_dwords(some, _mm512_castps_si512(e)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + count),
                          _mm512_cvtepi32_epi16(compress_dwords(some, row)));
      count += __builtin_popcount(some);
    }
#elif defined(__AVX2__)
    for (int64_t k = 0; k < n; k += Vec::kLanes) {
      const unsigned inside = n - k < Vec::kLanes ? (1u << (n - k)) - 1 : 0xff;
      const __m256 e = _mm256_loadu_ps(x + k);
      const unsigned some =
          inside & _mm256_movemask_ps(_mm256_cmp_ps(e, _mm256_setzero_ps(), _CMP_NEQ_UQ));
      const auto kept = static_cast<uint8_t>(some);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + count),
                          compress_dwords(kept, _mm256_castps_si256(e)));
      const __m128i row = _mm_add_epi16(_mm_cvtepu8_epi16(kept_lanes(kept)),
                                        _mm_set1_epi16(static_cast<int16_t>(k)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(rows + count),
                       _mm_mullo_epi16(row, _mm_set1_epi16(kStage)));
      count += __builtin_popcount(some);
    }
#else
    for (int64_t k = 0; k < n; ++k) {
      values[count] = x[k];
      rows[count] = static_cast<uint16_t>(k * kStage);
      count += !(x[k] == 0.0f);
    }
#endif
    return count;
  }
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
