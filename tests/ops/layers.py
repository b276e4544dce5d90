"""Layers for the tests of the OBS ops: weights, Hessians, masks."""

import math

import torch


def random_layer(rows: int, cols: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Hessian of correlated inputs, fp64."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=gen, dtype=torch.float64) / math.sqrt(cols)
    x = torch.randn(2 * cols, cols, generator=gen, dtype=torch.float64) @ (
        mix + torch.eye(cols, dtype=torch.float64)
    )
    return torch.randn(rows, cols, generator=gen, dtype=torch.float64), x.T @ x


def damped(h: torch.Tensor) -> torch.Tensor:
    return h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)


def quadratic(delta: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Per row 1/2 d H d^T."""
    return 0.5 * (delta @ h * delta).sum(1)


def random_mask(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, cols, generator=torch.Generator().manual_seed(seed)) > 0.5
