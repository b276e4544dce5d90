#include "cpu/mask_topk.h"

#include <algorithm>

#include "cpu/mask_global.h"
#include "cpu/score.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// A row longer than this is selected by all threads together: its keys (1 MiB with the work space
// of find_cut) would leave the second-level cache.
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

template <class T>
void short_rows(const MaskTopkArgs& args) {
  const int64_t rows = args.w.shape[0], cols = args.w.shape[1];
  const int64_t scratch_size = 3 * (cols + kSlack);
  const Scratch<int32_t> buffers(scratch_size * args.threads);
#pragma omp parallel num_threads(args.threads)
  {
    int32_t* const keys = buffers.get() + scratch_size * thread_index();
    int32_t* const scratch = keys + cols + kSlack;
    Guess guess;
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < rows; ++i) {
      const ScoreRow<T> row = score_row<T>(args.w, args.terms, i);
      score_keys(row, 0, cols, keys, i + 1 < rows ? row.w + args.w.stride[0] : nullptr);
      Cut cut{kForbiddenKey, 0};
      if (args.pruned) cut = find_cut(keys, cols, args.pruned, scratch, &guess);
      write_mask(keys, cols, cut, args.mask.ptr<uint8_t>() + i * cols);
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
