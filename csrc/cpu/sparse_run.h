// What the drivers of the compressed products share: scratch memory, checked masks, rounding of the
// output, and the choice of a kernel by the number of rows of x.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/sparse_rows.h"

namespace pyprune {
namespace PYPRUNE_ISA {

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

// The masks of rows [r0, r0 + count); false, and the row noted, when one is inconsistent.
inline bool block_masks(const Weights& w, int64_t r0, int64_t count, uint64_t* words,
                        std::atomic<int64_t>* broken) {
  bool sound = true;
  for (int64_t r = 0; r < count; ++r)
    if (!row_mask(w, r0 + r, words + r * mask_words(w.cols))) {
      broken->store(r0 + r, std::memory_order_relaxed);
      sound = false;
    }
  return sound;
}

// Calls f with m, one of kMost, kMost - kStep, ... above zero, as a constant.
template <int kMost, int kStep = 1, class F>
void with_rows(int64_t m, F&& f) {
  if (m == kMost) {
    f(std::integral_constant<int, kMost>());
  } else if constexpr (kMost > kStep) {
    with_rows<kMost - kStep, kStep>(m, static_cast<F&&>(f));
  }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
