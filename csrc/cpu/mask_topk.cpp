#include "cpu/mask_topk.h"

#include <algorithm>

#include "cpu/digits.h"
#include "cpu/mask_global.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// A row longer than this is selected by all threads together: it and its digits would leave the
// second-level cache.
constexpr int64_t kLongRow = 1 << 16;
// With fewer rows than threads, sharing a row pays from here on.
constexpr int64_t kSharedRow = 1 << 14;

// Row i alone as a problem of one tensor.
GlobalTensor one_row(const MaskTopkArgs& args, int64_t i) {
  const auto row = [i](const TensorView& v) {
    TensorView r = v;
    if (!v.data) return r;
    static const int64_t size[] = {4, 8, 2, 2, 1, 1, 4, 8, 1};  // bytes, in the order of DType
    r.data = static_cast<char*>(v.data) + i * v.stride[0] * size[static_cast<int>(v.dtype)];
    r.shape[0] = 1;
    return r;
  };
  const ScoreTerms& t = args.terms;
  return {row(args.mask),
          row(args.w),
          {t.column_scale, row(t.row_scale), row(t.addend), row(t.preserve)}};
}

// Work space of one thread for rows of `cols`.
struct RowBuffers {
  uint64_t* kept;  // bits of the columns that have the cut's digit and stay
  int16_t* digits;
  int32_t *columns, *keys, *scratch;

  static int64_t blocks(int64_t cols) { return (cols + kBlock - 1) / kBlock; }
  // In units of 8 bytes.
  static int64_t size(int64_t cols) {
    return blocks(cols) * (1 + kBlock / 4) + 2 * (cols + kSlack);
  }
  RowBuffers(uint64_t* memory, int64_t cols)
      : kept(memory),
        digits(reinterpret_cast<int16_t*>(kept + blocks(cols))),
        columns(reinterpret_cast<int32_t*>(digits + blocks(cols) * kBlock)),
        keys(columns + cols + kSlack),
        scratch(keys + cols + kSlack) {}
};

// Clears the first `count` of the set bits.
void clear_first(uint64_t* bits, int64_t count) {
  for (; count > 0; ++bits) {
    const int64_t set = __builtin_popcountll(*bits);
    if (set <= count) {
      *bits = 0;
    } else {
      for (int64_t k = 0; k < count; ++k) *bits &= *bits - 1;
    }
    count -= set;
  }
}

// The columns of the set bits, in order; returns their number.
int64_t columns_of(const uint64_t* bits, int64_t words, int32_t* columns) {
  int64_t n = 0;
  for (int64_t i = 0; i < words; ++i)
    for (uint64_t rest = bits[i]; rest; rest &= rest - 1)
      columns[n++] = static_cast<int32_t>(i * kBlock + __builtin_ctzll(rest));
  return n;
}

// Of the columns in `kept`, all of one digit, clears those of the `count` lowest scores.
template <class T>
void clear_lowest(const ScoreRow<T>& row, int64_t cols, int64_t count, const RowBuffers& at) {
  int32_t* const keys = at.keys;
  const int64_t n = columns_of(at.kept, RowBuffers::blocks(cols), at.columns);
  if (n > cols / 16) {  // many alike, as in a matrix that was pruned before
    score_keys(row, 0, cols, at.scratch);
    for (int64_t j = 0; j < n; ++j) keys[j] = at.scratch[at.columns[j]];
  } else {
    for (int64_t j = 0; j < n; ++j) keys[j] = key_at(row, at.columns[j]);
  }
  const Cut cut = find_cut(keys, n, count, at.scratch);
  int64_t ties = cut.ties;
  for (int64_t j = 0; j < n; ++j) {
    const bool tie = keys[j] == cut.key && ties > 0;
    ties -= tie;
    const uint64_t pruned = keys[j] < cut.key || tie;
    at.kept[at.columns[j] / kBlock] &= ~(pruned << at.columns[j] % kBlock);
  }
}

template <class T>
void prune_row(const ScoreRow<T>& row, int64_t cols, int64_t pruned, int64_t ahead,
               const RowBuffers& at, DigitGuess& guess, uint8_t* mask, bool stream) {
  // A bf16 magnitude is its digit: those of one digit are ties, but infinity and NaN share theirs.
  const bool exact =
      std::is_same_v<T, bf16> && !row.column_scale && !row.addend && !row.has_row_scale;
  const int64_t below = score_digits(row, cols, ahead, guess.digit, at.digits);
  DigitCut cut{kForbiddenDigit, 0, 0};
  if (pruned > 0) cut = find_digit(at.digits, cols, pruned, below, guess);
  const int64_t quota = pruned - cut.below;  // of those with the cut's digit
  const bool split = quota < cut.equal && cut.digit != kForbiddenDigit;
  if (split) {
    for (int64_t c = 0; c < cols; c += kBlock)
      at.kept[c / kBlock] = equal_bits(at.digits + c, cut.digit);
    if (exact && cut.digit < kMaxDigit)
      clear_first(at.kept, quota);
    else
      clear_lowest(row, cols, quota, at);
  }
  for (int64_t c = 0; c < cols; c += kBlock) {
    const uint64_t above = above_bits(at.digits + c, cut.digit);
    store_mask(mask + c, split ? above | at.kept[c / kBlock] : above, cols - c, stream);
  }
}

template <class T>
void short_rows(const MaskTopkArgs& args) {
  const int64_t rows = args.w.shape[0], cols = args.w.shape[1];
  const bool stream = streamed(args.mask);
  const int64_t size = RowBuffers::size(cols);
  const Scratch<uint64_t> memory(size * args.threads);
#pragma omp parallel num_threads(args.threads)
  {
    const RowBuffers buffers(memory.get() + size * thread_index(), cols);
    DigitGuess guess;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows; ++i) {
      const ScoreRow<T> row = score_row<T>(args.w, args.terms, i);
      prune_row(row, cols, args.pruned, args.w.stride[0], buffers, guess,
                args.mask.ptr<uint8_t>() + i * cols, stream);
    }
    finish_stores();
  }
}

}  // namespace

void mask_topk(const MaskTopkArgs& args) {
  const int64_t rows = args.w.shape[0], cols = args.w.shape[1];
  if (cols > kLongRow || (rows < args.threads && cols > kSharedRow)) {
    for (int64_t i = 0; i < rows; ++i) {
      const GlobalTensor row = one_row(args, i);
      mask_global({&row, 1, args.pruned, args.threads});
    }
    return;
  }
  with_float_type(args.w.dtype, [&](auto* tag) {
    short_rows<std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>>(args);
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
