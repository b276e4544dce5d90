// Rows of a compressed matrix: their column masks, and their values spread out to full width.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "cpu/expand.h"
#include "cpu/fetch_ahead.h"
#include "cpu/simd.h"
#include "cpu/sparse_linear.h"
#if defined(PYPRUNE_SHUFFLES)
#include "cpu/sparse_spread.h"
#endif

namespace pyprune {
namespace PYPRUNE_ISA {

// Columns are handled 64 at a time: one machine word of mask. Buffers are padded to that.
constexpr int64_t kMaskColumns = 64;
inline int64_t mask_words(int64_t cols) { return (cols + kMaskColumns - 1) / kMaskColumns; }

// A compressed matrix by its raw pointers. `meta` rows are `meta_stride` bytes apart.
struct Weights {
  WeightFormat format;
  const void* values;
  const uint8_t* meta;
  const int64_t* offsets;
  int64_t rows, cols, nnz, meta_stride;  // nnz: elements of `values`

  explicit Weights(const SparseLinearArgs& a)
      : format(a.format),
        values(a.values.data),
        meta(a.meta ? a.meta->ptr<const uint8_t>() : nullptr),
        offsets(a.offsets ? a.offsets->ptr<const int64_t>() : nullptr),
        rows(a.rows),
        cols(a.cols),
        nnz(a.values.numel()),
        meta_stride(a.meta ? a.meta->shape[1] : 0) {}

  // Where row r's values start, in elements.
  int64_t begin(int64_t r) const {
    if (format == WeightFormat::bitmap) return offsets[r];
    return r * (format == WeightFormat::dense ? cols : cols / 2);
  }
  // The same for rows whose offsets are not checked yet, to fetch ahead: nothing but the matrix may
  // follow from them, and no overflow.
  int64_t begin_within(int64_t r) const { return std::clamp<int64_t>(begin(r), 0, nnz); }
  // Whether a bitmap row's offsets are in order and within the matrix.
  bool ordered(int64_t r) const {
    return 0 <= offsets[r] && offsets[r] <= offsets[r + 1] && offsets[r + 1] <= nnz;
  }
  // Whether they enclose `count` of the values. Compared, not subtracted, first: a difference of
  // arbitrary numbers may overflow to the very count.
  bool encloses(int64_t r, int64_t count) const {
    return ordered(r) && offsets[r + 1] - offsets[r] == count;
  }
  // Whether a bitmap row's bits may be counted as its values are taken: its mask is whole words
  // where it lies, and no mask leads past the matrix, as it goes on for a row's columns and the
  // eight values that vectors read further. Counting first costs up to 9 % of the time of one row
  // of x.
  bool counted_later(int64_t r) const {
    if (format != WeightFormat::bitmap || cols % 64 || reinterpret_cast<uintptr_t>(meta) % 8)
      return false;
    return ordered(r) && nnz - offsets[r] >= cols + 8;
  }
};

// Where a decoder stands in one row.
template <class T>
struct Cursor {
  const T* v;                // the next value
  const uint64_t* words;     // the row's mask; unused when dense
  const T* until = nullptr;  // where the row's values end, if its bits are not counted beforehand

