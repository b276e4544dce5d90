// A warp of csrc/cuda/linear_24.cu on the CPU: pieces of W and x lie in shared memory where the
// kernel's copies put them, lanes ask for them where the kernel's do, and ldmatrix and
// mma.sp.m16n8k32 are replaced by their descriptions in the PTX ISA ("ldmatrix", "Matrix Fragments
// for sparse mma.m16n8k32 with .f16 and .bf16 types", "Sparse matrix storage"). Built and called by
// test_linear_24_cuda.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/fragments_24.h"

using namespace pyprune::fragments_24;

namespace {

float value_of(uint32_t word, int element) {
  const uint32_t bits = (word >> (16 * element) & 0xffff) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Where the documentation has the two indices of chunk `u` (four columns) of row `r` of A.
struct IndexPlace {
  int lane, shift;
};
IndexPlace index_place(int r, int u, int selector) {
  return {4 * (r % 8) + 2 * selector + u / 4, 16 * (r / 8) + 4 * (u % 4)};
}

struct Warp {
  uint32_t a[32][4], b[32][4], e[32];
};

// d[16][8] += A[16][32] B[32][8]
void mma_sp(const Warp& w, int selector, float (&d)[16][8]) {
  float a[16][32] = {}, b[32][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 8; ++i) {  // element i of the fragment: register i / 2
      const int group = lane >> 2, place = lane % 4;
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int chunk = place + (i < 4 ? 0 : 4);
      const IndexPlace at = index_place(row, chunk, selector);
      const uint32_t index = w.e[at.lane] >> (at.shift + 2 * (i % 2)) & 3;
      a[row][4 * chunk + index] = value_of(w.a[lane][i / 2], i % 2);
      b[8 * (i / 2) + 2 * place + i % 2][group] = value_of(w.b[lane][i / 2], i % 2);
    }
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 32; ++k) d[r][n] += a[r][k] * b[k][n];
}

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8,
// and receives word l % 4 of row l / 4 of each.
void ldmatrix(const std::vector<uint8_t>& shared, const int (&at)[32], uint32_t (&r)[32][4]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      std::memcpy(&r[lane][i], &shared.at(at[8 * i + lane / 4]) + 4 * (lane % 4), 4);
}

// The most lanes of eight, a matrix's, that meet in a bank.
int worst_of(const int (&at)[32]) {
  int worst = 0;
  for (int i = 0; i < 4; ++i) {
    int lanes[8] = {};
    for (int l = 0; l < 8; ++l) {
      const int n = ++lanes[at[8 * i + l] / kPieceBytes % 8];
      worst = n > worst ? n : worst;
    }
  }
  return worst;
}

struct Addresses {
  int a[32], b[32];
  Addresses(int word, int s, int words) {
    for (int lane = 0; lane < 32; ++lane) {
      a[lane] = piece_at(a_row(lane), a_piece(word, s, lane), words * kValuePieces);
      b[lane] = piece_at(b_row(lane), b_piece(word, s, lane), words * kXPieces);
    }
  }
};

}  // namespace

