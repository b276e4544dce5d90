// A block of csrc/cuda/linear_bitmap.cu on the CPU: every address, count, shift and expansion comes
// from the functions that the kernel calls (csrc/cuda/bitmap_lanes.h); shuffles read the other
// lane's variable, copies are copies, and mma.m16n8k16 is replaced by its description in the PTX
// ISA
// ("Matrix Fragments for mma.m16n8k16 with floating point type"). Built and called by
// test_linear_bitmap_cuda.py.
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/bitmap_lanes.h"

using namespace pyprune::bitmap_lanes;

namespace {

float bf16_value(uint32_t word, int element) {
  return float_of((word >> (16 * element) & 0xffff) << 16);
}

// d[16][8] += A[16][16] B[16][8]. A lane's elements i of A and B lie in register i / 2.
void mma(const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], float (&d)[16][8]) {
  float wide_a[16][16], wide_b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane >> 2, in_group = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int row = i < 2 || (4 <= i && i < 6) ? group : group + 8;
      const int column = 2 * in_group + (i & 1) + (i < 4 ? 0 : 8);
      wide_a[row][column] = bf16_value(a[lane][i / 2], i % 2);
    }
    for (int i = 0; i < 4; ++i)
      wide_b[2 * in_group + (i & 1) + (i < 2 ? 0 : 8)][group] = bf16_value(b[lane][i / 2], i % 2);
  }
  for (int r = 0; r < 16; ++r)
    for (int n = 0; n < 8; ++n)
      for (int k = 0; k < 16; ++k) d[r][n] += wide_a[r][k] * wide_b[k][n];
}

struct Matrix {
  const uint16_t* values;
  int64_t count;  // of values
  const uint32_t* bitmap;
  const int64_t* row_offsets;
  int rows, words;
};

// A warp on L::kRows rows of W from `first_row` and `tokens` rows of x, from its first turn to its
// last. sum: [rows of the turn][tokens].
template <int kSegments>
struct Warp {
  using L = Lanes<kSegments>;
  const Matrix& w;
  int first_row;
  uint32_t position[32][2];
  std::vector<uint8_t> shared;
  int64_t loads = 0, cycles = 0;  // of a word a lane; cycles: the most words in one bank

