#include "cpu/sparse_linear.h"

#include <atomic>
#include <string>
#include <type_traits>

#include "cpu/bitmap_table.h"
#include "cpu/sparse_bf16.h"
#include "cpu/sparse_decode.h"
#include "cpu/sparse_gather.h"
#include "cpu/sparse_table.h"
#if defined(__AVX512F__) || defined(PYPRUNE_SHUFFLES)
#include "cpu/sparse_gemm.h"
#endif
#if defined(PYPRUNE_NEON)
#include "cpu/sparse_blocks.h"
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
#include "cpu/sparse_gather_avx2.h"
#include "cpu/sparse_panels.h"
#endif

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

#if defined(__AVX512F__)

// Kernels for processors with AVX-512; true if one of them took the work.
template <class T, class X>
bool run_avx512(const SparseLinearArgs& a, const Weights& w, std::atomic<int64_t>* broken) {
  constexpr bool kBothBf16 = std::is_same_v<T, bf16> && std::is_same_v<X, bf16>;
  const int64_t m = a.x.shape[0];
  // Products of bf16 pairs; fp32 activations take three of them each.
  const bool pairs = std::is_same_v<T, bf16> && current_isa() >= Isa::avx512_bf16;
  const bool is_24 = a.format == WeightFormat::sparse24;
  if constexpr (kBothBf16) {
    if (pairs && current_isa() >= Isa::avx512_amx && m > kBeforeTiles)
      return run_multiply<AsPairs, X>(a, w, broken), true;
    const int64_t dot_rows = a.format == WeightFormat::dense ? kDotRowsDense : kDotRowsBitmap;
    if (pairs && is_24 && m > kGatherPairRows) return run_table<Source24<bf16>, X>(a, w), true;
    if (pairs && is_24) return run_gather<GatherBf16, X>(a, w), true;
    if (pairs && a.format == WeightFormat::bitmap && tables_pay(w, m))
      return run_table<BitmapSource<bf16>, X>(a, w, broken), true;
    if (pairs && m > dot_rows) return run_multiply<AsPairs, X>(a, w, broken), true;
    if (pairs) return run_dot<X>(a, w, broken), true;
  }
  if (is_24 && m > kSplitRows && gathers<GatherFloat<T>>(m, w.cols))
    return run_gather<GatherFloat<T>, X>(a, w), true;
  if constexpr (std::is_same_v<T, bf16>)
    if (pairs && m <= kSplitRows) return run_dot<X>(a, w, broken), true;
  return false;
}

#endif

template <class T, class X>
void run(const SparseLinearArgs& a) {
  const Weights w(a);
  std::atomic<int64_t> broken{-1};
  bool done = false;
#if defined(__AVX512F__)
  done = run_avx512<T, X>(a, w, &broken);
#elif defined(__AVX2__)
  done = a.format == WeightFormat::sparse24 && a.x.shape[0] <= kMostGatherRows<T>;
  if (done) run_gather_avx2<T, X>(a, w);
  if (!done && lists_pay(w, a.x.shape[0])) run_panels<T, X>(a, w, &broken), done = true;
#elif defined(PYPRUNE_NEON)
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<X, bf16>) {
    done = current_isa() == Isa::neon_bf16;
    if (done) run_blocks<T>(a, w, &broken);
  }
#endif
#if defined(__AVX512F__) || defined(PYPRUNE_SHUFFLES)
  if (!done && a.x.shape[0] > kMaxDecodeRows)
    run_multiply<AsFloats<T>, X>(a, w, &broken), done = true;
#endif
  if (!done) run_decode<T, X>(a, w, &broken);
  if (broken.load() >= 0)
    throw std::invalid_argument("bitmap: row " + std::to_string(broken.load()) +
                                " has bits that do not match its row_offsets");
}

}  // namespace

void sparse_linear(const SparseLinearArgs& args) {
#if defined(__AVX512F__)
  if (!processor().moves_bytes) return avx2::sparse_linear(args);
#endif
  with_float_type(args.values.dtype, [&](auto* tag) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(tag)>>;
    if (args.x.dtype == DType::f32)
      run<T, float>(args);
    else
      run<T, bf16>(args);
  });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
