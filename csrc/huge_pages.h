// Advice to back a large, freshly allocated output with huge pages.
//
// An output of tens of megabytes comes from fresh pages: touching 16 MiB of mask 4 KiB at a time
// took 6 ms of faults where the selection itself took 8. With 2 MiB pages there are eight faults.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "tensor_view.h"

namespace pyprune {

// Only advice: the kernel may be configured to ignore it, and a failure changes nothing.
inline void prefer_huge_pages(const TensorView& out, int64_t element_bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(out.data) + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = reinterpret_cast<uintptr_t>(out.data) + out.numel() * element_bytes;
  if (!out.on_cuda && end >= begin + 2 * kHuge)
    madvise(reinterpret_cast<void*>(begin), (end - begin) / kHuge * kHuge, MADV_HUGEPAGE);
#else
  (void)out, (void)element_bytes;
#endif
}

}  // namespace pyprune
