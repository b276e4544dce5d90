// How few rows of x are packed for the kernels that multiply them with int8 or coded rows of W.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/sparse_bf16.h"
#include "cpu/widen_int8.h"

namespace pyprune {
namespace PYPRUNE_ISA {

// A Kernel whose x is packed one number for one: floats, or bf16 as it is given. kRuns: whether
// kWidenRun columns at a time stay neighbours.
template <class Number, bool kNeighbours>
struct OnePart {
  using T = Number;
  static constexpr int kParts = 1;
  static constexpr bool kRuns = kNeighbours;
  template <class X>
  static void part(X x, T* parts) {
    if constexpr (std::is_same_v<T, X>)
      parts[0] = x;
    else
      parts[0] = to_float(x);
  }
};

// `m` rows of x as Kernel reads them, [words][m][kParts][64] with zeros past `cols`: T, kParts,
// kRuns, part() and place(c), where column c of a word of 64 goes.
template <class Kernel, class X>
void pack_few(const X* x, int64_t stride, int64_t m, int64_t cols, int64_t words,
              typename Kernel::T* out) {
  constexpr int P = Kernel::kParts;
  for (int64_t c = 0; c < words * kMaskColumns; c += kMaskColumns)
    for (int64_t i = 0; i < m; ++i, out += P * kMaskColumns) {
      const int64_t width = std::clamp<int64_t>(cols - c, 0, kMaskColumns);
      if (width < kMaskColumns) std::memset(out, 0, P * kMaskColumns * sizeof(*out));
      const X* row = x + i * stride + c;
      int64_t j = 0;
      if constexpr (Kernel::kRuns && P == 1 && std::is_same_v<typename Kernel::T, X>)
        for (; j + kWidenRun <= width; j += kWidenRun)
          std::memcpy(out + Kernel::place(j), row + j, kWidenRun * sizeof(X));
      for (; j < width; ++j) {
        typename Kernel::T parts[P];
        Kernel::part(row[j], parts);
        for (int p = 0; p < P; ++p) out[p * kMaskColumns + Kernel::place(j)] = parts[p];
      }
    }
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
