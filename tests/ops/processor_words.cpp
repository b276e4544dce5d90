// csrc/cpu/processor.h as C functions, for test_processor.py.
#include "cpu/processor.h"

namespace {

pyprune::CpuidWords faked(const uint32_t* words) {
  pyprune::CpuidWords cpu{};
  for (int i = 0; i < pyprune::CpuidWords::kWords; ++i) cpu.words[i] = words[i];
  return cpu;
}

}  // namespace

extern "C" {

int best_of(const uint32_t* words) {
  return static_cast<int>(pyprune::processor_of(faked(words)).best);
}
int arm_best_of(uint64_t hwcap2) {
  return static_cast<int>(pyprune::arm_processor_of(hwcap2).best);
}
int includes(int best, int isa) {
  return pyprune::includes(static_cast<pyprune::Isa>(best), static_cast<pyprune::Isa>(isa));
}
int moves_bytes(const uint32_t* words) { return pyprune::processor_of(faked(words)).moves_bytes; }

int extensions() { return sizeof pyprune::kExtensions / sizeof *pyprune::kExtensions; }
const char* name_of(int i) { return pyprune::kExtensions[i].name; }
int word_of(int i) { return pyprune::kExtensions[i].word; }
int bit_of(int i) { return pyprune::kExtensions[i].bit; }
int set_of(int i) { return static_cast<int>(pyprune::kExtensions[i].set); }

int words_here(uint32_t* words) {
  const pyprune::CpuidWords cpu = pyprune::read_cpuid();
  for (int i = 0; i < pyprune::CpuidWords::kWords; ++i) words[i] = cpu.words[i];
  return pyprune::CpuidWords::kWords;
}
}
