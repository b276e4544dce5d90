// Which bits, values and activations each lane of a warp holds when it multiplies a bitmap
// compressed W, and how it puts zeros between the stored values again.
//
// The unit of work is a turn: 2048 elements of W, a bitmap word of 32 columns for each lane twice.
// mma.m16n8k16 multiplies 16 rows by 16 columns. A warp gives its lanes `kSegments` neighbouring
// pieces of a row, so the instruction's 16 rows are 16 / kSegments rows of W times kSegments
// segments:
//
//   kSegments | rows of W a turn | columns a turn | rows of x an instruction serves
//   ----------|------------------|----------------|---------------------------------
//       8     |        2         |      1024      | 1
//       4     |        4         |       512      | 2
//       2     |        8         |       256      | 4
//       1     |       16         |       128      | 8
//
// Of the product's 16 x 8 elements those count whose row and column are of the same segment; they
// are summed over the segments at the end. The tensor cores have that much to spare: what limits a
// warp is fetching values from shared memory, where more lanes in one row means fewer that meet in
// a bank, since neighbouring lanes then want neighbouring words.
//
// A turn takes eight steps. In each, a lane expands one nibble of bitmap in each of two rows, which
// lie kRows / 2 apart: two registers of two elements each, four in all, an A fragment. The
// instruction's map (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type") asks of
// lane 4 g + t columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of row g, and the same rows of B; as a sum
// may take its columns in any order, they are here the nibble's four.
//
// Everything here also compiles for the host, where tests run whole warps of it.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYPRUNE_LANES __host__ __device__ __forceinline__
#else
#define PYPRUNE_LANES inline
#endif

namespace pyprune {
namespace bitmap_lanes {

constexpr int kSteps = 8;        // nibbles of a word
constexpr int kChunkBytes = 16;  // what an asynchronous copy moves
constexpr uint32_t kChunkValues = 8;
constexpr int kTileRows = 16;  // of an instruction
constexpr int kTileColumns = 8;

// kSegments: see above.
template <int kSegments>
struct Lanes {
  static constexpr int kAcross = 4 * kSegments;    // lanes side by side in a row
  static constexpr int kHalfRows = 8 / kSegments;  // rows that are read in one instruction
  static constexpr int kRows = 2 * kHalfRows;      // of a turn
  static constexpr int kWords = kAcross;           // of 32 columns, a row and turn
  static constexpr int kColumns = 32 * kWords;
  static constexpr int kTokens = kTileColumns / kSegments;  // rows of x an instruction serves

  // Values of a turn in shared memory, row by row: all that a full row can have from an unaligned
  // start, and so much that neighbouring rows begin kAcross words apart modulo 32. The lanes of
  // one instruction want about as many words of each row, so the rows share out the banks.
  static constexpr int kRowBytes = 2 * kColumns + kChunkBytes * kSegments;
  static constexpr int kTurnBytes = kRows * kRowBytes;  // 4352 for any kSegments
  // What the last row's last window may read past its end.
  static constexpr int kPadBytes = kChunkBytes;
  // Copies of a chunk that a lane may have to make: a full row from an unaligned start.
  static constexpr int kCopies = (2 * kColumns / kChunkBytes + kAcross) / kAcross;

  // Words of a row of `words` in front of a turn. Where turns do not divide the row, the one behind
  // the last begins where the row ends.
  PYPRUNE_LANES static int words_before(int turn, int words) {
    return turn * kWords < words ? turn * kWords : words;
  }

  PYPRUNE_LANES static int place_of(int lane) { return lane % kAcross; }
  // Row of the turn; `half` 0 or 1.
  PYPRUNE_LANES static int row_of(int lane, int half) { return lane / kAcross + half * kHalfRows; }

  // The step's nibble: which word of the row's it is in (its owner's place), how far up, and its
  // first column from the turn's start.
  PYPRUNE_LANES static int nibble_of(int step, int place) { return kAcross * step + place; }
  PYPRUNE_LANES static int owner_of(int step, int place) {
    return kAcross < 8 ? step * kAcross / 8 : step * (kAcross / 8) + place / 8;
  }
  PYPRUNE_LANES static int shift_of(int step, int place) {
    return 4 * (nibble_of(step, place) & 7);
  }
  PYPRUNE_LANES static int column_of(int step, int place) { return 4 * nibble_of(step, place); }

  // The row of x, among those of an instruction, whose four columns a lane supplies.
  PYPRUNE_LANES static int token_of(int lane) { return (lane >> 2) / kSegments; }

