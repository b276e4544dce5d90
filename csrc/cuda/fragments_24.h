// Which elements each lane of a warp holds for mma.sp.m16n8k32 when W is read as it is stored.
//
// The instruction multiplies 16 rows of W by 32 columns, of which 16 are stored, with 8 rows of x
// (PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types"). Its register map
// gives a lane two stored values here and two there; read like that, W would come in pieces of four
// bytes. But a sum over columns may take them in any order so long as W and x agree. So a lane
// reads 16 bytes of each of its rows, eight stored values, four groups of four columns, and feeds
// them to two instructions that together cover 64 columns:
//
//   step s, chunk u (0..7) of four columns  <-  group 4 (u % 4) + 2 s + u / 4 of the 64 columns
//
// Chunks u and u + 4 are what the register map asks of the quad's lane u, so lane t needs groups
// 4 t .. 4 t + 3: those it has read. W needs no copy in an order of its own; only the few rows of x
// are put in this order, on their way into shared memory.
//
// Everything here also compiles for the host, where tests emulate the instruction.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYPRUNE_HD __host__ __device__ __forceinline__
#else
#define PYPRUNE_HD inline
#endif

namespace pyprune {
namespace fragments_24 {

constexpr int kColumns = 64;    // of W that two instructions cover
constexpr int kSteps = 2;       // those instructions
constexpr int kTileRows = 16;   // of W an instruction
constexpr int kTileTokens = 8;  // rows of x an instruction

// A lane's quad, which is its row in a tile (and that row + 8), or its row of x; its place there.
PYPRUNE_HD int quad_of(int lane) { return lane >> 2; }
PYPRUNE_HD int place_of(int lane) { return lane & 3; }

// The four A registers of step `s` from the lane's 16 bytes of rows `quad` and `quad + 8`, as words
// of two stored values.
PYPRUNE_HD void a_registers(const uint32_t* row, const uint32_t* row8, int s, uint32_t (&a)[4]) {
  a[0] = row[2 * s];
  a[1] = row8[2 * s];
  a[2] = row[2 * s + 1];
  a[3] = row8[2 * s + 1];
}

// Eight bytes of metadata (64 columns of one row, low word first), of which a lane supplies a
// quarter: places 0 and 1 the two halves of step 0, places 2 and 3 those of step 1 (sparsity
// selectors 0 and 1). Step s has the groups whose number is 2 s or 2 s + 1 modulo 4: every second
// byte; its first half their low nibbles. The four nibbles end up in bytes 0 and 2.
PYPRUNE_HD uint32_t metadata_of_row(uint32_t low, uint32_t high, int place) {
  const int s = place >> 1, shift = 4 * (place & 1);
#if defined(__CUDA_ARCH__)
  uint32_t nibbles = __byte_perm(low, high, s ? 0x7531 : 0x6420);
#else
  uint32_t nibbles = 0;
  for (int b = 0; b < 4; ++b)
    nibbles |= ((b < 2 ? low : high) >> (8 * (2 * (b % 2) + s)) & 0xffu) << (8 * b);
#endif
  nibbles = (nibbles >> shift) & 0x0f0f0f0fu;
  return (nibbles | nibbles >> 4) & 0x00ff00ffu;
}

// The metadata register: row `quad` in the low half, row `quad + 8` in the high half.
PYPRUNE_HD uint32_t metadata(const uint32_t (&row)[2], const uint32_t (&row8)[2], int place) {
  const uint32_t low = metadata_of_row(row[0], row[1], place);
  const uint32_t high = metadata_of_row(row8[0], row8[1], place);
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, 0x6420);
#else
  return (low & 0xff) | (low >> 8 & 0xff00) | (high & 0xff) << 16 | (high & 0xff0000) << 8;
#endif
}

// x in shared memory, in words of two columns: for each tile of eight rows and each step 128 words,
// register by register, lane by lane. The odd stride spreads the two steps over different banks.
constexpr int kStepWords = 4 * 32 + 1;
constexpr int kTileWords = kSteps * kStepWords;  // of 64 columns of eight rows of x

// Where B register `i` of a lane is.
PYPRUNE_HD int b_word(int s, int i, int lane) { return s * kStepWords + i * 32 + lane; }

// Where the four words of piece q go: columns 8 q .. 8 q + 7 of row `token` of the tile. Groups 2 q
// and 2 q + 1 are chunks u and u + 4 of step q % 2 with u = q / 2; chunk u is in registers u / 2 of
// places 2 (u % 2) and the next.
PYPRUNE_HD void x_words(int token, int q, int (&word)[4]) {
  const int u = q >> 1, lane = 4 * token + 2 * (u & 1);
  for (int w = 0; w < 4; ++w) word[w] = b_word(q & 1, (u >> 1) + (w & 2), lane + (w & 1));
}

}  // namespace fragments_24
}  // namespace pyprune
