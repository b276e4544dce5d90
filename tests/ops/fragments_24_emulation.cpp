// A warp of csrc/cuda/linear_24.cu on the CPU: lanes read W and x where the kernel's lanes do, and
// mma.sp.m16n8k32 is replaced by its description in the PTX ISA ("Matrix Fragments for sparse
// mma.m16n8k32 with .f16 and .bf16 types" and "Sparse matrix storage"). Built and called by
// test_linear_24_cuda.py.
#include <cstdint>
#include <cstring>

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

}  // namespace

extern "C" {

// Sixteen rows of W [16, cols / 2] and eight of x [8, cols], bf16; y [16][8].
void emulate_tile(const uint16_t* values, const uint8_t* meta, const uint16_t* x, int cols,
                  float* y) {
  float sum[16][8] = {};
  for (int word = 0; word < cols / kColumns; ++word) {
    uint32_t stage[kTileWords] = {};
    for (int token = 0; token < kTileTokens; ++token)
      for (int q = 0; q < 8; ++q) {
        uint32_t piece[4];
        int to[4];
        std::memcpy(piece, x + token * cols + word * kColumns + 8 * q, 16);
        x_words(token, q, to);
        for (int i = 0; i < 4; ++i) stage[to[i]] = piece[i];
      }
    uint32_t row[32][2][4], bits[32][2][2];
    for (int lane = 0; lane < 32; ++lane)
      for (int h = 0; h < 2; ++h) {
        const int64_t r = quad_of(lane) + 8 * h;
        std::memcpy(row[lane][h], values + (r * cols + word * kColumns) / 2 + 8 * place_of(lane),
                    16);
        std::memcpy(bits[lane][h], meta + (r * cols + word * kColumns) / 8, 8);
      }
    for (int s = 0; s < kSteps; ++s) {
      Warp w;
      for (int lane = 0; lane < 32; ++lane) {
        a_registers(row[lane][0], row[lane][1], s, w.a[lane]);
        for (int i = 0; i < 4; ++i) w.b[lane][i] = stage[b_word(s, i, lane)];
        w.e[lane] = metadata(bits[lane][0], bits[lane][1], place_of(lane));
      }
      mma_sp(w, s, sum);
    }
  }
  std::memcpy(y, sum, sizeof(sum));
}

// The lane and the lowest bit of the indices of chunk `u` of row `r`, as [lane, shift].
void documented_metadata(int r, int u, int selector, int* out) {
  const IndexPlace at = index_place(r, u, selector);
  out[0] = at.lane;
  out[1] = at.shift;
}

// How often x_words() names each of a tile's words.
void staged_words(int* count) {
  for (int token = 0; token < kTileTokens; ++token)
    for (int q = 0; q < 8; ++q) {
      int to[4];
      x_words(token, q, to);
      for (int i = 0; i < 4; ++i) ++count[to[i]];
    }
}

int tile_words() { return kTileWords; }
int step_words() { return kStepWords; }

// The largest number of lanes that meet in one bank when lanes store piece k of their tokens
// together, as store_x() has them: token lane / 4, piece 4 half + lane % 4.
int worst_bank_conflict() {
  int worst = 0;
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 4; ++i) {
      int lanes[32] = {};
      for (int lane = 0; lane < 32; ++lane) {
        int to[4];
        x_words(quad_of(lane), 4 * half + place_of(lane), to);
        const int n = ++lanes[to[i] % 32];
        worst = n > worst ? n : worst;
      }
    }
  return worst;
}
}
