#include "cpu/fisher_accumulate.h"

#include <algorithm>
#include <type_traits>

#include "cpu/gemm_tile.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// Panels along each side of the part of the gradient that is worked on at a time: 2304 x 2304
// values (AVX-512), 21 MB of partial sums however large the weight is. Operands are packed once a
// part, which costs 2 packed values for 2304 multiply-adds.
constexpr int64_t kPartPanels = 48;

constexpr int64_t kBlockFloats = int64_t{kPanel} * kPanel;

// Panels [r0, r0 + rows) x [c0, c0 + columns) of the gradient.
struct Part {
  int64_t r0, rows, c0, columns;
  float* sums;    // one kPanel x kPanel block after the other
  float* packed;  // of every chunk: the panels of G, then those of X
  int64_t panels() const { return rows + columns; }
};

// Partial sums of one block; its first chunk overwrites what an earlier sequence left.
struct AccumulateBlock {
  float* block;
  bool first;
  void prefetch(int row, int) const { prefetch_row(block + row * kPanel); }
  void operator()(int row, int column, int, Vec value) const {
    float* p = block + row * kPanel + column;
    (first ? value : Vec::load(p) + value).store(p);
  }
};

// acc[r, c] += |scale * sum| or its square over one finished m x n block.
void add_magnitude(const float* block, int64_t m, int64_t n, int power, float scale, float* acc,
                   int64_t ld) {
  const Vec s = Vec::set1(scale);
  for (int64_t r = 0; r < m; ++r, block += kPanel, acc += ld) {
    int64_t c = 0;
    for (; c + Vec::kLanes <= n; c += Vec::kLanes) {
      const Vec v = Vec::load(block + c) * s;
      (Vec::load(acc + c) + (power == 1 ? Vec::abs(v) : v * v)).store(acc + c);
    }
    for (; c < n; ++c) {
      const float v = block[c] * scale;
      acc[c] += power == 1 ? __builtin_fabsf(v) : v * v;
    }
  }
}

// Blocks [i0, i1) x [j0, j1) of the part over one round of packed words of tokens.
template <class Words>
void multiply_item(const FisherAccumulateArgs& args, const Part& part, int64_t words, int64_t i0,
                   int64_t i1, int64_t j0, int64_t j1, bool first_round, bool last_round) {
  const int64_t rows = args.acc.shape[0], columns = args.acc.shape[1];
  const auto size = [](int64_t all, int64_t panel) {
    return static_cast<int>(std::min<int64_t>(kPanel, all - panel * kPanel));
  };
  for (int64_t k = 0; k < words; k += kDepth)
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t i = i0; i < i1; ++i) {
        const float* chunk = part.packed + k / kDepth * part.panels() * kPanelFloats;
        panel_product<Words>(chunk + i * kPanelFloats, chunk + (part.rows + j) * kPanelFloats,
                             std::min(kDepth, words - k), size(rows, part.r0 + i),
                             size(columns, part.c0 + j), false,
                             AccumulateBlock{part.sums + (i * part.columns + j) * kBlockFloats,
                                             first_round && k == 0});
      }
  if (!last_round) return;
  for (int64_t i = i0; i < i1; ++i)
    for (int64_t j = j0; j < j1; ++j) {
      const int64_t r = (part.r0 + i) * kPanel, c = (part.c0 + j) * kPanel;
      add_magnitude(part.sums + (i * part.columns + j) * kBlockFloats, size(rows, part.r0 + i),
                    size(columns, part.c0 + j), args.power, args.scale,
                    args.acc.ptr<float>() + r * columns + c, columns);
    }
}

// Side, in panels, of the square of blocks that is one thread's work item: as large as leaves some
// 4 items a thread.
int64_t item_side(const Part& part, int threads) {
  int64_t side = 6;
  const auto items = [&](int64_t s) {
    return ((part.rows + s - 1) / s) * ((part.columns + s - 1) / s);
  };
  while (side > 1 && items(side) < 4 * int64_t{threads}) --side;
  return side;
}

