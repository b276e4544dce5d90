// Where the pieces of W and x that mma.sp.m16n8k32 multiplies lie in shared memory, and which of
// them each lane of a warp asks for.
//
// The instruction multiplies 16 rows of W by 32 columns, of which 16 are stored, with 8 rows of x
// (PTX ISA, "Matrix Fragments for sparse mma.m16n8k32 with .f16 and .bf16 types"). Its register map
// gives a lane two stored values here and two there, always neighbours: four bytes. That is what
// ldmatrix hands out of rows of 16 bytes, so W and x stay in the order they are stored in, and both
// operands of an instruction take one ldmatrix of four 8 x 8 matrices each:
//
//   A, stored values: rows 0-7 and 8-15 of the first 16 bytes, then of the second
//   B, rows of x:     four times 16 bytes, eight columns each
//
// Metadata are in the order that the instruction wants, too: of a row's eight bytes for 64 columns
// lane 4 g + t supplies the two at 2 t, of row g in the low half of its register and of row g + 8
// in the high half. Lanes t = 0 and 1 hold those of the first 32 columns (sparsity selector 0), t =
// 2 and 3 those of the next (selector 1).
//
// Everything here also compiles for the host, where tests emulate the instructions.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYPRUNE_HD __host__ __device__ __forceinline__
#else
#define PYPRUNE_HD inline
#endif

namespace pyprune {
namespace fragments_24 {

constexpr int kColumns = 64;    // of W that two instructions cover: a word of metadata
constexpr int kSteps = 2;       // those instructions
constexpr int kTileRows = 16;   // of W an instruction
constexpr int kTileTokens = 8;  // rows of x an instruction

constexpr int kPieceBytes = 16;  // a row of an 8 x 8 matrix, and what an asynchronous copy moves
constexpr int kValuePieces = 4;  // of a row of W, 64 columns
constexpr int kMetaBytes = 8;
constexpr int kXPieces = 8;

// A lane's row in a tile of W (and that row + 8) or of x, and its place in it.
PYPRUNE_HD int quad_of(int lane) { return lane >> 2; }
PYPRUNE_HD int place_of(int lane) { return lane & 3; }

// Byte of piece `piece` of row `row` in shared memory, rows of `pieces` pieces, a multiple of eight
// of them. The same piece of eight neighbouring rows lies in different banks.
PYPRUNE_HD int piece_at(int row, int piece, int pieces) {
  return (row * pieces + (piece ^ (row & 7))) * kPieceBytes;
}

// How far apart the same piece of two rows lies that are `tiles` tiles of x apart, eight rows each:
// nothing that depends on the rows, so that a lane finds one address for all tiles.
PYPRUNE_HD constexpr int tiles_apart(int tiles, int pieces) {
  return tiles * kTileTokens * pieces * kPieceBytes;
}

// How `kThreads` threads deal out rows of `kPieces` pieces: each copies the same piece of every
// kRowsAtOnce-th row.
template <int kPieces, int kThreads>
struct Deal {
  static_assert(kThreads % kPieces == 0);
  static constexpr int kRowsAtOnce = kThreads / kPieces;
  PYPRUNE_HD static int piece_of(int thread) { return thread % kPieces; }
  PYPRUNE_HD static int row_of(int thread) { return thread / kPieces; }
};

// Whose address a lane hands to ldmatrix for the A registers of step `s` of word `word`: which row
// of the tile, which piece.
PYPRUNE_HD int a_row(int lane) { return lane & 15; }
PYPRUNE_HD int a_piece(int word, int s, int lane) {
  return kValuePieces * word + 2 * s + (lane >> 4);
}
// And for the B registers: which row of x, which piece.
PYPRUNE_HD int b_row(int lane) { return lane & 7; }
PYPRUNE_HD int b_piece(int word, int s, int lane) { return kXPieces * word + 4 * s + (lane >> 3); }

// The byte of the row's metadata at which a lane's two begin.
PYPRUNE_HD int meta_byte(int word, int lane) { return kMetaBytes * word + 2 * place_of(lane); }

// Element i of the product's four registers of a lane: row of the tile, row of x.
PYPRUNE_HD int product_row(int lane, int i) { return quad_of(lane) + 8 * (i >> 1); }
PYPRUNE_HD int product_token(int lane, int i) { return 2 * place_of(lane) + (i & 1); }

}  // namespace fragments_24
}  // namespace pyprune
