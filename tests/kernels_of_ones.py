"""Takes every Triton kernel through the compiler's front end with one integer argument after the
other being 1; see test_kernel_arguments.py.

A launch makes a constant of such an argument, which has no methods, and only of the compiler's: the
interpreter does not see it. Writes a JSON line for each that fails, then how many were tried.
"""

import json
import sys

import aot
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

TARGET = GPUTarget("cuda", 90, 32)
BACKEND = make_backend(TARGET)


def compile_front(kernel, signature: dict[str, str], constants: dict) -> None:
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    options = BACKEND.parse_options({"enable_fp_fusion": True})
    implementation = BACKEND.get_codegen_implementation(options)
    source = ASTSource(kernel, signature, constexprs=constants)
    source.make_ir(TARGET, options, implementation, BACKEND.get_module_map(), context)


def main() -> None:
    tried = set()
    for family, spec in aot.specs([]):
        kernel, constants = spec["kernel"], spec.get("constexprs", {})
        # Sizes of blocks change nothing here, branches do.
        branches = {k: v for k, v in constants.items() if isinstance(v, bool | None)}
        for name in kernel.arg_names:
            integer = name not in constants and spec["signature"][name] in ("i32", "i64")
            case = (family, kernel.__name__, name, str(branches))
            if not integer or name in (kernel.do_not_specialize or ()) or case in tried:
                continue
            tried.add(case)
            fixed = {**constants, name: 1}
            signature = {
                n: "constexpr" if n in fixed else spec["signature"][n] for n in kernel.arg_names
            }
            try:
                compile_front(kernel, signature, fixed)
            except Exception as error:  # whatever the compiler says of it
                sys.stdout.write(json.dumps([*case, str(error)]) + "\n")
    sys.stdout.write(json.dumps(len(tried)) + "\n")


if __name__ == "__main__":
    main()
