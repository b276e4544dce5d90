// AMX on a processor without it: its instructions raise SIGILL, and are carried out here.
//
// For test_amx.py, which loads it into a process of its own. What the processor would refuse (no
// configuration, shapes that do not go together) ends the process. Intel's manual, volume 2
// (TDPBF16PS, TILELOADD, LDTILECFG) and volume 1, chapter 18.
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxBytes = 64;

struct Tile {
  int rows, bytes;  // as configured
  uint8_t data[kMaxRows][kMaxBytes];
};
struct State {
  bool configured;
  Tile tiles[kTiles];
};
thread_local State state;
std::atomic<int64_t> products{0}, configurations{0}, releases{0};

[[noreturn]] void refuse(const char* why) {
  std::fprintf(stderr, "amx_emulator: %s\n", why);
  std::_Exit(70);
}

Tile& tile(int i) {
  if (!state.configured) refuse("a tile is used that is not configured");
  if (i < 0 || i >= kTiles || !state.tiles[i].rows) refuse("no such tile");
  return state.tiles[i];
}

void configure(const uint8_t* config) {
  if (config[0] != 1) refuse("palette 1 is the only one");
  if (config[1] != 0) refuse("start row");
  std::memset(&state, 0, sizeof state);
  state.configured = true;
  for (int t = 0; t < kTiles; ++t) {
    uint16_t bytes;
    std::memcpy(&bytes, config + 16 + 2 * t, 2);
    const int rows = config[48 + t];
    if (bytes > kMaxBytes || bytes % 4 || rows > kMaxRows) refuse("a tile is too large");
    if (!bytes != !rows) refuse("a tile has rows without columns, or columns without rows");
    state.tiles[t].rows = rows, state.tiles[t].bytes = bytes;
  }
  ++configurations;
}

float widened(const uint8_t* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  uint32_t u = uint32_t{half} << 16;
  if (!(u & 0x7f800000u)) u &= 0x80000000u;  // subnormal numbers are zeros
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

void multiply(int to, int left, int right) {
  if (to == left || to == right || left == right) refuse("the tiles of a product are three");
  Tile &c = tile(to), &a = tile(left), &b = tile(right);
  if (c.rows != a.rows || c.bytes != b.bytes || a.bytes / 4 != b.rows)
    refuse("the tiles of a product do not go together");
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.bytes / 4; ++n) {
      float sum, even = 0, odd = 0;
      for (int k = 0; k < b.rows; ++k) {
        even += widened(a.data[m] + 4 * k) * widened(b.data[k] + 4 * n);
        odd += widened(a.data[m] + 4 * k + 2) * widened(b.data[k] + 4 * n + 2);
      }
      std::memcpy(&sum, c.data[m] + 4 * n, 4);
      sum += even + odd;
      std::memcpy(c.data[m] + 4 * n, &sum, 4);
    }
  ++products;
}

// A general register by its number in an instruction.
int64_t value_of(const mcontext_t& m, int number) {
  static const int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                 REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                 REG_R12, REG_R13, REG_R14, REG_R15};
  return m.gregs[kOrder[number]];
}

struct Operand {
  int64_t address, stride;
  int length;  // bytes of ModRM, SIB and displacement
};

// The memory operand of an instruction whose ModRM is at p; `after` follows its opcode.
Operand operand(const mcontext_t& m, const uint8_t* p, bool more_index, bool more_base) {
  const int mod = p[0] >> 6, rm = p[0] & 7;
  Operand o{0, 0, 1};
  bool has_base = true;
  int base = rm;
  if (rm == 4) {
    const int scale = p[1] >> 6, index = (p[1] >> 3 & 7) | (more_index ? 8 : 0);
    base = p[1] & 7;
    o.length = 2;
    if (index != 4) o.stride = value_of(m, index) << scale;
    has_base = base != 5 || mod != 0;
  } else if (mod == 0 && rm == 5) {
    refuse("an address relative to the instruction");
  }
  if (has_base) o.address = value_of(m, base | (more_base ? 8 : 0));
  if (mod == 1) {
    o.address += static_cast<int8_t>(p[o.length]);
    o.length += 1;
  } else if (mod == 2 || !has_base) {
    int32_t shift;
    std::memcpy(&shift, p + o.length, 4);
    o.address += shift;
    o.length += 4;
  }
  return o;
}

void on_illegal(int, siginfo_t*, void* context) {
  mcontext_t& m = static_cast<ucontext_t*>(context)->uc_mcontext;
  const auto* p = reinterpret_cast<const uint8_t*>(m.gregs[REG_RIP]);
  enum { kNone, k66, kF3, kF2 };
  const int prefix = p[2] & 3, opcode = p[3], modrm = p[4];
  if (p[0] != 0xc4 || (p[1] & 31) != 2 || p[2] & 0x84) refuse("not an instruction of AMX");
  const bool in_memory = modrm >> 6 != 3;
  const int reg = modrm >> 3 & 7, rm = modrm & 7;
  int length = 5;
  if (opcode == 0x49 && prefix == kNone && !in_memory && modrm == 0xc0) {
    std::memset(&state, 0, sizeof state);
    ++releases;
  } else if (opcode == 0x5c && prefix == kF3 && !in_memory) {
    multiply(reg, rm, ~(p[2] >> 3) & 15);
  } else if (in_memory && (opcode == 0x49 || opcode == 0x4b)) {
    const Operand o = operand(m, p + 4, !(p[1] & 0x40), !(p[1] & 0x20));
    length = 4 + o.length;
    if (opcode == 0x49 && prefix == kNone) {
      configure(reinterpret_cast<const uint8_t*>(o.address));
    } else if (opcode == 0x4b && (prefix == kF2 || prefix == kF3)) {
      Tile& t = tile(reg);
      for (int r = 0; r < t.rows; ++r) {
        auto* memory = reinterpret_cast<uint8_t*>(o.address + r * o.stride);
        if (prefix == kF2)
          std::memcpy(t.data[r], memory, t.bytes);
        else
          std::memcpy(memory, t.data[r], t.bytes);
      }
    } else {
      refuse("an instruction of AMX that is not known here");
    }
  } else {
    refuse("an instruction of AMX that is not known here");
  }
  m.gregs[REG_RIP] += length;
}

}  // namespace

extern "C" {

void start() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}
// So far, of all threads; and whether this thread's tiles are configured.
int64_t products_made() { return products; }
int64_t configurations_made() { return configurations; }
int64_t releases_made() { return releases; }
int is_configured() { return state.configured; }
}
