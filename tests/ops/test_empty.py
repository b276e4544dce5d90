"""Every function of `pyprune._C`, called around the checks of `pyprune.ops`: sizes of zero are a
no-op or a ValueError, never a division by zero."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.dlpack import to_dlpack

_C = pytest.importorskip("pyprune._C")

from ops.empty_calls import CALLS, capsules, cases  # noqa: E402

# What has no tensors, and the class that is one of the products, which are here, made ready.
OTHERS = {"has_cuda", "isa", "set_isa", "PreparedLinear"}
FUNCTIONS = {name for name in dir(_C) if not name.startswith("_") and callable(getattr(_C, name))}
CUDA = sorted(name for name in FUNCTIONS if name.endswith("_cuda"))
# Sizes that a call cannot have, and how it says so.
REFUSED = {
    "linear_coded": ({"C"}, "refused: low: expected two dimensions and a column"),
    "unpack_coded": ({"C"}, "refused: low: expected two dimensions and a column"),
    "linear_": ({"C"}, "refused: x: expected at least one column"),
    "obs_greedy": ({"C"}, "refused: order: expected at most as many steps as weights"),
    "kept_bytes": ({"n"}, "refused: bytes: expected at least 1"),
}


@pytest.fixture(scope="module")
def outcomes():
    """Of every case, from a process of their own; it is started again after a crash."""
    found: dict[int, str] = {}
    script, begin = Path(__file__).with_name("empty_calls.py"), 0
    while begin < len(cases()):
        child = subprocess.run(
            [sys.executable, script, str(begin)], capture_output=True, text=True, check=False
        )
        found |= dict(map(json.loads, child.stdout.splitlines()))
        last = max(found, default=-1)
        assert last >= begin, child.stderr
        if child.returncode == 0:
            break
        assert child.returncode < 0, child.stderr
        found[last], begin = f"died of signal {-child.returncode}", last + 1
    return found


def test_all_functions_are_called():
    here = {call.partition(",")[0] for call in CALLS}
    assert here == FUNCTIONS - OTHERS - set(CUDA)


@pytest.mark.parametrize("call", CALLS)
def test_sizes_of_zero(call, outcomes):
    prefix = next((p for p in REFUSED if call.startswith(p)), None)
    said = {}
    for number, (of, sizes) in enumerate(cases()):
        if of != call:
            continue
        got, zero = outcomes[number], {name for name, size in sizes.items() if size == 0}
        expected = ["done"]
        if prefix is not None and zero & REFUSED[prefix][0]:
            expected = [REFUSED[prefix][1], "done"] if len(zero) > 1 else [REFUSED[prefix][1]]
        said |= {} if got in expected else {str(sizes): got}
    assert said == {}


@pytest.mark.parametrize("call", CUDA)
def test_gpu_functions_take_no_cpu_tensors(call):
    """Nor empty ones: what they do with those of a GPU is the business of tests that have one."""
    wanted = getattr(_C, call).__doc__.splitlines()[0].partition("(")[2].partition(")")[0]
    arguments = []
    for part in wanted.split(", "):
        kind = part.partition(": ")[2].lower()  # pybind11 2: List, Optional, capsule
        if "list" in kind:
            arguments.append([torch.ones(0, 8)])
        elif "none" in kind or "optional" in kind:
            arguments.append(None)
        else:
            arguments.append(torch.ones(0, 8) if "capsule" in kind else 1)
    with pytest.raises(ValueError, match="expected"):
        getattr(_C, call)(*map(capsules, arguments))


def said_to_be_on_a_gpu(t):
    """A capsule whose device, the number behind the pointer to its memory, is a GPU."""
    capsule, pointer_of = to_dlpack(t), ctypes.pythonapi.PyCapsule_GetPointer
    pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    ctypes.c_int32.from_address(pointer_of(capsule, b"dltensor") + 8).value = 2
    return capsule


@pytest.mark.parametrize("call", sorted({"mask_nm_cuda", "mask_topk_cuda"} & set(CUDA)))
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_masks_of_nothing_are_refused_before_they_are_launched(call, shape):
    # How a launch is shared out would be asked of the number of blocks, which is zero.
    tensors = (torch.empty(shape, dtype=torch.bool), torch.empty(shape))
    numbers = (2, 4) if call == "mask_nm_cuda" else (1,)
    with pytest.raises(ValueError, match="w: expected at least one row and one column"):
        getattr(_C, call)(*map(said_to_be_on_a_gpu, tensors), *numbers, *[None] * 4, 0, 1)
