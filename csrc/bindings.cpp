// The Python module pyprune._C. Each op family binds itself in csrc/bind/<family>.cpp: capsules
// become TensorViews, are checked, the GIL is released and the kernel is called. bind_list.h (from
// CMakeLists.txt) lists them. They are compiled several at once (a unity build): what is in an
// unnamed namespace there needs a name of its own all the same.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <iterator>
#include <string_view>

#include "bind/checks.h"
#include "cpu/dispatch.h"

namespace pyprune {
#define PYPRUNE_BIND(family) void bind_##family(pybind11::module_& m);
#include "bind_list.h"
#undef PYPRUNE_BIND
}  // namespace pyprune

// In the order of Isa.
static constexpr std::string_view kIsaNames[] = {"portable",    "avx2",       "avx512",
                                                 "avx512_bf16", "avx512_amx", "neon_bf16"};

PYBIND11_MODULE(_C, m) {
  using namespace pyprune;
  m.doc() = "pyprune's native kernels. Call them through pyprune.ops.";
  m.def("isa", [] { return std::string(kIsaNames[static_cast<int>(current_isa())]); });
  // emulated: also a set that the processor lacks, for whoever emulates its instructions.
  m.def(
      "set_isa",
      [](const std::string& name, bool emulated) {
        const auto* found = std::find(std::begin(kIsaNames), std::end(kIsaNames), name);
        int isa = static_cast<int>(found - std::begin(kIsaNames));
        if (name == "best")
          isa = static_cast<int>(best_isa());
        else if (found == std::end(kIsaNames))
          throw std::invalid_argument(
              "expected portable, avx2, avx512, avx512_bf16, avx512_amx, neon_bf16 or best, got " +
              name);
        require(emulated || includes(best_isa(), static_cast<Isa>(isa)),
                "this processor does not have " + name);
        isa_slot().store(isa);
      },
      pybind11::arg("name"), pybind11::arg("emulated") = false);
#ifdef PYPRUNE_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
#define PYPRUNE_BIND(family) bind_##family(m);
#include "bind_list.h"
#undef PYPRUNE_BIND
}
