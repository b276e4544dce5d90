"""Calls `pyprune._C` directly with every set of sizes at zero; see test_empty.py.

Prints a JSON line before each call and after it, for one that divides by zero takes the process
with it. Argument: the number of the first call.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.dlpack import to_dlpack

from pyprune import _C

BOOL, BYTE, INT = torch.bool, torch.uint8, torch.int64


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def eyes(count: int, side: int) -> torch.Tensor:
    return torch.eye(side).expand(count, side, side).clone()


def _sweep(counted: bool) -> Callable[..., tuple]:
    def arguments(B: int, R: int, C: int) -> tuple:
        flags, groups = ones(B, R, C, dtype=BOOL), (C + 127) // 128
        counts = ones(B, R, groups, dtype=torch.int32) if counted else None
        own = (ones(B, R, C), flags, ones(B, R), ones(B, R, C), eyes(B, C), counts, None)
        return (*own, flags.clone(), ones(B, C), ones(B, 3, R), 2, 4, 128, False, 1)

    return arguments


def _reconstruct(R: int, C: int, K: int) -> tuple:
    rows = (torch.zeros(R, dtype=torch.float64) for _ in range(3))
    values = (ones(R, C), ones(R, C), ones(R, C, dtype=BOOL), torch.eye(C), ones(8 * K, C))
    steps = torch.zeros(R, dtype=torch.int32)
    return (*values, ones(C), *rows, steps, 0.5, 1e-3, 3, 1)


def _coded(R: int, C: int) -> tuple[torch.Tensor, ...]:
    codes = torch.zeros(R, 3 * ((C + 7) // 8), dtype=BYTE)
    low, bases = ones(R, C, dtype=BYTE), ones(R, dtype=BYTE)
    return low, codes, bases, ones(0, dtype=BYTE), torch.zeros(R + 1, dtype=INT)


def _bitmap(R: int, C: int) -> tuple:
    bits = torch.full((R, (C + 7) // 8), 255, dtype=BYTE)
    return bits, torch.arange(R + 1) * C


# By what they are called: sizes at which the call is valid, and the arguments for sizes.
CALLS: dict[str, tuple[dict[str, int], Callable[..., tuple]]] = {
    "gram": (
        {"B": 2, "T": 3, "C": 9},
        lambda B, T, C: (ones(B, C, C), ones(B, T, C), ones(B, T), 1),
    ),
    "gram, ones column": (
        {"B": 2, "T": 3, "C": 9},
        lambda B, T, C: (ones(B, C + 1, C + 1), ones(B, T, C), None, 1),
    ),
    "column_norms": ({"T": 3, "C": 9}, lambda T, C: (ones(C), ones(T, C), ones(T), 1)),
    "fisher_accumulate": (
        {"N": 2, "T": 3, "R": 5, "C": 9},
        lambda N, T, R, C: (ones(R, C), ones(N, T, R), ones(N, T, C), 2, 1.0, 1),
    ),
    "kron_quadratic": ({"R": 5, "C": 9}, lambda R, C: (ones(R), ones(R, C), torch.eye(C), 1)),
    "obs_factor": ({"C": 9}, lambda C: (ones(C, C), ones(C, dtype=BOOL), torch.eye(C), 0.01, 1)),
    "obs_greedy": (
        {"P": 2, "C": 8, "S": 4},
        lambda P, C, S: (ones(P, S, dtype=INT), ones(P, S), ones(P, C), eyes(P, C),
                         ones(P, C, dtype=BOOL), 0, 0, 1),
    ),
    "obs_greedy, 2:4": (
        {"P": 2, "C": 8, "S": 4},
        lambda P, C, S: (ones(P, S, dtype=INT), ones(P, S), ones(P, C), eyes(1, C), None, 2, 4, 1),
    ),
    "obs_reconstruct": ({"R": 3, "C": 9, "K": 1}, _reconstruct),
    "obs_sweep": ({"B": 2, "R": 3, "C": 8}, _sweep(False)),
    "obs_sweep, counts": ({"B": 2, "R": 3, "C": 8}, _sweep(True)),
    "mask_nm": (
        {"R": 3, "C": 8},
        lambda R, C: (ones(R, C, dtype=BOOL), ones(R, C), 2, 4, ones(C), ones(R), ones(R, C),
                      ones(R, C, dtype=BOOL), 1),
    ),
    "mask_topk": (
        {"R": 3, "C": 9},
        lambda R, C: (ones(R, C, dtype=BOOL), ones(R, C), C // 2, ones(C), ones(R), ones(R, C),
                      ones(R, C, dtype=BOOL), 1),
    ),
    "mask_global": (
        {"N": 2, "R": 3, "C": 9},
        lambda N, R, C: ([ones(R, C, dtype=BOOL)] * N, [ones(R, C)] * N, N * R * C // 2, [], [],
                         [], [], 1),
    ),
    "pack_24": (
        {"R": 3, "C": 16},
        lambda R, C: (ones(R, C // 2), ones(R, C // 8, dtype=BYTE), torch.zeros(R, C),
                      ones(R, C, dtype=BOOL), 1),
    ),
    "unpack_24": (
        {"R": 3, "C": 16},
        lambda R, C: (ones(R, C), ones(R, C // 2), torch.full((R, C // 8), 0x44, dtype=BYTE), 1),
    ),
    "pack_bitmap_rows": (
        {"R": 3, "C": 9},
        lambda R, C: (ones(R, (C + 7) // 8, dtype=BYTE), ones(R, dtype=INT), ones(R, C),
                      ones(R, C, dtype=BOOL), 1),
    ),
    "move_bitmap_values": (
        {"R": 3, "C": 8},
        lambda R, C: (ones(R, C), ones(R * C), *_bitmap(R, C), True, 1),
    ),
    "move_bitmap_values, back": (
        {"R": 3, "C": 8},
        lambda R, C: (ones(R, C), ones(R * C), *_bitmap(R, C), False, 1),
    ),
    "linear_dense": (
        {"M": 2, "R": 3, "C": 16},
        lambda M, R, C: (ones(M, R), ones(M, C), ones(R, C), ones(R), 1),
    ),
    "linear_24": (
        {"M": 2, "R": 3, "C": 16},
        lambda M, R, C: (ones(M, R), ones(M, C), ones(R, C // 2),
                         torch.full((R, C // 8), 0x44, dtype=BYTE), ones(R), 1),
    ),
    "linear_bitmap": (
        {"M": 2, "R": 3, "C": 16},
        lambda M, R, C: (ones(M, R), ones(M, C), ones(R * C), *_bitmap(R, C), ones(R), 1),
    ),
    "linear_int8": (
        {"M": 2, "R": 3, "C": 16},
        lambda M, R, C: (ones(M, R), ones(M, C), ones(R, C, dtype=torch.int8), ones(R), ones(R),
                         1),
    ),
    "linear_24_int8": (
        {"M": 2, "R": 3, "C": 16},
        lambda M, R, C: (ones(M, R), ones(M, C), ones(R, C // 2, dtype=torch.int8),
                         torch.full((R, C // 8), 0x44, dtype=BYTE), ones(R), ones(R), 1),
    ),
    "linear_bitmap_int8": (
        {"M": 2, "R": 3, "C": 16},
        lambda M, R, C: (ones(M, R), ones(M, C), ones(R * C, dtype=torch.int8),
                         *_bitmap(R, C), ones(R), ones(R), 1),
    ),
    "linear_coded": (
        {"M": 2, "R": 3, "C": 16},
        lambda M, R, C: (ones(M, R), ones(M, C), *_coded(R, C), ones(R), 1),
    ),
    "unpack_coded": (
        {"R": 3, "C": 16},
        lambda R, C: (ones(R, C, dtype=torch.bfloat16), None, *_coded(R, C), 1),
    ),
    "kept_bytes": ({"n": 8}, lambda n: (n, 1)),
}  # fmt: skip
# What a call that adds nothing leaves in its first argument, where that has elements.
LEAVES = {"gram": 1.0, "column_norms": 1.0, "fisher_accumulate": 1.0, "kron_quadratic": 0.0}


def cases() -> list[tuple[str, dict[str, int]]]:
    """Of every function the valid call first, then those with one size or more at zero."""
    found = []
    for call, (sizes, _) in CALLS.items():
        for zeros in itertools.product((False, True), repeat=len(sizes)):
            small = {n: 0 if zero else s for (n, s), zero in zip(sizes.items(), zeros, strict=True)}
            found.append((call, small))
    return found


def capsules(value: Any) -> Any:
    if isinstance(value, list):
        return [capsules(item) for item in value]
    return to_dlpack(value) if isinstance(value, torch.Tensor) else value


def run(call: str, sizes: dict[str, int]) -> str:
    arguments = CALLS[call][1](**sizes)
    first = arguments[0]
    try:
        getattr(_C, call.partition(",")[0])(*map(capsules, arguments))
    except ValueError as error:
        return f"refused: {error}"
    if call in LEAVES and 0 in sizes.values() and not bool((first == LEAVES[call]).all()):
        return f"wrong: {first.tolist()}"
    return "done"


def _say(number: int, what: str) -> None:
    sys.stdout.write(json.dumps([number, what]) + "\n")
    sys.stdout.flush()


def main() -> None:
    for number, (call, sizes) in list(enumerate(cases()))[int(sys.argv[1]) :]:
        _say(number, "begun")
        _say(number, run(call, sizes))


if __name__ == "__main__":
    main()
