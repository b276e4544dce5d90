"""Which format of a weight multiplies fastest on this machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyprune.errors import UserError
from pyprune.measure import last_level_cache
from pyprune.sparse.dense import DenseLinear
from pyprune.sparse.linear import SparseLinear

# Closer than this two formats are equally fast: the smaller one is taken.
NOISE = 0.03
TURNS = 5
# A turn goes over so many calls at least, whatever the layer's size.
CALLS = 8

Key = tuple[int, int, torch.dtype, bool, tuple[str, ...], int]


@dataclass
class MeasuredChoice:
    """Times the formats of a weight side by side, as the layers that a loaded model would have.

    Layers of one shape, dtype and density (to 1 %) are measured once, with the first one's weight.
    Copies that together exceed twice the last-level cache (or all of the model, if that is less)
    take turns, so that weights come from where they do in a model.

    rows: of the activations; 1 is decoding one sequence. model_bytes: of all layers to choose for.
    table: what was measured, seconds by format.
    """

    rows: int
    model_bytes: int
    table: dict[Key, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise UserError(f"rows: expected at least 1, got {self.rows}")

    def __call__(
        self, weight: Tensor, sizes: Mapping[str, int], nnz: int, int8: bool
    ) -> tuple[str, dict[str, float]]:
        """The format to take, of `sizes` (bytes by format) and "dense", and the seconds of each.

        weight: `[R, C]`. nnz: its stored elements.
        """
        percent = round(100 * nnz / weight.numel())
        rows, cols = weight.shape
        key = (rows, cols, weight.dtype, int8, tuple(sizes), percent)
        if key not in self.table:
            self.table[key] = self._measure(weight, sizes, int8)
        seconds = self.table[key]
        nbytes = {**sizes, "dense": weight.nbytes}
        fast = [f for f in seconds if seconds[f] <= (1 + NOISE) * min(seconds.values())]
        return min(fast, key=lambda f: nbytes[f]), seconds

    @torch.inference_mode()
    def _measure(self, weight: Tensor, sizes: Mapping[str, int], int8: bool) -> dict[str, float]:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        layers: dict[str, nn.Module] = {"dense": DenseLinear.of(linear)}
        layers |= {f: SparseLinear.from_dense(linear, f, int8) for f in sizes}
        room = min(2 * last_level_cache(), self.model_bytes)
        copies = {name: _copies(layer, room) for name, layer in layers.items()}
        x = torch.randn(self.rows, weight.shape[1]).to(weight.dtype)
        samples: dict[str, list[float]] = {name: [] for name in layers}
        for turn in range(TURNS + 1):
            for name, group in copies.items():
                calls = max(CALLS, len(group))
                started = time.perf_counter()
                for i in range(calls):
                    group[i % len(group)](x)
                if turn:
                    samples[name].append((time.perf_counter() - started) / calls)
        # The least: whatever else the machine does only adds, up to fifty times the layer itself.
        return {name: min(found) for name, found in samples.items()}


def _copies(layer: nn.Module, room: int) -> list[nn.Module]:
    nbytes = sum(t.nbytes for t in layer.state_dict().values())
    return [layer, *(deepcopy(layer) for _ in range(-(-room // max(1, nbytes)) - 1))]
