"""What the tests of `obs_sweep` share: names, shapes, the rules that choose masks."""

import torch

from pyprune import ops

OP = "obs_sweep"
ISAS = ["portable", "avx2", "avx512"]

# One row, one column, ragged strips and tiles, one to several blocks, several strips.
SHAPES = [(1, 1), (1, 40), (3, 7), (5, 128), (17, 130), (50, 300)]


def fewer(backend: str, cols: int, triton_cols: int) -> int:
    """Triton's interpreter takes milliseconds a column, and has narrower blocks to make up."""
    return triton_cols if backend == "triton" else cols


def float64_sweep(w: torch.Tensor, u: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The weights by the fp64 reference, whichever backend is forced."""
    reference = ops.registry.IMPLS[OP]["reference"].resolve()
    return reference(w[None], u[None], None, mask.cpu()[None], None, 0, 0, 128, False)[0][0]


# Every rule that chooses a mask, and one of each kind.
RULES = [
    {"sparsity": 0.5, "scope": "block"},
    {"sparsity": 0.375, "scope": "row"},
    {"sparsity": 0.5, "scope": "layer"},
    {"sparsity": 0.5, "scope": "block", "reference_count": True},
    {"nm": (2, 4)},
    {"nm": (1, 2)},
    {"nm": (5, 8)},
    {"nm": (3, 5)},
    {"nm": (4, 20)},
]
ONE_OF_EACH = [
    {"sparsity": 0.4},
    {"sparsity": 0.4, "scope": "row"},
    {"sparsity": 0.4, "scope": "layer"},
    {"nm": (2, 4)},
]
RULE_IDS = [" ".join(f"{k}={v}" for k, v in rule.items()) for rule in RULES]