  static Cursor at(const Weights& w, int64_t r, const uint64_t* words) {
    return {static_cast<const T*>(w.values) + w.begin(r), words};
  }
  // Of a dense row the next values.
  const T* take(int64_t columns) {
    const T* first = v;
    v += columns;
    return first;
  }
  // After the last column: whether the row held what it said.
  bool complete() const { return !until || v == until; }
};

// The columns that a byte of 2:4 metadata keeps, as bits: two groups of four columns, whose nibbles
// hold two column numbers each.
struct KeptTable {
  uint8_t bits[256];
  constexpr KeptTable() : bits() {
    for (int meta = 0; meta < 256; ++meta)
      bits[meta] = static_cast<uint8_t>(1 << (meta & 3) | 1 << (meta >> 2 & 3) |
                                        1 << (4 + (meta >> 4 & 3)) | 1 << (4 + (meta >> 6)));
  }
};
constexpr KeptTable kKept;

// 2:4 metadata to column bits, 64 bytes (512 columns) at a time: a nibble describes a group of four
// columns completely, so a 16-entry byte shuffle is the whole table.
inline void kept_columns(const uint8_t* meta, int64_t n, uint8_t* bits) {
  int64_t i = 0;
#if defined(__AVX2__)
  alignas(16) uint8_t table[16];
  for (int k = 0; k < 16; ++k) table[k] = kKept.bits[k] & 15;
#if defined(__AVX512BW__)
  const __m512i lut =
      _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  const __m512i low = _mm512_set1_epi8(15);
  for (; i < n; i += 64) {
    const __mmask64 k = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
    const __m512i m = _mm512_maskz_loadu_epi8(k, meta + i);
    const __m512i lo = _mm512_shuffle_epi8(lut, _mm512_and_si512(m, low));
    const __m512i hi = _mm512_shuffle_epi8(lut, _mm512_and_si512(_mm512_srli_epi16(m, 4), low));
    _mm512_mask_storeu_epi8(bits + i, k, _mm512_or_si512(lo, _mm512_slli_epi16(hi, 4)));
  }
#else
  const __m256i lut =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  const __m256i low = _mm256_set1_epi8(15);
  for (; i + 32 <= n; i += 32) {
    const __m256i m = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(meta + i));
    const __m256i lo = _mm256_shuffle_epi8(lut, _mm256_and_si256(m, low));
    const __m256i hi = _mm256_shuffle_epi8(lut, _mm256_and_si256(_mm256_srli_epi16(m, 4), low));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(bits + i),
                        _mm256_or_si256(lo, _mm256_slli_epi16(hi, 4)));
  }
#endif
#elif defined(PYPRUNE_NEON)
  uint8_t table[16];
  for (int k = 0; k < 16; ++k) table[k] = kKept.bits[k] & 15;
  const uint8x16_t lut = vld1q_u8(table);
  for (; i + 16 <= n; i += 16) {
    const uint8x16_t m = vld1q_u8(meta + i);
    const uint8x16_t lo = vqtbl1q_u8(lut, vandq_u8(m, vdupq_n_u8(15)));
    const uint8x16_t hi = vqtbl1q_u8(lut, vshrq_n_u8(m, 4));
    vst1q_u8(bits + i, vsliq_n_u8(lo, hi, 4));
  }
#endif
  for (; i < n; ++i) bits[i] = kKept.bits[meta[i]];
}

// Starts fetching the metadata of the next rows.
inline void prefetch_meta(const Weights& w, int64_t r0, int64_t count) {
  const uint8_t* p = w.meta + r0 * w.meta_stride;
  const uint8_t* end = w.meta + std::min(r0 + count, w.rows) * w.meta_stride;
  for (; p < end; p += 64) __builtin_prefetch(p, 0, 2);
}

inline int popcount(uint64_t word) { return __builtin_popcountll(word); }

// Bits set in n bytes.
inline int64_t count_bits(const uint8_t* p, int64_t n) {
  int64_t i = 0, count = 0;
#if defined(__AVX2__)
  // Nibbles by a table of 16 counts, then sums of eight bytes.
  const __m256i table = _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4,  //
                                         0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
  __m256i sums = zero;
  for (; i + 32 <= n; i += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low);
    const __m256i counts = _mm256_add_epi8(_mm256_shuffle_epi8(table, _mm256_and_si256(bytes, low)),
                                           _mm256_shuffle_epi8(table, high));
    sums = _mm256_add_epi64(sums, _mm256_sad_epu8(counts, zero));
  }
  alignas(32) int64_t four[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(four), sums);
  count = four[0] + four[1] + four[2] + four[3];
