"""Full fp32 products inside the ops, whatever the user allows PyTorch elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch


class _Setting:
    """The process' setting, shared by the calls in all threads: the first one in saves and raises
    it, the last one out puts it back."""

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0
        self.before: list[tuple[Any, str]] = []

    def enter(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside > 1:
                return
            on_cpu: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
            for products in (torch.backends.cuda.matmul, on_cpu):
                value = products.fp32_precision
                if value in ("tf32", "bf16"):
                    self.before.append((products, value))
                    products.fp32_precision = "ieee"

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1
            while self.inside == 0 and self.before:
                products, value = self.before.pop()
                products.fp32_precision = "none"  # inherit again, if that gives what it was
                if products.fp32_precision != value:
                    products.fp32_precision = value


_setting = _Setting()


@contextmanager
def full_precision() -> Iterator[None]:
    """PyTorch's fp32 matrix products round no input while this is open; also a decorator.

    A model may well run in TF32 while it is pruned (`torch.backends.fp32_precision = "tf32"`, what
    transformers sets, or `torch.set_float32_matmul_precision("high")`), or under `torch.autocast`.
    Ten bits, or eight, are too few for a Hessian's factor and for what a sweep passes on.
    """
    _setting.enter()
    with ExitStack() as stack:
        stack.callback(_setting.leave)
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
