// Which of the kernels' instruction sets a processor runs, from what CPUID says of it; on aarch64
// from what Linux says.
//
// A set is there only with every extension that its kernels are compiled with (CMakeLists.txt, the
// `target` pragmas): processors and hypervisors leave out any one of them. Nor is an extension
// enough whose registers the operating system does not save (XCR0).
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__AARCH64EL__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyprune {

// x86's in rising order; each has what those before it have. aarch64 has the first and the last.
enum class Isa : int {
  portable = 0,
  avx2 = 1,
  avx512 = 2,
  avx512_bf16 = 3,
  avx512_amx = 4,
  neon_bf16 = 5
};

// The words that describe an x86 processor; all zero on others.
struct CpuidWords {
  enum Word { leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_1_eax, leaf7_edx, xcr0, kWords };
  uint32_t words[kWords];
};

// An extension by the compiler's name for it, its bit, and the first set that needs it.
struct Extension {
  const char* name;
  CpuidWords::Word word;
  int bit;
  Isa set;
};

constexpr Extension kExtensions[] = {
    {"popcnt", CpuidWords::leaf1_ecx, 23, Isa::avx2},
    {"fma", CpuidWords::leaf1_ecx, 12, Isa::avx2},
    {"f16c", CpuidWords::leaf1_ecx, 29, Isa::avx2},
    {"bmi", CpuidWords::leaf7_ebx, 3, Isa::avx2},
    {"avx2", CpuidWords::leaf7_ebx, 5, Isa::avx2},
    {"bmi2", CpuidWords::leaf7_ebx, 8, Isa::avx2},
    {"avx512f", CpuidWords::leaf7_ebx, 16, Isa::avx512},
    {"avx512dq", CpuidWords::leaf7_ebx, 17, Isa::avx512},
    {"avx512bw", CpuidWords::leaf7_ebx, 30, Isa::avx512},
    {"avx512vl", CpuidWords::leaf7_ebx, 31, Isa::avx512},
    {"avx512vbmi", CpuidWords::leaf7_ecx, 1, Isa::avx512_bf16},
    {"avx512vbmi2", CpuidWords::leaf7_ecx, 6, Isa::avx512_bf16},
    {"avx512vpopcntdq", CpuidWords::leaf7_ecx, 14, Isa::avx512_bf16},
    {"avx512bf16", CpuidWords::leaf7_1_eax, 5, Isa::avx512_bf16},
    {"amx-bf16", CpuidWords::leaf7_edx, 22, Isa::avx512_amx},
    {"amx-tile", CpuidWords::leaf7_edx, 24, Isa::avx512_amx},
};

struct Processor {
  Isa best;
  // AVX-512 VBMI and VBMI2, which move bytes and 16-bit lanes. The set avx512 does not promise
  // them: its kernels that use them ask.
  bool moves_bytes;
};

inline Processor processor_of(const CpuidWords& cpu) {
  const auto has = [&](CpuidWords::Word word, uint32_t bits) {
    return (cpu.words[word] & bits) == bits;
  };
  constexpr uint32_t kReadsXcr0 = 1u << 27, kAvx = 1u << 28;
  // XMM, YMM; mask registers, all of ZMM; the configuration and data of tiles.
  constexpr uint32_t kYmm = 0x06, kZmm = 0xe6, kTiles = 0x600e6;
  Isa best = Isa::avx512_amx;
  const auto at_most = [&](int set) {
    if (set < static_cast<int>(best)) best = static_cast<Isa>(set);
  };
  if (!has(CpuidWords::leaf1_ecx, kReadsXcr0 | kAvx) || !has(CpuidWords::xcr0, kYmm))
    at_most(static_cast<int>(Isa::portable));
  if (!has(CpuidWords::xcr0, kZmm)) at_most(static_cast<int>(Isa::avx2));
  if (!has(CpuidWords::xcr0, kTiles)) at_most(static_cast<int>(Isa::avx512_bf16));
  for (const Extension& e : kExtensions)
    if (!has(e.word, 1u << e.bit)) at_most(static_cast<int>(e.set) - 1);
  constexpr uint32_t kVbmi = 1u << 1, kVbmi2 = 1u << 6;
  return {best, best >= Isa::avx512 && has(CpuidWords::leaf7_ecx, kVbmi | kVbmi2)};
}

inline CpuidWords read_cpuid() {
  CpuidWords cpu{};
#if defined(__x86_64__)
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  cpu.words[CpuidWords::leaf1_ecx] = c;
  if (c >> 27 & 1) {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    cpu.words[CpuidWords::xcr0] = low;
  }
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  cpu.words[CpuidWords::leaf7_ebx] = b;
  cpu.words[CpuidWords::leaf7_ecx] = c;
  cpu.words[CpuidWords::leaf7_edx] = d;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.words[CpuidWords::leaf7_1_eax] = a;
#endif
  return cpu;
}

// Linux saves the 8 KiB of tiles for those processes alone that ask for it. Asked once, when the
// first kernel is called; threads that are there already may use them too.
inline bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// An aarch64 processor by its AT_HWCAP2, whose bit 14 is HWCAP2_BF16: `bfmmla` and its kin.
inline Processor arm_processor_of(uint64_t hwcap2) {
  constexpr uint64_t kBf16 = 1u << 14;
  return {hwcap2 & kBf16 ? Isa::neon_bf16 : Isa::portable, false};
}

inline const Processor& processor() {
#if defined(__AARCH64EL__)
  static const Processor found = arm_processor_of(getauxval(AT_HWCAP2));
#else
  static const Processor found = [] {
    Processor best = processor_of(read_cpuid());
    if (best.best == Isa::avx512_amx && !may_use_tiles()) best.best = Isa::avx512_bf16;
    return best;
  }();
#endif
  return found;
}

// Whether a processor whose best set is `best` has `isa`.
inline bool includes(Isa best, Isa isa) {
  if (best == Isa::neon_bf16) return isa == Isa::portable || isa == best;
  return isa <= best;
}

}  // namespace pyprune
