#include "cpu/gram.h"

#include <algorithm>
#include <type_traits>

#include "cpu/gemm_tile.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// Side, in panels, of the square of blocks that is one thread's work item. A large item reads each
// packed panel less often (6 x 6 panels: one byte a cycle); but there
// should be some 4 items a thread, so that the threads end together.
int64_t item_side(int64_t panels, int threads) {
  int64_t items_across = 1;
  while (items_across * items_across < 8 * int64_t{threads}) ++items_across;
  return std::clamp<int64_t>(panels / items_across, 1, 6);
}

// One matrix of the batch, seen through its kept tokens.
struct Problem {
  float* out;
  int64_t n;
  const int64_t* rows;  // kept tokens (weight not zero) in order, or null: all
  int64_t tokens;       // how many
  const float* weight;  // null when every kept weight is one
};

// Block (pi, pj) of `out` is final: its mirror image below the diagonal is written while the block
// is still in the first-level cache.
void mirror_block(float* out, int64_t n, int64_t pi, int64_t pj) {
  constexpr int64_t kSquare = 16;  // one cache line of each row: both sides touch whole lines
  const int64_t r1 = std::min(n, (pi + 1) * kPanel), c1 = std::min(n, (pj + 1) * kPanel);
  for (int64_t c0 = pj * kPanel; c0 < c1; c0 += kSquare)
    for (int64_t r0 = pi * kPanel; r0 < r1; r0 += kSquare)
      for (int64_t c = c0; c < std::min(c1, c0 + kSquare); ++c)
        for (int64_t r = r0; r < std::min({r1, r0 + kSquare, c}); ++r)
          out[c * n + r] = out[r * n + c];
}

// Where chunk `chunk` of panel `i` of a round starts in the packed buffer.
inline int64_t panel_offset(int64_t chunk, int64_t panels, int64_t i) {
  return (chunk * panels + i) * kPanelFloats;
}

// The blocks of the upper triangle among panels [i0, i1) x [j0, j1), over `words` packed words of
// tokens.
template <class Words>
void multiply_item(const Problem& p, const float* a, const float* b, int64_t words, int64_t i0,
                   int64_t i1, int64_t j0, int64_t j1, bool last_round) {
  const int64_t panels = panels_of(p.n);
  for (int64_t k = 0; k < words; k += kDepth)
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t i = i0; i < std::min(i1, j + 1); ++i) {
        const int64_t r0 = i * kPanel, c0 = j * kPanel;
        panel_product<Words>(a + panel_offset(k / kDepth, panels, i),
                             b + panel_offset(k / kDepth, panels, j), std::min(kDepth, words - k),
                             static_cast<int>(std::min<int64_t>(kPanel, p.n - r0)),
                             static_cast<int>(std::min<int64_t>(kPanel, p.n - c0)), i == j,
                             AddTo{p.out + r0 * p.n + c0, p.n});
      }
  if (!last_round) return;
  for (int64_t j = j0; j < j1; ++j)
    for (int64_t i = i0; i < std::min(i1, j + 1); ++i) mirror_block(p.out, p.n, i, j);
}

// Item number `item` of the upper triangle of `side` x `side` items: those far from the diagonal
// first. They are the large ones, so that the threads end together.
void locate_item(int64_t item, int64_t side, int64_t* row, int64_t* column) {
  int64_t distance = side - 1;
  while (item >= side - distance) item -= side - distance--;
  *row = item;
  *column = item + distance;
}

