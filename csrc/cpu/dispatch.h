// Run-time choice of instruction set for the CPU kernels.
//
// PYPRUNE_CPU_KERNEL(name, Args) declares name(const Args&) in the three instruction-set namespaces
// and defines the dispatcher pyprune::name. The kernel's source is compiled once per set with
// PYPRUNE_ISA naming the namespace to define it in. avx512_bf16 (AVX-512 with BF16, VBMI, VBMI2 and
// VPOPCNTDQ) and avx512_amx (that with matrix tiles of bf16) have no namespaces of their own: the
// AVX-512 kernels that use them ask current_isa(). Nor has neon_bf16: portable code for aarch64
// asks.
#pragma once

#include <atomic>

#include "cpu/processor.h"

namespace pyprune {

inline Isa best_isa() { return processor().best; }

inline std::atomic<int>& isa_slot() {
  static std::atomic<int> slot{static_cast<int>(best_isa())};
  return slot;
}

inline Isa current_isa() { return static_cast<Isa>(isa_slot().load(std::memory_order_relaxed)); }

}  // namespace pyprune

#if defined(__x86_64__)
#define PYPRUNE_CPU_KERNEL(name, Args) \
  namespace portable {                 \
  void name(const Args& args);         \
  }                                    \
  namespace avx2 {                     \
  void name(const Args& args);         \
  }                                    \
  namespace avx512 {                   \
  void name(const Args& args);         \
  }                                    \
  inline void name(const Args& args) { \
    switch (current_isa()) {           \
      case Isa::avx512_amx:            \
      case Isa::avx512_bf16:           \
      case Isa::avx512:                \
        return avx512::name(args);     \
      case Isa::avx2:                  \
        return avx2::name(args);       \
      default:                         \
        return portable::name(args);   \
    }                                  \
  }
#else
#define PYPRUNE_CPU_KERNEL(name, Args) \
  namespace portable {                 \
  void name(const Args& args);         \
  }                                    \
  inline void name(const Args& args) { portable::name(args); }
#endif
