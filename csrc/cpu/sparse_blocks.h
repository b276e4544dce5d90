// Few rows of bf16 x where NEON multiplies bf16 (pairs_neon.h): every row of W is read once from
// memory, decoded in registers as bf16 numbers and zipped with its neighbour into blocks, which
// meet the blocks of all rows of x. A kernel of sparse_decode.h.
#pragma once

#include "cpu/simd.h"

#if defined(PYPRUNE_NEON)

#include "cpu/pairs_neon.h"
#include "cpu/sparse_decode.h"
#include "cpu/sparse_gemm.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// x rows up to which W is decoded in registers, for every sixteen of them anew; above, into tiles.
// By llvm-mca's cycles (Neoverse N2, V1, V2) a bitmap takes 0.63 to 0.78 of the tiles' at 16 rows,
// 0.90 to 0.97 at 24 and 0.89 to 0.97 at 32, and more than they do at 48.
constexpr int64_t kMaxBlockRows = 32;

template <class T, bool kRowsDense>
struct ColumnBlocks {
  using Value = T;
  static constexpr bool kDense = kRowsDense;
  static constexpr int kChunk = 16;
  static constexpr int64_t kSums = kMostFewRows * kChunk;
  // Rows of W that one turn decodes side by side; a block's last ones may be one row.
  static constexpr int kSide = 4;
  static constexpr int side(int) { return kSide; }
  // Pairs of rows of x; some numbers are rounded up, with zeros for the rows that are not there.
  static constexpr int pairs(int m) { return m <= 8 ? (m + 1) / 2 : m <= 12 ? 6 : 8; }
  static constexpr int lanes(int m) { return pairs(m); }

  // [C / 4][pairs][2][4], zeros past C.
  static void pack(const bf16* x, int64_t stride, int64_t m, int64_t cols, float* out) {
    const int64_t tokens = 2 * pairs(static_cast<int>(m));
    auto* to = reinterpret_cast<bf16*>(out);
    for (int64_t c = 0; c < mask_words(cols) * kMaskColumns; c += 4)
      for (int64_t t = 0; t < tokens; ++t, to += 4) {
        const int64_t left = t < m ? std::clamp<int64_t>(cols - c, 0, 4) : 0;
        if (left < 4) std::fill(to, to + 4, bf16{0});
        if (left == 4)
          std::memcpy(to, x + t * stride + c, 4 * sizeof(bf16));
        else if (left > 0)
          std::memcpy(to, x + t * stride + c, static_cast<size_t>(left) * sizeof(bf16));
      }
  }

  // Sums are [rows of W / 2][pairs] blocks.
  template <int M>
  static void multiply(const Weights& w, Cursor<T>* cursors, int64_t count, const float* x,
                       int64_t ahead, FetchAhead& fetch, float* sums) {
    multiply_pairs<pairs(M)>(w, cursors, count, x, ahead, fetch, sums);
  }

  template <class X>
  static void store(const float* sums, int64_t count, int64_t m, const float* scales,
                    const float* bias, X* y, int64_t y_stride) {
    const int64_t blocks = pairs(static_cast<int>(m));
    int64_t first = 0;
    for (; first + 8 <= count; first += 8)
      for (int64_t t = 0; t < m; t += 2) {
        const auto block = [&](int64_t r) {
          return vld1q_f32(sums + ((first + r) / 2 * blocks + t / 2) * 4);
        };
        const auto put = [&](int64_t i, Vec eight) {
          store_eight(eight, scales ? scales + first : nullptr, bias ? bias + first : nullptr,
                      y + (t + i) * y_stride + first);
        };
        put(0, {vuzp1q_f32(block(0), block(2)), vuzp1q_f32(block(4), block(6))});
        if (t + 1 < m) put(1, {vuzp2q_f32(block(0), block(2)), vuzp2q_f32(block(4), block(6))});
      }
    for (int64_t t = 0; t < m; ++t)
      for (int64_t r = first; r < count; ++r) {
        const float sum = sums[(r / 2 * blocks + t / 2) * 4 + r % 2 * 2 + t % 2];
        PYPRUNE_ISA::store(y + t * y_stride + r,
                           sum * (scales ? scales[r] : 1.0f) + (bias ? bias[r] : 0.0f));
      }
  }

 private:
  // What eight columns of a row are decoded to.
  using Eight = std::conditional_t<std::is_same_v<T, int8_t>, EightFloats, EightPairs>;
  static EightPairs load(const bf16* p) { return EightPairs::load(p); }
  static Vec load(const int8_t* p) { return expand8(p, 0xff); }

