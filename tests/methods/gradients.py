"""Gradient statistics for tests that have no model: random output gradients of a few sequences."""

import torch

from pyprune.calibration.sample import Sample
from pyprune.methods import METHODS, MethodOptions


def output_gradients(rows, x, seed=7):
    """`[T, R]`, related to the inputs `x [T, C]` as those of a network are."""
    gen = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(x), rows, generator=gen, dtype=torch.float64)
    mix = torch.randn(x.shape[1], rows, generator=gen, dtype=torch.float64)
    return (noise + torch.tanh(x.double() @ mix)).to(x.dtype)


def statistic(method, x, g, sequences, options=None):
    """What `method` accumulates of `sequences` equal parts of `x [T, C]` and `g [T, R]`; None if it
    needs no gradient."""
    make = METHODS[method].gradient
    if make is None:
        return None
    made = make(options or MethodOptions())(g.shape[1], x.shape[1], x.device, _sums(x))
    targets = max(len(x) // sequences - 1, 1)
    for part in zip(x.chunk(sequences), g.chunk(sequences), strict=True):
        made.update(Sample(*part, targets, "leader"))
    made.sequences, made.targets = sequences, targets * sequences
    return made


def _sums(x):
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attach(inputs, method, w, x, options=None):
    """`inputs` with the gradients that `method` needs, if any."""
    made = statistic(method, x, output_gradients(len(w), x), 1, options)
    return inputs if made is None else inputs.with_gradient(made)
