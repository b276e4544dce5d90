// AMX: matrix tiles of 16 rows of 64 bytes, and their products of bf16 pairs, 16 x 16 x 32 an
// instruction. Assembly, as this is compiled for AVX-512's common subset.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__)

namespace pyprune {
namespace PYPRUNE_ISA {

constexpr int kAmxRows = 16;   // of a tile
constexpr int kAmxWords = 16;  // of a row: a float, or a pair of bf16

// While it lives its thread's eight tiles are configured, each of 16 rows of 64 bytes; afterwards
// they are as after start, so that whatever else uses them configures them anew.
class AmxTiles {
 public:
  explicit AmxTiles(bool used) : used_(used) {
    if (!used_) return;
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int t = 0; t < 8; ++t) {
      config[16 + 2 * t] = 4 * kAmxWords;
      config[48 + t] = kAmxRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  ~AmxTiles() {
    if (used_) asm volatile("tilerelease");
  }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  bool used_;
};

// Rows of memory are `stride` words apart.
template <int kTile>
inline void amx_load(const float* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(4 * stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void amx_store(float* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(4 * stride), "i"(kTile) : "memory");
}
// sum[m][n] += the products of the pairs in w[m][k] and x[k][n], over the words k.
template <int kSum, int kW, int kX>
inline void amx_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kW), "i"(kX));
}

// What a block's loops are unrolled over: 0, 1, ..., n - 1 as constants.
template <class F, int... I>
inline void amx_each(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>()), ...);
}

// sums[16 R][16 V] += W [16 R][depth] times x [depth][16 V], all in words; W's columns come by 16,
// `w_step` words apart. `between` is called before each of the depth / 16 steps. R x V sums, at
// most six, stay in tiles; a product takes 16 cycles and a load eight, of which there are V + R V
// for R V products.
template <int R, int V, class Between>
inline void amx_block(const float* w, int64_t w_stride, int64_t w_step, const float* x,
                      int64_t x_stride, int64_t depth, float* sums, int64_t sums_stride,
                      Between&& between) {
  static_assert(R * V <= 6, "two tiles for the factors");
  using Sums = std::make_integer_sequence<int, R * V>;
  const auto place = [&](int i) { return i / V * kAmxRows * sums_stride + i % V * kAmxWords; };
  amx_each(Sums(), [&](auto i) { amx_load<decltype(i)::value>(sums + place(i), sums_stride); });
  for (int64_t k = 0; k < depth; k += kAmxWords, w += w_step) {
    between();
    amx_each(std::make_integer_sequence<int, V>(), [&](auto v) {
      amx_load<7>(x + k * x_stride + v * kAmxWords, x_stride);
      amx_each(std::make_integer_sequence<int, R>(), [&](auto r) {
        amx_load<6>(w + r * kAmxRows * w_stride, w_stride);
        amx_product<decltype(r)::value * V + decltype(v)::value, 6, 7>();
      });
    });
  }
  amx_each(Sums(), [&](auto i) { amx_store<decltype(i)::value>(sums + place(i), sums_stride); });
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune

#endif