extern "C" {

// Sixteen rows of W [16, cols / 2] and eight of x [8, cols], bf16; y [16][8]. `words` words of 64
// columns a turn.
void emulate_tile(const uint8_t* values, const uint8_t* meta, const uint8_t* x, int cols, int words,
                  float* y) {
  float sum[16][8] = {};
  for (int first = 0; first < cols / kColumns; first += words) {
    std::vector<uint8_t> w_stage(16 * words * kValuePieces * kPieceBytes);
    std::vector<uint8_t> x_stage(8 * words * kXPieces * kPieceBytes);
    std::vector<uint8_t> meta_stage(16 * words * kMetaBytes);
    const auto copy = [&](std::vector<uint8_t>& to, const uint8_t* from, int rows, int pieces) {
      const int whole = pieces * (cols / kColumns);  // of a row
      for (int r = 0; r < rows; ++r)
        for (int piece = 0; piece < pieces * words; ++piece)
          if (first * pieces + piece < whole)
            std::memcpy(&to.at(piece_at(r, piece, pieces * words)),
                        from + (r * whole + first * pieces + piece) * kPieceBytes, kPieceBytes);
    };
    copy(w_stage, values, 16, kValuePieces);
    copy(x_stage, x, 8, kXPieces);
    for (int r = 0; r < 16; ++r)
      for (int word = 0; word < words && first + word < cols / kColumns; ++word)
        std::memcpy(&meta_stage.at((r * words + word) * kMetaBytes),
                    meta + (r * (cols / kColumns) + first + word) * kMetaBytes, kMetaBytes);
    for (int word = 0; word < words; ++word)
      for (int s = 0; s < kSteps; ++s) {
        const Addresses at(word, s, words);
        Warp w;
        ldmatrix(w_stage, at.a, w.a);
        ldmatrix(x_stage, at.b, w.b);
        for (int lane = 0; lane < 32; ++lane) {
          uint16_t half[2];
          for (int h = 0; h < 2; ++h)
            std::memcpy(&half[h],
                        &meta_stage.at((quad_of(lane) + 8 * h) * words * kMetaBytes +
                                       meta_byte(word, lane)),
                        2);
          w.e[lane] = half[0] | static_cast<uint32_t>(half[1]) << 16;
        }
        mma_sp(w, s, sum);
      }
  }
  for (int lane = 0; lane < 32; ++lane)  // where the kernel takes each register's element to be
    for (int i = 0; i < 4; ++i)
      y[product_row(lane, i) * 8 + product_token(lane, i)] =
          sum[(lane >> 2) + (i < 2 ? 0 : 8)][2 * (lane % 4) + (i & 1)];
}

// The lane and the lowest bit of the indices of chunk `u` of row `r`, as [lane, shift].
void documented_metadata(int r, int u, int selector, int* out) {
  const IndexPlace at = index_place(r, u, selector);
  out[0] = at.lane;
  out[1] = at.shift;
}

// How often a stage's pieces of `rows` rows name each place.
void staged_pieces(int rows, int pieces, int* count) {
  for (int r = 0; r < rows; ++r)
    for (int piece = 0; piece < pieces; ++piece) ++count[piece_at(r, piece, pieces) / kPieceBytes];
}

// How often 32 * team threads that deal out eight tiles of rows of x, `words` words of 64 columns,
// name each place: as the kernel counts them, up to and without row `rows`.
void dealt_pieces(int words, int team, int rows, int* count) {
  const auto deal = [&](auto of) {
    using D = decltype(of);
    const int pieces = words * kXPieces;
    for (int thread = 0; thread < 32 * team; ++thread)
      for (int row = 0; row < 8 * kTileTokens; row += D::kRowsAtOnce)
        if (row + D::row_of(thread) < rows)
          ++count[piece_at(row + D::row_of(thread), D::piece_of(thread), pieces) / kPieceBytes];
  };
  if (words == 4) return deal(Deal<4 * kXPieces, 32>());
  if (team == 1) return deal(Deal<2 * kXPieces, 32>());
  if (team == 2) return deal(Deal<2 * kXPieces, 64>());
  deal(Deal<2 * kXPieces, 128>());
}

// Whether one address and distances between tiles find what every lane asks of every tile.
bool tiles_are_apart(int words) {
  for (int lane = 0; lane < 32; ++lane)
    for (int word = 0; word < words; ++word)
      for (int s = 0; s < kSteps; ++s)
        for (int tile = 0; tile < 8; ++tile) {
          const int x = words * kXPieces, w = words * kValuePieces;
          const int b = b_piece(word, s, lane), a = a_piece(word, s, lane);
          if (piece_at(tile * kTileTokens + b_row(lane), b, x) !=
                  piece_at(b_row(lane), b, x) + tiles_apart(tile, x) ||
              piece_at(tile * kTileRows + a_row(lane), a, w) !=
                  piece_at(a_row(lane), a, w) + tiles_apart(2 * tile, w))
            return false;
        }
  return true;
}

int worst_bank_conflict(int words) {
  int worst = 0;
  for (int word = 0; word < words; ++word)
    for (int s = 0; s < kSteps; ++s) {
      const Addresses at(word, s, words);
      worst = std::max({worst, worst_of(at.a), worst_of(at.b)});
    }
  return worst;
}
}
