"""A model as it was given, while a method changes its weights in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor


class Given:
    """The first values of the parameters that a method changes, and nothing of the others: what
    least squares takes its targets from, without a second model."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the parameter, which is held

    def __bool__(self) -> bool:
        """Whether any parameter is held."""
        return bool(self._held)

    def hold(self, parameters: Sequence[Tensor], values: Sequence[Tensor] | None = None) -> None:
        """`values` are what `parameters` were before they changed; None: copies of what they are,
        so before they change. What is held already stays."""
        for i, parameter in enumerate(parameters):
            if id(parameter) not in self._held:
                value = parameter.detach().clone() if values is None else values[i]
                self._held[id(parameter)] = parameter, value

    @contextmanager
    def back(self) -> Iterator[None]:
        """Within it the model is the one that was given; nothing is copied for it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for parameter, value in self._held.values():
            parameter.data, value.data = value.data, parameter.data