template <class T>
RowSource<T> sequence(const TensorView& t, int64_t n) {
  return {t.ptr<T>() + n * t.stride[0], t.stride[1], nullptr, nullptr, t.shape[2], false};
}

// One part, sequence by sequence and round by round of tokens: all threads pack, then share out
// the items. A block's chunks follow in order whoever computes it.
template <class T, class Words>
void accumulate_part(const FisherAccumulateArgs& args, const Part& part, int64_t round_words) {
  const int64_t all_tokens = args.x.shape[1], all = words_of<Words>(all_tokens);
  const int64_t side = item_side(part, args.threads);
  const int64_t across = (part.columns + side - 1) / side;
  const int64_t items = (part.rows + side - 1) / side * across;
#pragma omp parallel num_threads(args.threads)
  {
    [[maybe_unused]] const typename Words::Scope scope;
    for (int64_t s = 0; s < args.x.shape[0]; ++s)
      for (int64_t w0 = 0; w0 < all; w0 += round_words) {
        const int64_t words = std::min(round_words, all - w0);
        const int64_t chunks = (words + kDepth - 1) / kDepth;
#pragma omp for schedule(dynamic)
        for (int64_t q = 0; q < chunks * part.panels(); ++q) {
          const int64_t k = q / part.panels() * kDepth, i = q % part.panels();
          const int64_t t0 = (w0 + k) * Words::kNumbers;
          const int64_t tokens = std::min(kDepth * Words::kNumbers, all_tokens - t0);
          float* panel = part.packed + q * kPanelFloats;
          if (i >= part.rows)
            Words::pack(sequence<T>(args.x, s), t0, tokens, (part.c0 + i - part.rows) * kPanel,
                        panel);
          else if constexpr (Words::kOneForm)
            Words::pack(sequence<T>(args.g, s), t0, tokens, (part.r0 + i) * kPanel, panel);
          else
            Words::pack_left(sequence<T>(args.g, s), t0, tokens, (part.r0 + i) * kPanel, panel);
        }
#pragma omp for schedule(dynamic)
        for (int64_t item = 0; item < items; ++item) {
          const int64_t i = item / across * side, j = item % across * side;
          multiply_item<Words>(args, part, words, i, std::min(part.rows, i + side), j,
                               std::min(part.columns, j + side), w0 == 0, w0 + words == all);
        }
      }
  }
}

// Panels of a part along a side of `panels`: equal parts, none over kPartPanels.
int64_t part_side(int64_t panels) {
  const int64_t parts = (panels + kPartPanels - 1) / kPartPanels;
  return (panels + parts - 1) / parts;
}

}  // namespace

void fisher_accumulate(const FisherAccumulateArgs& args) {
  if (args.acc.numel() == 0) return;  // no panel to share out
  const int64_t rows = panels_of(args.acc.shape[0]), columns = panels_of(args.acc.shape[1]);
  const int64_t side_r = part_side(rows), side_c = part_side(columns);
  const int64_t chunk_floats = (side_r + side_c) * kPanelFloats;
  const int64_t chunks = round_chunks(side_r + side_c, args.x.shape[1]);
  const FloatBuffer packed = float_buffer(chunks * chunk_floats);
  const FloatBuffer sums = float_buffer(side_r * side_c * kBlockFloats);
  with_float_type(args.x.dtype, [&](auto* tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
    const auto run = [&](auto words) {
      for (int64_t r = 0; r < rows; r += side_r)
        for (int64_t c = 0; c < columns; c += side_c)
          accumulate_part<T, decltype(words)>(
              args,
              {r, std::min(side_r, rows - r), c, std::min(side_c, columns - c), sums.get(),
               packed.get()},
              chunks * kDepth);
    };
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, bf16>)
      if (current_isa() >= Isa::avx512_bf16)
        return current_isa() >= Isa::avx512_amx ? run(AmxWords()) : run(PairWords());
#elif defined(PYPRUNE_NEON)
    if constexpr (std::is_same_v<T, bf16>)
      if (current_isa() == Isa::neon_bf16) return run(BlockWords());
#endif
    run(FloatWords());
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