  Warp(const Matrix& w, int first_row, int stage)
      : w(w), first_row(first_row), shared((stage + 1) * L::kTurnBytes + L::kPadBytes, 0xff) {
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half)
        position[lane][half] = static_cast<uint32_t>(w.row_offsets[row_of(lane, half)]);
  }
  int row_of(int lane, int half) const {
    const int row = first_row + L::row_of(lane, half);
    return row < w.rows ? row : w.rows - 1;
  }

  // As the kernel's: false if a copy left the lane's row of the stage, or a read the values.
  bool copy_values(int lane, uint32_t row, uint32_t at, uint32_t count) {
    const int place = L::place_of(lane);
    const uint32_t first = at / kChunkValues, chunks = chunks_of(at % kChunkValues, count);
    const uint32_t values = static_cast<uint32_t>(w.count);
    if (chunks > uint32_t(L::kCopies * L::kAcross) || chunks * kChunkBytes > L::kRowBytes)
      return false;
    for (int k = 0; k < L::kCopies; ++k) {
      const uint32_t c = place + k * L::kAcross;
      if (c >= chunks) break;
      uint8_t* to = &shared[row + c * kChunkBytes];
      const bool whole = chunks_whole(first, chunks, values);
      const uint32_t held = whole ? kChunkValues : chunk_values(first + c, values);
      const int64_t from = int64_t(first + c) * kChunkValues;
      if (held && from + held > w.count) return false;
      std::memset(to, 0, kChunkBytes);
      if (held) std::memcpy(to, w.values + from, 2 * held);
    }
    return true;
  }

  // One turn: expands its elements to `elements` [rows of the turn][columns of the turn] and
  // multiplies with x [tokens][words * 32] into d.
  bool turn(int number, int stage, const uint16_t* x, int tokens, uint16_t* elements,
            float (&d)[2][16][8]) {
    uint32_t word[32][2], own[32], sum[32], before[32];
    for (int lane = 0; lane < 32; ++lane) {
      const int at = number * L::kWords + L::place_of(lane);
      for (int half = 0; half < 2; ++half)
        word[lane][half] = at < w.words ? w.bitmap[int64_t(row_of(lane, half)) * w.words + at] : 0;
      own[lane] = sum[lane] = pack_counts(count_bits(word[lane][0]), count_bits(word[lane][1]));
    }
    for (int d = 1; d < L::kAcross; d *= 2)
      for (int lane = 31; lane >= 0; --lane)
        if (L::place_of(lane) >= d) sum[lane] += sum[lane - d];
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t all = sum[lane - L::place_of(lane) + L::kAcross - 1];
      uint32_t start[2];
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = stage * L::kTurnBytes + L::row_of(lane, half) * L::kRowBytes;
        start[half] = row + 2 * (position[lane][half] % kChunkValues);
        if (!copy_values(lane, row, position[lane][half], unpack_count(all, half))) return false;
        position[lane][half] += unpack_count(all, half);
      }
      before[lane] = 2 * (sum[lane] - own[lane]) + pack_counts(start[0], start[1]);
    }
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[32][4], b[2][32][2];
      for (int half = 0; half < 2; ++half) {
        uint32_t first[32];
        for (int lane = 0; lane < 32; ++lane) {
          const int place = L::place_of(lane), shift = L::shift_of(step, place);
          const int owner = lane - place + L::owner_of(step, place);
          const uint32_t at =
              position_of(word[owner][half], shift, unpack_count(before[owner], half));
          first[lane] = at / 4;
          uint32_t window[3], pair[2];
          if (4 * first[lane] + sizeof(window) > shared.size()) return false;
          std::memcpy(window, &shared[4 * first[lane]], sizeof(window));
          const uint32_t bits = word[owner][half] >> shift;
          expand(kSpread, selectors_of(bits), window, at, bits, pair);
          a[lane][half] = pair[0];
          a[lane][2 + half] = pair[1];
          if (elements)
            std::memcpy(elements + L::row_of(lane, half) * L::kColumns + L::column_of(step, place),
                        pair, 8);
        }
        meet(first);
      }
      for (int tile = 0; tile < 2; ++tile)
        for (int lane = 0; lane < 32; ++lane) {
          const int token = tile * L::kTokens + L::token_of(lane);
          const int column = number * L::kColumns + L::column_of(step, L::place_of(lane));
          b[tile][lane][0] = b[tile][lane][1] = 0;
          if (token < tokens && column < 32 * w.words)
            std::memcpy(b[tile][lane], x + int64_t(token) * 32 * w.words + column, 8);
        }
      for (int tile = 0; tile < 2; ++tile) mma(a, b[tile], d[tile]);
    }
    return true;
  }

  // Counts the cycles of one load: distinct words of one bank take one each.
  void meet(const uint32_t (&first)[32]) {
    std::vector<uint32_t> seen[32];
    size_t most = 0;
    for (uint32_t word : first) {
      auto& bank = seen[word % 32];
      bool known = false;
      for (uint32_t other : bank) known |= other == word;
      if (!known) bank.push_back(word);
      most = bank.size() > most ? bank.size() : most;
    }
    ++loads;
    cycles += most;
  }
};

template <int kSegments>
int multiply(const Matrix& w, const uint16_t* x, int tokens, uint16_t* elements, float* y,
             double* cycles) {
  using L = Lanes<kSegments>;
  const int turns = (w.words + L::kWords - 1) / L::kWords;
  std::vector<uint16_t> block(L::kRows * L::kColumns);
  for (int first_row = 0; first_row < w.rows; first_row += L::kRows) {
    float d[2][16][8] = {}, by_register[2][16][8];
    Warp<kSegments> warp(w, first_row, 2);
    for (int t = 0; t < turns; ++t) {
      if (!warp.turn(t, t % 3, x, tokens, block.data(), d)) return -1;
      for (int r = 0; r < L::kRows && first_row + r < w.rows; ++r)
        for (int c = 0; c < L::kColumns && t * L::kColumns + c < 32 * w.words; ++c)
          elements[int64_t(first_row + r) * 32 * w.words + t * L::kColumns + c] =
              block[r * L::kColumns + c];
    }
    *cycles += double(warp.cycles) / warp.loads * L::kRows / w.rows;
    // Through the registers that hold it, to where the kernel's last part looks for it.
    for (int tile = 0; tile < 2; ++tile)
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 4; ++i)
          by_register[tile][product_row_of(lane, i)][product_column_of(lane, i)] =
              d[tile][(lane >> 2) + (i < 2 ? 0 : 8)][2 * (lane % 4) + (i & 1)];
    for (int r = 0; r < L::kRows && first_row + r < w.rows; ++r)
      for (int token = 0; token < tokens; ++token) {
        float total = 0;
        for (int s = 0; s < kSegments; ++s)
          total += by_register[token / L::kTokens][L::product_row(r, s)]
                              [L::product_column(token % L::kTokens, s)];
        y[int64_t(token) * w.rows + first_row + r] = total;
      }
  }
  return 0;
}

}  // namespace

