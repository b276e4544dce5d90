#include "cpu/pack.h"

#include <algorithm>

#include "cpu/pack_words.h"

namespace pyprune {
namespace PYPRUNE_ISA {
namespace {

// The two positions, as a nibble of bits, that a group stores: its kept ones (`keep`), then
// negative zeros (`spare`, lowest first), then the padding that PyTorch's converter uses. 0xff:
// more than two are kept.
inline uint8_t stored_positions(unsigned keep, unsigned spare) {
  if (__builtin_popcount(keep) > 2) return 0xff;
  spare &= ~keep;
  while (__builtin_popcount(keep) < 2 && spare) {
    keep |= spare & (0u - spare);
    spare &= spare - 1;
  }
  static const uint8_t padding[9] = {0b1100, 0b0101, 0b0110, 0, 0b1100, 0, 0, 0, 0b1100};
  return __builtin_popcount(keep) == 2 ? keep : padding[keep];
}

// Metadata byte of two groups from the eight bits of their stored positions, and back.
struct MetaTables {
  uint8_t of_bits[256], to_bits[256];
  MetaTables() {
    for (int byte = 0; byte < 256; ++byte) {
      of_bits[byte] = static_cast<uint8_t>(nibble_of(byte & 15) | nibble_of(byte >> 4) << 4);
      to_bits[byte] = static_cast<uint8_t>(bits_of(byte & 15) | bits_of(byte >> 4) << 4);
    }
  }
  static int nibble_of(int bits) {
    if (__builtin_popcount(bits) != 2) return 0;
    return __builtin_ctz(bits) | (31 - __builtin_clz(bits)) << 2;
  }
  static int bits_of(int nibble) { return 1 << (nibble & 3) | 1 << (nibble >> 2); }
};

const MetaTables& tables() {
  static const MetaTables t;
  return t;
}

constexpr uint64_t kPairs = 0x2222222222222222ull;

// Number of bits set in every nibble of a word.
inline uint64_t nibble_counts(uint64_t bits) {
  bits -= bits >> 1 & 0x5555555555555555ull;
  return (bits & 0x3333333333333333ull) + (bits >> 2 & 0x3333333333333333ull);
}

// The stored positions of up to 16 groups. Sets `overfull` to the first group that keeps too many.
inline uint64_t stored_word(uint64_t keep, uint64_t spare, int groups, int& overfull) {
  uint64_t stored = 0;
  for (int g = 0; g < groups; ++g) {
    const uint8_t nibble = stored_positions(keep >> (4 * g) & 15, spare >> (4 * g) & 15);
    if (nibble == 0xff) {
      if (overfull < 0) overfull = g;
      continue;
    }
    stored |= static_cast<uint64_t>(nibble) << (4 * g);
  }
  return stored;
}

template <class U>
int64_t pack_24_row(const Pack24Args& args, int64_t i, bool vbmi2) {
  constexpr U kSign = static_cast<U>(U{1} << (8 * sizeof(U) - 1));
  const MetaTables& table = tables();
  const int64_t cols = args.w.shape[1];
  const U* w = args.w.ptr<U>() + i * args.w.stride[0];
  const uint8_t* mask =
      args.mask.data ? args.mask.ptr<uint8_t>() + i * args.mask.stride[0] : nullptr;
  U* values = args.values.ptr<U>() + i * (cols / 2);
  const U* const end = values + cols / 2;
  uint8_t* meta = args.meta.ptr<uint8_t>() + i * (cols / 8);
  int64_t first_overfull = -1;
  for (int64_t c = 0; c < cols; c += 64) {
    const int64_t count = std::min<int64_t>(64, cols - c);
    const uint64_t keep =
        mask ? bits_of_bools(mask + c, count) : bits_set<U>(w + c, count, static_cast<U>(~kSign));
    uint64_t stored = keep;
    if (count < 64 || nibble_counts(keep) != kPairs) {
      const uint64_t spare = mask ? 0 : bits_set<U>(w + c, count, kSign) & ~keep;
      int overfull = -1;
      stored = stored_word(keep, spare, static_cast<int>(count / 4), overfull);
      if (overfull >= 0 && first_overfull < 0) first_overfull = c / 4 + overfull;
    }
    if (mask && stored != keep) {  // padding is +0, whatever the dropped element was
      U kept[64];
      for (int64_t k = 0; k < count; ++k) kept[k] = keep >> k & 1 ? w[c + k] : U{0};
      for (int64_t k = count; k < 64; ++k) kept[k] = 0;
      compress(kept, 64, stored, values + c / 2, end, vbmi2);
    } else {
      compress(w + c, count, stored, values + c / 2, end, vbmi2);
    }
    for (int64_t b = 0; b < count / 8; ++b)
      meta[c / 8 + b] = table.of_bits[stored >> (8 * b) & 255];
  }
  return first_overfull;
}

template <class U>
void unpack_24_row(const Unpack24Args& args, int64_t i, bool vbmi2) {
  const MetaTables& table = tables();
  const int64_t cols = args.w.shape[1];
  U* w = args.w.ptr<U>() + i * cols;
  const U* values = args.values.ptr<U>() + i * (cols / 2);
  const U* const end = args.values.ptr<U>() + args.w.shape[0] * (cols / 2);
  const uint8_t* meta = args.meta.ptr<uint8_t>() + i * (cols / 8);
  for (int64_t c = 0; c < cols; c += 64) {
    const int64_t count = std::min<int64_t>(64, cols - c);
    uint64_t stored = 0;
    for (int64_t b = 0; b < count / 8; ++b)
      stored |= static_cast<uint64_t>(table.to_bits[meta[c / 8 + b]]) << (8 * b);
    expand(values + c / 2, end, stored, w + c, count, vbmi2);
  }
}

// Bits [c, c + 64) of a row's bitmap, without those past its last column.
inline uint64_t load_bits(const uint8_t* row, int64_t c, int64_t cols) {
  uint64_t bits = 0;
  const int64_t count = std::min<int64_t>(64, cols - c);
  std::memcpy(&bits, row + c / 8, (count + 7) / 8);
  return count < 64 ? bits & ((1ull << count) - 1) : bits;
}

template <class U>
int64_t bitmap_row(const BitmapRowsArgs& args, int64_t i) {
  const int64_t cols = args.w.shape[1], bytes = args.bitmap.shape[1];
  const U* w = args.w.ptr<U>() + i * args.w.stride[0];
  const uint8_t* mask =
      args.mask.data ? args.mask.ptr<uint8_t>() + i * args.mask.stride[0] : nullptr;
  uint8_t* bitmap = args.bitmap.ptr<uint8_t>() + i * bytes;
  int64_t kept = 0;
  for (int64_t c = 0; c < cols; c += 64) {
    const int64_t count = std::min<int64_t>(64, cols - c);
    const uint64_t bits =
        mask ? bits_of_bools(mask + c, count) : bits_set<U>(w + c, count, static_cast<U>(~U{0}));
    std::memcpy(bitmap + c / 8, &bits, (count + 7) / 8);
    kept += __builtin_popcountll(bits);
  }
  return kept;
}

// False, with nothing moved, if the row's offsets disagree with its bits.
template <class U>
bool move_row(const BitmapValuesArgs& args, int64_t i, bool vbmi2) {
  const int64_t cols = args.w.shape[1], bytes = args.bitmap.shape[1];
  const int64_t* offsets = args.row_offsets.ptr<int64_t>();
  const uint8_t* bitmap = args.bitmap.ptr<uint8_t>() + i * bytes;
  U* w = args.w.ptr<U>() + i * args.w.stride[0];
  int64_t kept = 0;
  for (int64_t c = 0; c < cols; c += 64) kept += __builtin_popcountll(load_bits(bitmap, c, cols));
  // Compared, not added, first: arbitrary numbers may overflow to the wanted one.
  if (offsets[i] < 0 || offsets[i] > offsets[i + 1] || offsets[i + 1] > args.values.shape[0] ||
      offsets[i + 1] - offsets[i] != kept)
    return false;
  U* values = args.values.ptr<U>() + offsets[i];
  const U* const end = values + kept;  // the row behind may be another thread's
  const U* const last = args.values.ptr<U>() + args.values.shape[0];
  for (int64_t c = 0; c < cols; c += 64) {
    const uint64_t bits = load_bits(bitmap, c, cols);
    const int64_t count = std::min<int64_t>(64, cols - c);
    if (args.pack)
      compress(w + c, count, bits, values, end, vbmi2);
    else
      expand(values, last, bits, w + c, count, vbmi2);
    values += __builtin_popcountll(bits);
  }
  return true;
}

// Calls f(U*) with the unsigned type as wide as the float type.
template <class F>
void with_pattern_type(DType t, F&& f) {
  if (t == DType::f32) return f(static_cast<uint32_t*>(nullptr));
  if (t == DType::bf16 || t == DType::f16) return f(static_cast<uint16_t*>(nullptr));
  throw std::invalid_argument(std::string("expected a 16- or 32-bit float, got ") + dtype_name(t));
}

template <class Pointer>
using Pattern = std::remove_pointer_t<Pointer>;

}  // namespace

void pack_24(const Pack24Args& args) {
  const int64_t rows = args.w.shape[0], groups = args.w.shape[1] / 4;
  const bool vbmi2 = processor().moves_bytes;
  int64_t first = INT64_MAX;
  with_pattern_type(args.w.dtype, [&](auto* tag) {
#pragma omp parallel for num_threads(args.threads) schedule(static) reduction(min : first)
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t g = pack_24_row<Pattern<decltype(tag)>>(args, i, vbmi2);
      if (g >= 0) first = std::min(first, i * groups + g);
    }
  });
  *args.overfull = first == INT64_MAX ? -1 : first;
}

void unpack_24(const Unpack24Args& args) {
  const bool vbmi2 = processor().moves_bytes;
  with_pattern_type(args.w.dtype, [&](auto* tag) {
#pragma omp parallel for num_threads(args.threads) schedule(static)
    for (int64_t i = 0; i < args.w.shape[0]; ++i)
      unpack_24_row<Pattern<decltype(tag)>>(args, i, vbmi2);
  });
}

void pack_bitmap_rows(const BitmapRowsArgs& args) {
  with_pattern_type(args.w.dtype, [&](auto* tag) {
#pragma omp parallel for num_threads(args.threads) schedule(static)
    for (int64_t i = 0; i < args.w.shape[0]; ++i)
      args.counts.ptr<int64_t>()[i] = bitmap_row<Pattern<decltype(tag)>>(args, i);
  });
}

void move_bitmap_values(const BitmapValuesArgs& args) {
  const bool vbmi2 = processor().moves_bytes;
  int64_t first = INT64_MAX;
  with_pattern_type(args.w.dtype, [&](auto* tag) {
#pragma omp parallel for num_threads(args.threads) schedule(static) reduction(min : first)
    for (int64_t i = 0; i < args.w.shape[0]; ++i)
      if (!move_row<Pattern<decltype(tag)>>(args, i, vbmi2)) first = std::min(first, i);
  });
  *args.broken = first == INT64_MAX ? -1 : first;
}

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