#elif defined(PYPRUNE_NEON)
  uint64x2_t sums = vdupq_n_u64(0);
  for (; i + 16 <= n; i += 16)
    sums = vpadalq_u32(sums, vpaddlq_u16(vpaddlq_u8(vcntq_u8(vld1q_u8(p + i)))));
  count = static_cast<int64_t>(vaddvq_u64(sums));
#endif
  for (; i + 8 <= n; i += 8) {
    uint64_t word;
    std::memcpy(&word, p + i, 8);
    count += popcount(word);
  }
  for (; i < n; ++i) count += popcount(p[i]);
  return count;
}

// Row r's kept columns, one bit each, padded with zeros to whole words. False when the row's bits
// do not fit its share of the values, so that whoever gets true may read as many values as there
// are bits. (2:4 has at most as many bits as values by construction.)
inline bool row_mask(const Weights& w, int64_t r, uint64_t* words) {
  const int64_t n = mask_words(w.cols);
  const uint8_t* row = w.meta + r * w.meta_stride;
  words[n - 1] = 0;
  if (w.format == WeightFormat::sparse24) {
    kept_columns(row, w.meta_stride, reinterpret_cast<uint8_t*>(words));
    return true;
  }
  std::memcpy(words, row, static_cast<size_t>(w.meta_stride));
  const int tail = static_cast<int>(w.cols % kMaskColumns);
  const uint64_t stray = tail ? words[n - 1] >> tail : 0;
  return !stray && w.encloses(r, count_bits(row, w.meta_stride));
}

// Cursors at rows [r0, r0 + count), with room for their masks at `words`; false, and the row noted,
// when one is seen to be inconsistent.
template <class T>
bool begin_rows(const Weights& w, int64_t r0, int64_t count, uint64_t* words, Cursor<T>* cursors,
                std::atomic<int64_t>* broken) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = r0 + i;
    const bool later = w.counted_later(r);
    const auto* mask = later ? reinterpret_cast<const uint64_t*>(w.meta + r * w.meta_stride)
                             : words + i * mask_words(w.cols);
    if (!later && w.format != WeightFormat::dense &&
        !row_mask(w, r, words + i * mask_words(w.cols))) {
      broken->store(r, std::memory_order_relaxed);
      return false;
    }
    cursors[i] = Cursor<T>::at(w, r, mask);
    if (later) cursors[i].until = cursors[i].v + (w.offsets[r + 1] - w.offsets[r]);
  }
  return true;
}

// After the rows' last columns: false, and the row noted, when one held other than it said.
template <class T>
bool end_rows(const Cursor<T>* cursors, int64_t r0, int64_t count, std::atomic<int64_t>* broken) {
  for (int64_t i = 0; i < count; ++i)
    if (!cursors[i].complete()) return broken->store(r0 + i, std::memory_order_relaxed), false;
  return true;
}

#if defined(__AVX512F__)

// 32 consecutive columns as two vectors of 16 floats. bf16 comes as even and odd columns (a shift
// and a mask widen it in place), the other types in order; pack_decode() orders x alike.
template <class T>
struct Columns32;

template <>
struct Columns32<bf16> {
  static constexpr bool kEvenOdd = true;
  __m512 a, b;
  explicit Columns32(__m512i words)
      : a(_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))),
        b(_mm512_castsi512_ps(
            _mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))) {}
  static Columns32 expand(const bf16* p, uint32_t keep) { return Columns32(expand_words(keep, p)); }
  static Columns32 load(const bf16* p, uint32_t valid) {
    return Columns32(_mm512_maskz_loadu_epi16(valid, p));
  }
};

template <>
struct Columns32<f16> {
  static constexpr bool kEvenOdd = false;
  __m512 a, b;
  explicit Columns32(__m512i words)
      : a(_mm512_cvtph_ps(_mm512_castsi512_si256(words))),
        b(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))) {}
  static Columns32 expand(const f16* p, uint32_t keep) { return Columns32(expand_words(keep, p)); }
  static Columns32 load(const f16* p, uint32_t valid) {
    return Columns32(_mm512_maskz_loadu_epi16(valid, p));
  }
};

