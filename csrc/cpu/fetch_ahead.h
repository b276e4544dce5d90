#pragma once

#include <algorithm>
#include <cstdint>

namespace pyprune {
namespace PYPRUNE_ISA {

// Values fetched into the second level ahead of their use, as one stream in the order in which they
// are stored: rows are read several at a time and are too short for the hardware to foresee, and
// one stream meets a new page once, where one a row meets as many at the same moment.
class FetchAhead {
 public:
  // Before a block of rows that takes `steps` steps: what is stored up to `until`, evenly. In fewer
  // and larger portions the memory would wait for the last of them.
  void plan(const char* block, const char* until, int64_t steps) {
    next_ = std::max(next_, block);
    distance_ = until - block;
    bytes_a_step_ = until > next_ ? (until - next_ + steps - 1) / steps : 0;
  }
  void step() {
    for (int64_t b = 0; b < bytes_a_step_; b += 64) __builtin_prefetch(next_ + b, 0, 2);
    next_ += bytes_a_step_;
  }
  // Bytes from the block to the next.
  int64_t distance() const { return distance_; }

 private:
  const char* next_ = nullptr;
  int64_t bytes_a_step_ = 0, distance_ = 0;
};

}  // namespace PYPRUNE_ISA
}  // namespace pyprune