extern "C" {

// W [rows, 32 words] expanded (elements) and multiplied with x [tokens, 32 words] (y [tokens,
// rows]) by warps with `segments` segments; tokens up to 2 * 8 / segments. Returns -1 if a copy
// leaves its row of the stage, a read the values or a window shared memory; cycles: that a load of values takes on
// average, more than one where words meet in a bank (rows a multiple of a turn's).
int emulate(int segments, const uint16_t* values, int64_t count, const uint32_t* bitmap,
            const int64_t* row_offsets, int rows, int words, const uint16_t* x, int tokens,
            uint16_t* elements, float* y, double* cycles) {
  const Matrix w{values, count, bitmap, row_offsets, rows, words};
  *cycles = 0;
  switch (segments) {
    case 8:
      return multiply<8>(w, x, tokens, elements, y, cycles);
    case 4:
      return multiply<4>(w, x, tokens, elements, y, cycles);
    case 2:
      return multiply<2>(w, x, tokens, elements, y, cycles);
    case 1:
      return multiply<1>(w, x, tokens, elements, y, cycles);
  }
  return -2;
}

// expand() of every nibble at every position in a word; out [16][2][4].
void expand_all(const uint16_t* values, uint32_t above, uint16_t* out) {
  for (uint32_t nibble = 0; nibble < 16; ++nibble)
    for (uint32_t position = 0; position < 2; ++position) {
      uint32_t window[3];
      std::memcpy(window, values, 12);
      uint32_t pair[2];
      const uint32_t bits = nibble | above << 4;
      expand(kSpread, selectors_of(bits), window, 2 * position, bits, pair);
      std::memcpy(out + (nibble * 2 + position) * 4, pair, 8);
    }
}

// The number after that of the last value read by copying `chunks` chunks from number `first` as the
// kernel does; 0 if none is.
int64_t end_of_reads(uint32_t first, uint32_t chunks, uint32_t values) {
  int64_t end = 0;
  for (uint32_t c = first; c < first + chunks; ++c) {
    const uint32_t held =
        chunks_whole(first, chunks, values) ? kChunkValues : chunk_values(c, values);
    if (held) end = int64_t(c) * kChunkValues + held;
  }
  return end;
}

// Words of a row of `words` that block `block` of a cluster of `blocks` counts before its own, as
// linear_bitmap_wide_kernel() does.
int words_before_block(int words, int block, int blocks) {
  using L = Lanes<1>;
  const int turns = (words + L::kWords - 1) / L::kWords, slab = (turns + blocks - 1) / blocks;
  return L::words_before(block * slab < turns ? block * slab : turns, words);
}

// The three parts of each fp32 number, as the fp32 numbers that they are.
void parts(const float* v, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i)
    for (int part = 0; part < 3; ++part) out[3 * i + part] = float_of(bf16_part(v[i], part) << 16);
}

// Eight rows of 128 columns of x, numbered through, staged as linear_bitmap_wide_kernel() does:
// what each lane reads for each step [8][32][4]. Returns the most of sixteen lanes that meet in a
// bank.
int wide_x(int* columns) {
  using L = Lanes<1>;
  std::vector<uint16_t> stage(8 * L::kColumns);
  for (int token = 0; token < 8; ++token)
    for (int piece = 0; piece < L::kColumns / 8; ++piece)
      for (int i = 0; i < 8; ++i)
        stage[token * L::kColumns + wide_x_piece(token, piece) * 8 + i] =
            token * L::kColumns + piece * 8 + i;
  int worst = 0;
  for (int step = 0; step < kSteps; ++step) {
    int lanes_of[2][16] = {};  // half the warp; banks in pairs
    for (int lane = 0; lane < 32; ++lane) {
      const int token = L::token_of(lane), place = L::place_of(lane);
      const int at = token * 2 * L::kColumns + place % 2 * 8 +
                     wide_x_piece(token, 2 * step + place / 2) * int(kChunkBytes);
      const int n = ++lanes_of[lane / 16][at / 8 % 16];
      worst = n > worst ? n : worst;
      for (int i = 0; i < 4; ++i) columns[(step * 32 + lane) * 4 + i] = stage.at(at / 2 + i);
    }
  }
  return worst;
}

// [turn bytes, row bytes, rows of a turn, columns of a turn, copies of a lane]
void sizes(int segments, int* out) {
#define PYPRUNE_SIZES(S)                                                           \
  case S: {                                                                        \
    const int all[] = {Lanes<S>::kTurnBytes, Lanes<S>::kRowBytes, Lanes<S>::kRows, \
                       Lanes<S>::kColumns, Lanes<S>::kCopies};                     \
    std::memcpy(out, all, sizeof(all));                                            \
    break;                                                                         \
  }
  switch (segments) {
    PYPRUNE_SIZES(8)
    PYPRUNE_SIZES(4)
    PYPRUNE_SIZES(2)
    PYPRUNE_SIZES(1)
  }
#undef PYPRUNE_SIZES
}
}
