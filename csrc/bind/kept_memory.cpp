// Memory for outputs of tens of megabytes, kept from one to the next.
//
// The C library gives blocks of more than 32 MiB back to the kernel when they are freed, so that
// every such output is made of fresh pages. To fault in and clear the 56 MiB mask of a 4096 x 14336
// matrix took 5 ms in huge pages and 29 ms where the kernel had none left; to select it takes 19.
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>

#include "bind/capsule.h"

namespace pyprune {
namespace {

constexpr size_t kHuge = size_t{2} << 20;
// No larger block is kept.
constexpr size_t kMostKept = size_t{512} << 20;

struct Block {
  char* data = nullptr;
  size_t bytes = 0;
};

Block map_block(size_t bytes) {
  const size_t rounded = (bytes + kHuge - 1) / kHuge * kHuge;
  void* all =
      mmap(nullptr, rounded + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  // Only whole, aligned huge pages can be huge.
  char* const begin = static_cast<char*>(all);
  const size_t before = (kHuge - reinterpret_cast<uintptr_t>(begin) % kHuge) % kHuge;
  if (before) munmap(begin, before);
  if (before < kHuge) munmap(begin + before + rounded, kHuge - before);
#ifdef MADV_HUGEPAGE
  madvise(begin + before, rounded, MADV_HUGEPAGE);
#endif
  return {begin + before, rounded};
}

// The last block that was given back. The kernel may take its pages when memory runs short.
class Kept {
 public:
  Block take(size_t bytes) {
    Block found;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (bytes <= block_.bytes && block_.bytes / 2 <= bytes) std::swap(found, block_);
    }
    return found.data ? found : map_block(bytes);
  }
  void give(Block block) {
    if (block.bytes <= kMostKept) {
#ifdef MADV_FREE
      madvise(block.data, block.bytes, MADV_FREE);
#endif
      const std::lock_guard<std::mutex> lock(mutex_);
      std::swap(block, block_);
    }
    if (block.data) munmap(block.data, block.bytes);
  }

 private:
  std::mutex mutex_;
  Block block_;
};

// Never destroyed: tensors may be freed after the module's static objects.
Kept& kept() {
  static Kept& instance = *new Kept;
  return instance;
}

// The DLPack ABI: what a consumer of the capsule owns and calls when it is done.
struct Managed {
  DLTensor tensor;
  void* context;
  void (*deleter)(Managed*);
  int64_t size;
  Block block;
};

void release(Managed* managed) {
  kept().give(managed->block);
  delete managed;
}

// A capsule that nobody has consumed.
void release_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  release(static_cast<Managed*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

}  // namespace

void bind_kept_memory(py::module_& m) {
  // `bytes` uninitialised bytes as a DLPack capsule of a one-dimensional uint8 tensor.
  m.def("kept_bytes", [](int64_t bytes, int /*threads*/) {
    require(bytes > 0, "bytes: expected at least 1");
    auto* managed = new Managed{{}, nullptr, release, bytes, {}};
    try {
      managed->block = kept().take(static_cast<size_t>(bytes));
    } catch (...) {
      delete managed;
      throw;
    }
    constexpr uint8_t kUInt = 1;
    constexpr int32_t kCPU = 1;
    managed->tensor = {managed->block.data, {kCPU, 0}, 1, {kUInt, 8, 1},
                       &managed->size,      nullptr,   0};
    return py::reinterpret_steal<py::capsule>(PyCapsule_New(managed, "dltensor", release_capsule));
  });
}

}  // namespace pyprune