template <>
struct Columns32<float> {
  static constexpr bool kEvenOdd = false;
  __m512 a, b;
  static Columns32 expand(const float* p, uint32_t keep) {
    const __mmask16 lo = static_cast<__mmask16>(keep), hi = static_cast<__mmask16>(keep >> 16);
    return {expand_floats(lo, p), expand_floats(hi, p + popcount(lo))};
  }
  static Columns32 load(const float* p, uint32_t valid) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(valid), p),
            _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid >> 16), p + 16)};
  }
};

template <class T>
constexpr bool kEvenOdd = Columns32<T>::kEvenOdd;

// Spreads the values at `v` over the kept columns of n words, zeros elsewhere; returns where the
// values went on to. Columns come in the order of Columns32.
template <class T>
const T* expand_columns(const T* v, const T*, const uint64_t* words, int64_t n, float* out) {
  for (int64_t i = 0; i < 2 * n; ++i) {
    const uint32_t keep = static_cast<uint32_t>(words[i / 2] >> (32 * (i & 1)));
    const auto w = Columns32<T>::expand(v, keep);
    _mm512_storeu_ps(out + 32 * i, w.a);
    _mm512_storeu_ps(out + 32 * i + 16, w.b);
    v += popcount(keep);
  }
  return v;
}

#elif defined(PYPRUNE_SHUFFLES)

template <class T>
constexpr bool kEvenOdd = false;

// Eight: what eight columns come as, which take eight floats of `out` too.
template <class Eight = EightFloats, class T>
const T* expand_columns(const T* v, const T* end, const uint64_t* words, int64_t n, float* out) {
  const auto* masks = reinterpret_cast<const uint8_t*>(words);
  for (int64_t i = 0; i < n; ++i) {
    const bool inside = end - v >= kMaskColumns + 8;  // a word's values, and what is read past them
    const KeptWord kept(masks + 8 * i);
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step, out += 8) {
      const uint8_t keep = kept.keep(step);
      const T* at = kept.take(v, step);
      (inside ? Eight::expand(at, keep) : spread_columns<Eight>(at, end - at, keep)).store(out);
    }
  }
  return v;
}

#else

template <class T>
constexpr bool kEvenOdd = false;

template <class T>
const T* expand_columns(const T* v, const T*, const uint64_t* words, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i, out += kMaskColumns) {
    std::fill(out, out + kMaskColumns, 0.0f);
    // By the bits that are set: a branch on every bit of a mask is mispredicted half of the time.
    for (uint64_t left = words[i]; left; left &= left - 1)
      out[__builtin_ctzll(left)] = to_float(*v++);
  }
  return v;
}

#endif

// n columns of a dense row as floats, in the order of expand_columns(), padded with zeros to whole
// words.
template <class T>
void widen_columns(const T* v, int64_t n, float* out) {
  const int64_t padded = mask_words(n) * kMaskColumns;
  int64_t c = 0;
#if defined(__AVX512F__)
  for (; c < padded; c += 32) {
    const int64_t left = n - c;
    const uint32_t valid = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1 : 0;
    const auto w = Columns32<T>::load(v + c, valid);
    _mm512_storeu_ps(out + c, w.a);
    _mm512_storeu_ps(out + c + 16, w.b);
  }
#elif defined(PYPRUNE_SHUFFLES)
  for (; c < padded; c += 8) load_columns(v + c, n - c).store(out + c);
#else
  for (; c < n; ++c) out[c] = to_float(v[c]);
  for (; c < padded; ++c) out[c] = 0.0f;
#endif
}

// Where column c of a group of 32 goes in the order of expand_columns().
template <class T>
inline int64_t column_place(int64_t c) {
  return kEvenOdd<T> ? (c & ~int64_t{31}) + ((c & 31) >> 1) + 16 * (c & 1) : c;
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
