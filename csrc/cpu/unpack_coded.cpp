// Rows of a coded matrix as bf16: all of them, or those that are looked up.
#include <omp.h>

#include <atomic>

#include "cpu/coded_rows.h"
#include "huge_pages.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// False when the row's codes and offsets disagree.
bool unpack_row(const CodedMatrix& w, int64_t r, bf16* out) {
  CodedRow row = w.row(r);
  const int64_t whole = w.cols / kMaskColumns * kMaskColumns;
  decode(row, whole, out);
  if (whole < w.cols) {
    bf16 last[kMaskColumns];
    decode(row, w.cols - whole, last);
    std::copy(last, last + (w.cols - whole), out + whole);
  }
  return row.complete();
}

void run(const UnpackCodedArgs& a) {
  prefer_huge_pages(a.out, sizeof(bf16));
  const CodedMatrix w(a.w);
  const int64_t n = a.out.shape[0];
  const int64_t* rows = a.rows ? a.rows->ptr<const int64_t>() : nullptr;
  for (int64_t i = 0; rows && i < n; ++i)
    if (rows[i] < 0 || rows[i] >= w.rows)
      throw std::out_of_range("rows: expected numbers from 0 to " + std::to_string(w.rows - 1) +
                              ", got " + std::to_string(rows[i]));
  std::atomic<int64_t> broken{-1};
  bf16* out = a.out.ptr<bf16>();
  // A few rows are decoded sooner than other threads are woken.
#pragma omp parallel for schedule(static) num_threads(a.threads) if (n * w.cols > 65536)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t r = rows ? rows[i] : i;
    if (!unpack_row(w, r, out + i * w.cols)) broken.store(r, std::memory_order_relaxed);
  }
  if (broken.load() >= 0) refuse_row(broken.load());
}

}  // namespace

void unpack_coded(const UnpackCodedArgs& args) {
#if defined(__AVX512F__)
  if (!processor().moves_bytes) return avx2::unpack_coded(args);
#endif
  run(args);
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
