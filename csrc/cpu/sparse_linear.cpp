#include "cpu/sparse_linear.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>

#include "cpu/sparse_decode.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// One cache-line aligned allocation a call, shared out by the caller.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(std::aligned_alloc(64, static_cast<size_t>((bytes + 127) / 64 * 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  template <class U>
  U* as() const {
    return static_cast<U*>(data_);
  }

 private:
  void* data_;
};

inline void store(float* y, float value) { *y = value; }
inline void store(bf16* y, float value) {
  uint32_t u;
  std::memcpy(&u, &value, 4);
  // Round to nearest even; a NaN stays one (its low bits could otherwise carry into infinity).
  u = value != value ? (u | 0x400000u) : u + 0x7fffu + ((u >> 16) & 1);
  y->bits = static_cast<uint16_t>(u >> 16);
}

// Rows of W that one turn of the kernel decodes side by side: as many as their M sums each leave
// registers for.
constexpr int side_by_side(int m) { return m <= 4 ? 4 : 2; }

template <class T, bool kDense, int M, class X>
void decode(const SparseLinearArgs& a, const Weights& w, const float* x, uint64_t* words,
            std::atomic<int64_t>& broken) {
  constexpr int kSide = side_by_side(M);
  const int64_t n = mask_words(w.cols);
  const float* bias = a.bias ? a.bias->ptr<const float>() : nullptr;
  X* y = a.y.ptr<X>();
  const int64_t groups = (w.rows + kSide - 1) / kSide;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t r0 = g * kSide, count = std::min<int64_t>(kSide, w.rows - r0);
    uint64_t* masks = words + omp_get_thread_num() * kSide * n;
    bool sound = true;
    if (!kDense)
      for (int64_t r = 0; r < count; ++r)
        if (!row_mask(w, r0 + r, masks + r * n)) {
          broken.store(r0 + r, std::memory_order_relaxed);
          sound = false;
        }
    if (!sound) continue;
    float sums[kSide * M];
    if (count == kSide) {
      decode_rows<T, kDense, M, kSide>(w, r0, masks, x, sums);
    } else {
      for (int64_t r = 0; r < count; ++r)
        decode_rows<T, kDense, M, 1>(w, r0 + r, masks + r * n, x, sums + r * M);
    }
    for (int64_t r = 0; r < count; ++r)
      for (int m = 0; m < M; ++m)
        store(y + m * w.rows + r0 + r, sums[r * M + m] + (bias ? bias[r0 + r] : 0.0f));
  }
}

// Calls f with m (1 .. kMaxDecodeRows) as a constant.
template <class F, int M = kMaxDecodeRows>
void with_rows(int64_t m, F&& f) {
  if (m == M) {
    f(std::integral_constant<int, M>());
  } else if constexpr (M > 1) {
    with_rows<F, M - 1>(m, static_cast<F&&>(f));
  }
}

template <class T, class X>
void run(const SparseLinearArgs& a) {
  const Weights w(a);
  const int64_t n = mask_words(w.cols), padded = n * kMaskColumns;
  const int64_t block = std::min<int64_t>(a.x.shape[0], kMaxDecodeRows);
  const int64_t x_bytes = block * padded * 4, masks_bytes = a.threads * 4 * n * 8;
  Scratch scratch(x_bytes + masks_bytes);
  float* x = scratch.as<float>();
  uint64_t* words = reinterpret_cast<uint64_t*>(x + block * padded);
  std::atomic<int64_t> broken{-1};
  for (int64_t m0 = 0; m0 < a.x.shape[0]; m0 += kMaxDecodeRows) {
    const int64_t m = std::min(kMaxDecodeRows, a.x.shape[0] - m0);
    pack_decode<T>(a.x.ptr<const X>() + m0 * a.x.stride[0], a.x.stride[0], m, w.cols, x);
    SparseLinearArgs part = a;
    part.y.data = a.y.ptr<X>() + m0 * w.rows;
    with_rows(m, [&](auto rows) {
      constexpr int M = decltype(rows)::value;
      if (w.format == WeightFormat::dense)
        decode<T, true, M, X>(part, w, x, words, broken);
      else
        decode<T, false, M, X>(part, w, x, words, broken);
    });
  }
  if (broken.load() >= 0)
    throw std::invalid_argument("bitmap: row " + std::to_string(broken.load()) +
                                " has bits that do not match its row_offsets");
}

}  // namespace

void sparse_linear(const SparseLinearArgs& args) {
#if defined(__AVX512F__)
  if (!__builtin_cpu_supports("avx512vbmi2")) return avx2::sparse_linear(args);
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
