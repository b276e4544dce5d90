// The PTX instruction prmt, with its sign mode, which `__byte_perm` leaves out.
#pragma once

#include <cstdint>

namespace pyprune {

// Byte i of the result is the byte of (b, a) that nibble i of `selector` names: 0 to 3 of a, 4 to 7
// of b; eight more, and its sign bit fills the byte.
__device__ inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
  return out;
}

}  // namespace pyprune