  template <int P>
  static void multiply_pairs(const Weights& w, Cursor<T>* cursors, int64_t count, const float* x,
                             int64_t ahead, FetchAhead& fetch, float* sums) {
    const int64_t n = mask_words(w.cols);
    std::fill(sums, sums + (count + kSide - 1) / kSide * kSide * P * 2, 0.0f);
    // For one or two rows of x all of it is a piece.
    const int64_t piece = P == 1 ? n : piece_words(P);
    for (int64_t i0 = 0; i0 < n; i0 += piece) {
      const int64_t i1 = std::min(n, i0 + piece);
      for (int64_t r = 0; r < count; r += kSide) {
        RowsAt<T, kSide> rows = {{}, {}, static_cast<const T*>(w.values) + w.nnz, w.cols};
        for (int64_t k = 0; k < kSide; ++k) {
          const Cursor<T>& cursor = cursors[std::min(r + k, count - 1)];
          rows.v[k] = cursor.v, rows.masks[k] = cursor.words;
        }
        if (ends(rows, i0, i1))
          words<P, true>(rows, i0, i1, x, ahead, fetch, sums + r * P * 2);
        else
          words<P, false>(rows, i0, i1, x, ahead, fetch, sums + r * P * 2);
        for (int64_t k = 0; k < std::min<int64_t>(kSide, count - r); ++k)
          cursors[r + k].v = rows.v[k];
      }
    }
  }

  // Whether what is read past the columns of words [i0, i1) may be past a row or the matrix.
  static bool ends(const RowsAt<T, kSide>& rows, int64_t i0, int64_t i1) {
    bool any = kDense && i1 * kMaskColumns > rows.cols;
    for (int r = 0; r < kSide; ++r) any |= rows.end - rows.v[r] < (i1 - i0) * kMaskColumns + 8;
    return any;
  }

  template <int P, bool kEnds>
  static void words(RowsAt<T, kSide>& rows, int64_t i0, int64_t i1, const float* x, int64_t ahead,
                    FetchAhead& fetch, float* sums) {
    // So many sums for each output: a sum alone would wait for itself.
    constexpr int kChains = P == 1 ? 4 : P <= 4 ? 2 : 1;
    constexpr int kFetch = std::min<int>(8, 8 / sizeof(T));  // steps from one line to the next
    float32x4_t acc[kSide / 2][P][kChains];
    const T* v[kSide];
    const uint8_t* masks[kSide];
#pragma GCC unroll 4
    for (int r = 0; r < kSide; ++r) {
      v[r] = rows.v[r];
      masks[r] = static_cast<const uint8_t*>(rows.masks[r]);
    }
#pragma GCC unroll 2
    for (int g = 0; g < kSide / 2; ++g)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        acc[g][p][0] = vld1q_f32(sums + (g * P + p) * 4);
#pragma GCC unroll 4
        for (int k = 1; k < kChains; ++k) acc[g][p][k] = vdupq_n_f32(0.0f);
      }
    x += i0 * 64 * P;
#pragma GCC unroll 1
    for (int64_t i = i0; i < i1; ++i) {
      if (!kDense) fetch.step();
      KeptWord kept[kSide];
#pragma GCC unroll 4
      for (int r = 0; !kDense && r < kSide; ++r) kept[r] = KeptWord(masks[r] + 8 * i);
#pragma GCC unroll 8
      for (int step = 0; step < 8; ++step, x += 8 * P) {
        decltype(Eight::expand(v[0], 0)) w[kSide];
#pragma GCC unroll 4
        for (int r = 0; r < kSide; ++r) {
          if constexpr (kDense) {
            const int64_t left = rows.cols - 64 * i - 8 * step;
            w[r] = kEnds && left < 8 ? spread_columns<Eight>(v[r], left, 0xff) : load(v[r]);
            v[r] += 8;
          } else {
            const uint8_t keep = kept[r].keep(step);
            const T* at = kept[r].take(v[r], step);
            w[r] = kEnds ? spread_columns<Eight>(at, rows.end - at, keep) : Eight::expand(at, keep);
          }
          if (kDense && step % kFetch == kFetch - 1)
            __builtin_prefetch(reinterpret_cast<const char*>(v[r]) + ahead, 0, 2);
        }
        TwoBlocks blocks[kSide / 2];
#pragma GCC unroll 2
        for (int g = 0; g < kSide / 2; ++g) blocks[g] = blocks_of(w[2 * g], w[2 * g + 1]);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          const uint16x8_t first = vreinterpretq_u16_f32(vld1q_f32(x + 4 * p));
          const uint16x8_t second = vreinterpretq_u16_f32(vld1q_f32(x + 4 * (P + p)));
#pragma GCC unroll 2
          for (int g = 0; g < kSide / 2; ++g) {
            float32x4_t& even = acc[g][p][2 * step % kChains];
            even = multiply_block(blocks[g].first, first, even);
            float32x4_t& odd = acc[g][p][(2 * step + 1) % kChains];
            odd = multiply_block(blocks[g].second, second, odd);
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kSide; ++r) rows.v[r] = v[r];
#pragma GCC unroll 2
    for (int g = 0; g < kSide / 2; ++g)
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        float32x4_t sum = acc[g][p][0];
#pragma GCC unroll 4
        for (int k = 1; k < kChains; ++k) sum = vaddq_f32(sum, acc[g][p][k]);
        vst1q_f32(sums + (g * P + p) * 4, sum);
      }
  }
};

// bf16 x times any format of W, whose values are bf16 numbers (T: bf16, int8).
template <class T>
void run_blocks(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  if (a.x.shape[0] > kMaxBlockRows) return run_multiply<AsBlocks<T>, bf16>(a, w, broken);
  if (w.format == WeightFormat::dense) return run_rows<ColumnBlocks<T, true>, bf16>(a, w, broken);
  run_rows<ColumnBlocks<T, false>, bf16>(a, w, broken);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
