// Which bytes a shuffle takes to spread values over eight columns, or to move them together.
#pragma once

#include <cstdint>

namespace pyprune {
namespace PYPRUNE_ISA {

// For each mask of eight columns, which of the next eight values a column takes; 0x80, which makes
// a byte shuffle give zero, for a column that is not kept.
struct PickTable {
  uint8_t pick[256][8];
  constexpr PickTable() : pick() {
    for (int mask = 0; mask < 256; ++mask) {
      int next = 0;
      for (int j = 0; j < 8; ++j) {
        const bool kept = (mask >> j) & 1;
        pick[mask][j] = static_cast<uint8_t>(kept ? next : 0x80);
        next += kept;
      }
    }
  }
};
constexpr PickTable kPicks;

// The same as bytes of values of kValue bytes each, which end up in the highest bytes of elements
// of kElement: a bf16 number in one of four is widened where it lands.
template <int kValue, int kElement>
struct SpreadTable {
  uint8_t pick[256][8 * kElement];
  constexpr SpreadTable() : pick() {
    for (int mask = 0; mask < 256; ++mask)
      for (int j = 0; j < 8; ++j)
        for (int byte = 0; byte < kElement; ++byte) {
          const int from = kPicks.pick[mask][j], at = byte - (kElement - kValue);
          pick[mask][kElement * j + byte] =
              static_cast<uint8_t>(from == 0x80 || at < 0 ? 0x80 : kValue * from + at);
        }
  }
};
template <int kValue, int kElement>
alignas(32) constexpr SpreadTable<kValue, kElement> kSpread;

// For each mask of eight columns, the bytes of those that are kept, elements of kElement bytes.
template <int kElement>
struct CompressTable {
  uint8_t from[256][8 * kElement];
  constexpr CompressTable() : from() {
    for (int mask = 0; mask < 256; ++mask)
      for (int j = 0, next = 0; j < 8; ++j)
        if ((mask >> j) & 1)
          for (int byte = 0; byte < kElement; ++byte)
            from[mask][next++] = static_cast<uint8_t>(kElement * j + byte);
  }
};
template <int kElement>
alignas(32) constexpr CompressTable<kElement> kCompress;

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
