"""What a user did wrong or what their model or data makes impossible, said in one line."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was asked for: the message states what was expected and what came.

    The command line prints it as one line and exits with status 2.
    """


class LayerError(UserError):
    """A layer that cannot be pruned (NaN activations, a Hessian that no damping makes positive
    definite, a pattern that does not divide it). The message starts with the layer's name."""

    def __init__(self, layer: str, message: str) -> None:
        super().__init__(f"{layer}: {message}")
        self.layer = layer


# What is added where a model in 16 bits gives NaN or infinity.
OVERFLOW = " (a 16-bit overflow? try --dtype bfloat16 or float32)"