  // The element of the product that has the sum over segment s for a row and a token.
  PYPRUNE_LANES static int product_row(int row, int s) {
    return row / kHalfRows * 8 + row % kHalfRows * kSegments + s;
  }
  PYPRUNE_LANES static int product_column(int token, int s) { return token * kSegments + s; }
};

// Where piece `piece`, eight columns, of a turn's 128 columns of row `token` of x is among the
// row's pieces in shared memory: four neighbouring rows have the same pair of pieces in different
// banks.
PYPRUNE_LANES int wide_x_piece(int token, int piece) { return piece ^ (2 * (token & 3)); }

// Where element i of the product's four registers of a lane is.
PYPRUNE_LANES int product_row_of(int lane, int i) { return (lane >> 2) + 8 * (i >> 1); }
PYPRUNE_LANES int product_column_of(int lane, int i) { return 2 * (lane & 3) + (i & 1); }

PYPRUNE_LANES int count_bits(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __popc(word);
#else
  return __builtin_popcount(word);
#endif
}

// Counts of a lane's two words, sums of them over lanes, or bytes of a warp's stages (13056 of
// them) of two rows in one register.
PYPRUNE_LANES uint32_t pack_counts(uint32_t first, uint32_t second) { return first | second << 16; }
PYPRUNE_LANES uint32_t unpack_count(uint32_t packed, int half) {
  return half ? packed >> 16 : packed & 0xffff;
}

// The byte at which the values of a nibble begin: those before its word and those below it.
PYPRUNE_LANES uint32_t position_of(uint32_t word, int shift, uint32_t before) {
  return before + 2 * count_bits(word & ((1u << shift) - 1));
}

// Chunks that hold `count` values of which the first is number `place` (0..7) of its chunk.
PYPRUNE_LANES uint32_t chunks_of(uint32_t place, uint32_t count) {
  return (place + count + kChunkValues - 1) / kChunkValues;
}

// Whether `chunks` chunks from number `first` are whole in a matrix of `values` values. Positions
// have 32 bits, so `first` is below 2^29 and the sum does not wrap.
PYPRUNE_LANES bool chunks_whole(uint32_t first, uint32_t chunks, uint32_t values) {
  return first + chunks <= values / kChunkValues;
}

// Values of chunk number `chunk` that a matrix of `values` values has: all of a chunk, fewer of the
// last one, none past it.
PYPRUNE_LANES uint32_t chunk_values(uint32_t chunk, uint32_t values) {
  const uint32_t whole = values / kChunkValues;
  return chunk < whole ? kChunkValues : chunk == whole ? values % kChunkValues : 0;
}

// Bytes of (high, low) chosen by the four low nibbles of `selector`, 0 to 7 each; bits above them
// do not matter. (The intrinsic clears more of the selector first, an instruction each time.)
PYPRUNE_LANES uint32_t permute(uint32_t low, uint32_t high, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
#else
  const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<uint32_t>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
#endif
}

// The low word of (high, low) shifted right by `bits` modulo 32.
PYPRUNE_LANES uint32_t shift_pair(uint32_t low, uint32_t high, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_r(low, high, bits);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
#endif
}

// The same by 0 to 32 bits.
PYPRUNE_LANES uint32_t shift_pair_far(uint32_t low, uint32_t high, uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __funnelshift_rc(low, high, bits);
#else
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> bits);
#endif
}

// Spreads the bits of two pairs over the nibbles of a selector. A kernel should keep it in a
// register that the compiler knows nothing of: an instruction takes one literal at most, and this
// one would be loaded again at every use.
constexpr uint32_t kSpread = 0x0004;

// What makes four elements of the next values, from the four low bits of `bits`, which say which of
// them are stored: for each pair of elements a selector of four bytes, of the next two values (0 to
// 3) or zero (4). The first pair's in the low half.
PYPRUNE_LANES uint32_t selectors_of(uint32_t bits) {
  // Of two bits, which of those bytes make the low and the high half: bytes of kLow and kHigh.
  constexpr uint32_t kLow = 0x10441044, kHigh = 0x32104444;
  // Both pairs of bits, each twice: as indices into kLow (0 to 3) and kHigh (4 to 7).
  const uint32_t index =
      ((bits << 6 & 0x300) | (bits & 3) | kSpread) * 0x11 + (0x4040u - 0x11 * kSpread);
  return permute(kLow, kHigh, index);
}

// Four elements, two a register, from the words at byte `position` (its lowest two bits dropped)
// and the four low bits of `bits`, of which `selectors` are the selectors: value by value where a
// bit is set, zero elsewhere. What `word[]` holds besides the stored values does not matter, nor do
// the other bits. spread: kSpread.
PYPRUNE_LANES void expand(uint32_t spread, uint32_t selectors, const uint32_t (&word)[3],
                          uint32_t position, uint32_t bits, uint32_t (&out)[2]) {
  // 16 bits for every value that a pair takes: 0, 16, 16, 32.
  constexpr uint32_t kTaken = 0x20101000;
  const uint32_t taken = permute(0, kTaken, (bits & 3) | spread);
  const uint32_t unaligned = position << 3;
  const uint32_t first = shift_pair(word[0], word[1], unaligned);
  const uint32_t second = shift_pair(word[1], word[2], unaligned);
  out[0] = permute(first, 0, selectors);
  out[1] = permute(shift_pair_far(first, second, taken), 0, selectors >> 16);
}

// Part 0, 1 or 2 of an fp32 number as the bits of a bf16 one: the parts' sum is the number, exactly
// unless the last ones are subnormal. Cut off rather than rounded, so that no part overflows. All
// of an infinity or a NaN is in part 0.
PYPRUNE_LANES uint32_t bits_of(float v) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(v);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
#endif
}
PYPRUNE_LANES float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float v;
  __builtin_memcpy(&v, &bits, 4);
  return v;
#endif
}
PYPRUNE_LANES uint32_t bf16_part(float v, int part) {
  const uint32_t bits = bits_of(v);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  // A NaN may have its set bits in the lower half alone.
  if (!finite) return part ? 0 : bits >> 16 | ((bits & 0x7fffffu) ? 0x40 : 0);
  float rest = v;
  for (int i = 0; i < part; ++i) rest -= float_of(bits_of(rest) & 0xffff0000u);
  return bits_of(rest) >> 16;
}

}  // namespace bitmap_lanes
}  // namespace pyprune
