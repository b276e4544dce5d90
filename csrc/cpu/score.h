// Pruning scores as order-preserving integer keys.
//
//   score = |w[i,j] * (column_scale[j] + addend[i,j]) * row_scale[i]|     in fp32, in this order
//
// A non-negative float compares like its bit pattern, so a key is the pattern. All NaNs share one
// key above infinity's, and -1 is left for positions that must stay pruned. Everything here lives
// in PYPRUNE_ISA: each instruction set gets its own copy.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/simd.h"
#include "score_terms.h"

namespace pyprune {

namespace PYPRUNE_ISA {

constexpr uint32_t kNanBits = 0x7f800001u;  // the lowest of them: all others are lowered to it
constexpr int32_t kForbiddenKey = -1;
constexpr int32_t kMaxKey = static_cast<int32_t>(kNanBits);

// Key buffers end with this much slack so that a whole vector may be stored at their last element.
constexpr int64_t kSlack = 16;

// Uninitialised memory owned by one call. std::vector would emit symbols that the three
// instruction sets share.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t n) : data_(static_cast<T*>(std::malloc(n * sizeof(T) + 64))) {
    if (!data_) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

inline int64_t thread_index() { return omp_get_thread_num(); }

// One row of a weight matrix with its terms.
template <class T>
struct ScoreRow {
  const T* w;
  const float* column_scale;
  const float* addend;
  const uint8_t* preserve;
  float row_scale;
  bool has_row_scale;
};

template <class T>
inline ScoreRow<T> score_row(const TensorView& w, const ScoreTerms& t, int64_t i) {
  const auto at = [i](const TensorView& v) { return i * v.stride[0]; };
  return {w.ptr<T>() + at(w),
          t.column_scale.ptr<float>(),
          t.addend.data ? t.addend.ptr<float>() + at(t.addend) : nullptr,
          t.preserve.data ? t.preserve.ptr<uint8_t>() + at(t.preserve) : nullptr,
          t.row_scale.data ? t.row_scale.ptr<float>()[i] : 1.0f,
          t.row_scale.data != nullptr};
}

inline int32_t key_of(float score) {
  uint32_t bits;
  std::memcpy(&bits, &score, 4);
  bits &= 0x7fffffffu;
  return static_cast<int32_t>(bits > kNanBits ? kNanBits : bits);
}

// The key of column c.
template <class T>
inline int32_t key_at(const ScoreRow<T>& row, int64_t c) {
  float s = to_float(row.w[c]);
  if (row.column_scale || row.addend) {
    float f = row.column_scale ? row.column_scale[c] : row.addend[c];
    if (row.column_scale && row.addend) f += row.addend[c];
    s *= f;
  }
  if (row.has_row_scale) s *= row.row_scale;
  return !row.preserve || row.preserve[c] ? key_of(s) : kForbiddenKey;
}

// A vector of keys, Vec::kLanes of them.
#if defined(__AVX512F__)
using KeyVec = __m512i;
inline KeyVec key_vector(Vec score) {
  const __m512i bits =
      _mm512_and_si512(_mm512_castps_si512(score.v), _mm512_set1_epi32(0x7fffffff));
  return _mm512_min_epu32(bits, _mm512_set1_epi32(kNanBits));
}
inline KeyVec forbid(KeyVec keys, const uint8_t* preserve) {
  const __m128i p = _mm_loadu_si128(reinterpret_cast<const __m128i*>(preserve));
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(kForbiddenKey), _mm_test_epi8_mask(p, p), keys);
}
inline void store(int32_t* out, KeyVec keys) { _mm512_storeu_si512(out, keys); }
inline KeyVec load_keys(const int32_t* keys) { return _mm512_loadu_si512(keys); }
#elif defined(__AVX2__)
using KeyVec = __m256i;
inline KeyVec key_vector(Vec score) {
  const __m256i bits =
      _mm256_and_si256(_mm256_castps_si256(score.v), _mm256_set1_epi32(0x7fffffff));
  return _mm256_min_epu32(bits, _mm256_set1_epi32(kNanBits));
}
inline KeyVec forbid(KeyVec keys, const uint8_t* preserve) {
  const __m256i p =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(preserve)));
  return _mm256_or_si256(keys, _mm256_cmpeq_epi32(p, _mm256_setzero_si256()));
}
inline void store(int32_t* out, KeyVec keys) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), keys);
}
inline KeyVec load_keys(const int32_t* keys) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys));
}
#elif defined(PYPRUNE_NEON)
struct KeyVec {
  int32x4_t a, b;
};
inline KeyVec key_vector(Vec score) {
  const auto keys = [](float32x4_t v) {
    const uint32x4_t bits = vbicq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x80000000u));
    return vreinterpretq_s32_u32(vminq_u32(bits, vdupq_n_u32(kNanBits)));
  };
  return {keys(score.a), keys(score.b)};
}
inline KeyVec forbid(KeyVec keys, const uint8_t* preserve) {
  const uint8x8_t p = vld1_u8(preserve);
  const int16x8_t gone = vmovl_s8(vreinterpret_s8_u8(vceqz_u8(p)));  // -1, which forbids
  return {vorrq_s32(keys.a, vmovl_s16(vget_low_s16(gone))),
          vorrq_s32(keys.b, vmovl_high_s16(gone))};
}
inline void store(int32_t* out, KeyVec keys) { vst1q_s32(out, keys.a), vst1q_s32(out + 4, keys.b); }
#else
struct KeyVec {
  int32_t v[Vec::kLanes];
};
inline KeyVec key_vector(Vec score) {
  KeyVec keys;
  for (int i = 0; i < Vec::kLanes; ++i) keys.v[i] = key_of(score.v[i]);
  return keys;
}
inline KeyVec forbid(KeyVec keys, const uint8_t* preserve) {
  for (int i = 0; i < Vec::kLanes; ++i) keys.v[i] = preserve[i] ? keys.v[i] : kForbiddenKey;
  return keys;
}
inline void store(int32_t* out, KeyVec keys) { std::memcpy(out, keys.v, sizeof keys.v); }
#endif

