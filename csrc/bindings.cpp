// The Python module pyprune._C. Each op family binds itself in csrc/bind/<family>.cpp: capsules
// become TensorViews, are checked, the GIL is released and the kernel is called. bind_list.h (from
// CMakeLists.txt) lists them. They are compiled several at once (a unity build): what is in an
// unnamed namespace there needs a name of its own all the same.
#include <pybind11/pybind11.h>

#include "bind/checks.h"
#include "cpu/dispatch.h"

namespace pyprune {
#define PYPRUNE_BIND(family) void bind_##family(pybind11::module_& m);
#include "bind_list.h"
#undef PYPRUNE_BIND
}  // namespace pyprune

PYBIND11_MODULE(_C, m) {
  using namespace pyprune;
  m.doc() = "pyprune's native kernels. Call them through pyprune.ops.";
  m.def("isa", [] {
    static const char* names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
    return std::string(names[static_cast<int>(current_isa())]);
  });
  m.def("set_isa", [](const std::string& name) {
    Isa isa;
    if (name == "portable")
      isa = Isa::portable;
    else if (name == "avx2")
      isa = Isa::avx2;
    else if (name == "avx512")
      isa = Isa::avx512;
    else if (name == "avx512_bf16")
      isa = Isa::avx512_bf16;
    else if (name == "best")
      isa = best_isa();
    else
      throw std::invalid_argument("expected portable, avx2, avx512, avx512_bf16 or best, got " +
                                  name);
    require(static_cast<int>(isa) <= static_cast<int>(best_isa()),
            "this processor does not have " + name);
    isa_slot().store(static_cast<int>(isa));
  });
#ifdef PYPRUNE_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
#define PYPRUNE_BIND(family) bind_##family(m);
#include "bind_list.h"
#undef PYPRUNE_BIND
}