// Round by round of tokens: all threads pack, then share out the items of the upper triangle. An
// item is one thread's within a round and its chunks follow in order, so the result does not
// depend on how items are shared out.
template <class Words, class T>
void accumulate(const Problem& p, const T* x, int64_t row_stride, int64_t columns,
                int64_t round_words, float* packed, float* packed_left, int threads) {
  const int64_t panels = panels_of(p.n), side = item_side(panels, threads);
  const int64_t item_rows = (panels + side - 1) / side;
  const RowSource<T> plain{x, row_stride, p.rows, nullptr, columns, p.n > columns};
  const RowSource<T> weighted{x, row_stride, p.rows, p.weight, columns, p.n > columns};
  const bool one_form = Words::kOneForm && !p.weight;
  const float* a = one_form ? packed : packed_left;
  const int64_t all = words_of<Words>(p.tokens);
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const typename Words::Scope scope;
    for (int64_t w0 = 0; w0 < all; w0 += round_words) {
      const int64_t words = std::min(round_words, all - w0);
      const int64_t chunks = (words + kDepth - 1) / kDepth;
#pragma omp for schedule(dynamic)
      for (int64_t q = 0; q < chunks * panels; ++q) {
        const int64_t k = q / panels * kDepth, c = q % panels * kPanel;
        const int64_t t0 = (w0 + k) * Words::kNumbers;
        const int64_t tokens = std::min(kDepth * Words::kNumbers, p.tokens - t0);
        Words::pack(plain, t0, tokens, c, packed + q * kPanelFloats);
        if constexpr (!Words::kOneForm)
          Words::pack_left(plain, t0, tokens, c, packed_left + q * kPanelFloats);
        else if (p.weight)
          pack_panel(weighted, t0, tokens, c, packed_left + q * kPanelFloats);
      }
#pragma omp for schedule(dynamic)
      for (int64_t item = 0; item < item_rows * (item_rows + 1) / 2; ++item) {
        int64_t i, j;
        locate_item(item, item_rows, &i, &j);
        multiply_item<Words>(p, a, packed, words, i * side, std::min(panels, (i + 1) * side),
                             j * side, std::min(panels, (j + 1) * side), w0 + words == all);
      }
    }
  }
}

// Lists the tokens of non-zero weight; returns how many, and whether any weight differs from one.
int64_t kept_tokens(const float* weight, int64_t tokens, int64_t* rows, bool* uneven) {
  int64_t kept = 0;
  *uneven = false;
  for (int64_t t = 0; t < tokens; ++t) {
    if (weight[t] == 0.0f) continue;
    *uneven |= weight[t] != 1.0f;
    rows[kept++] = t;
  }
  return kept;
}

}  // namespace

void gram(const GramArgs& args) {
  if (args.out.numel() == 0) return;  // no panel to share out
  const int64_t batch = args.x.shape[0], tokens = args.x.shape[1], columns = args.x.shape[2];
  const int64_t n = args.out.shape[1];
  const int64_t chunks = round_chunks(panels_of(n), tokens);
  const int64_t buffer = chunks * panels_of(n) * kPanelFloats;
  const FloatBuffer packed = float_buffer(buffer);
  const bool amx = args.x.dtype == DType::bf16 && current_isa() >= Isa::avx512_amx;
  const FloatBuffer packed_left = float_buffer(args.weight || amx ? buffer : 0);
  const std::unique_ptr<int64_t[]> rows(args.weight ? new int64_t[tokens] : nullptr);
  with_float_type(args.x.dtype, [&](auto* tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
    for (int64_t b = 0; b < batch; ++b) {
      Problem p{args.out.ptr<float>() + b * n * n, n, rows.get(), tokens, nullptr};
      if (args.weight) {
        const float* weight = args.weight->ptr<float>() + b * tokens;
        bool uneven;
        p.tokens = kept_tokens(weight, tokens, rows.get(), &uneven);
        p.weight = uneven ? weight : nullptr;
      }
      const auto run = [&](auto words) {
        accumulate<decltype(words)>(p, args.x.ptr<T>() + b * args.x.stride[0], args.x.stride[1],
                                    columns, chunks * kDepth, packed.get(), packed_left.get(),
                                    args.threads);
      };
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, bf16>)
        if (!p.weight && current_isa() >= Isa::avx512_bf16) {
          amx ? run(AmxWords()) : run(PairWords());
          continue;
        }
#elif defined(PYPRUNE_NEON)
      if constexpr (std::is_same_v<T, bf16>)
        if (!p.weight && current_isa() == Isa::neon_bf16) {
          run(BlockWords());
          continue;
        }
#endif
      run(FloatWords());
    }
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