// Which terms a loop is compiled for: magnitude and Wanda have their own, all others share one.
enum class TermSet { none, columns, any };

template <class T, class F>
inline void with_term_set(const ScoreRow<T>& row, F&& f) {
  if (row.addend || row.preserve || row.has_row_scale)
    f(std::integral_constant<TermSet, TermSet::any>());
  else if (row.column_scale)
    f(std::integral_constant<TermSet, TermSet::columns>());
  else
    f(std::integral_constant<TermSet, TermSet::none>());
}

// The signed scores of the columns from c.
template <TermSet kTerms, class T>
inline Vec score_at(const ScoreRow<T>& row, int64_t c) {
  Vec s = Vec::load(row.w + c);
  if constexpr (kTerms == TermSet::columns) s = s * Vec::load(row.column_scale + c);
  if constexpr (kTerms == TermSet::any) {
    if (row.column_scale || row.addend) {
      Vec f = row.column_scale ? Vec::load(row.column_scale + c) : Vec::load(row.addend + c);
      if (row.column_scale && row.addend) f = f + Vec::load(row.addend + c);
      s = s * f;
    }
    if (row.has_row_scale) s = s * Vec::set1(row.row_scale);
  }
  return s;
}

// The keys of the columns from c.
template <TermSet kTerms, class T>
inline KeyVec keys_at(const ScoreRow<T>& row, int64_t c) {
  const KeyVec keys = key_vector(score_at<kTerms>(row, c));
  if constexpr (kTerms == TermSet::any)
    if (row.preserve) return forbid(keys, row.preserve + c);
  return keys;
}

// Columns that a loop handles at a time.
constexpr int64_t kBlock = 64;

// Fetches into the second-level cache the weights `ahead` elements after a block. The address may
// lie behind the last one: a prefetch of it does nothing.
template <class T>
inline void fetch_block(const T* block, int64_t ahead) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block) + ahead * sizeof(T);
  for (size_t b = 0; b < kBlock * sizeof(T); b += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(begin + b), 0, 2);
}

// The keys that do not fill a block. Out of line: it is not worth a copy in every caller.
template <class T>
__attribute__((noinline)) void score_rest(const ScoreRow<T>& row, int64_t c, int64_t c1,
                                          int32_t* out) {
  for (; c < c1; ++c) *out++ = key_at(row, c);
}

// Keys of columns [c0, c1) of a row. Callers compute on them before they come back for more, and
// the hardware's prefetcher has nothing to follow meanwhile: what lies kAhead further is fetched
// here. In a matrix without gaps that includes the next row.
constexpr int64_t kAhead = 4096;
template <class T>
inline void score_keys(const ScoreRow<T>& row, int64_t c0, int64_t c1, int32_t* out) {
  const int64_t blocks_end = c1 - (c1 - c0) % kBlock;
  with_term_set(row, [&](auto terms) {
    for (int64_t c = c0; c < blocks_end; c += kBlock) {
      fetch_block(row.w + c, kAhead);
      for (int64_t v = c; v < c + kBlock; v += Vec::kLanes)
        store(out + (v - c0), keys_at<decltype(terms)::value>(row, v));
    }
  });
  if (blocks_end < c1) score_rest(row, blocks_end, c1, out + (blocks_end - c0));
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
