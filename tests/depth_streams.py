"""Tiny models of four layers, their residual streams, and streams that are scaled on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from depth_searches import model_of as any_model
from torch import Tensor
from transformers import PreTrainedModel

from pyprune.calibration.tokens import Batch
from pyprune.depth.hidden import visit_states
from pyprune.models.adapter import Adapter

POST_NORM = ("gemma2", "gemma3_text")


def model_of(family: str, layers: int = 4) -> PreTrainedModel:
    return any_model(family, layers)


def states_of(model: Any, ids: Tensor) -> list[Tensor]:
    """The streams before every layer and after the last, each [B, T, d]."""
    found: list[Tensor] = []
    visit_states(Adapter.of(model), Batch(ids), lambda _, h: found.append(h.clone()))
    return found


def scaled_input(factor: float) -> Callable[..., Any]:
    """A hook on a layer that multiplies what it is given."""

    def hook(_module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (args[0] * factor, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"] * factor}

    return hook


def fitted(m: Tensor, missing: Tensor, ridge: float) -> Tensor:
    """T that minimises |M T - (M + missing)|^2 + ridge x mean squared output x |T - I|^2, as one
    stacked least-squares problem, float64. m, missing: [n, d]."""
    m, missing = m.double(), missing.double()
    eye = torch.eye(m.shape[1], dtype=m.dtype)
    weight = (ridge * m.square().sum(0).mean()).sqrt()
    left = torch.cat([m, weight * eye])
    return eye + torch.linalg.lstsq(left, torch.cat([missing, 0 * eye])).solution
