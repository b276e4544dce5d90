"""What the tests of the mask ops share: matrices that provoke ties and special values, brute force
by sorting (score, index) pairs in Python, the golden example."""

import math

import torch

SPECIAL = (float("inf"), float("-inf"), float("nan"), 0.0, -0.0)
KINDS = ("normal", "ties", "zeros", "special", "equal")
TERMS = {
    "magnitude": (),
    "column": ("column_scale",),
    "row and column": ("column_scale", "row_scale"),
    "sum": ("column_scale", "addend"),
    "addend": ("addend",),
    "all": ("column_scale", "row_scale", "addend", "preserve"),
    "preserve": ("preserve",),
}

# What a stack [4, 3, 8] does not take, and what is said of it.
BAD_STACKS = (
    ({"column_scale": torch.ones(2, 8)}, "column_scale: expected shape"),
    ({"row_scale": torch.ones(3)}, "row_scale: expected shape"),
    ({"addend": torch.ones(3, 8)}, "addend: expected shape"),
    ({"preserve": torch.ones(2, 3, 8, dtype=torch.bool)}, "preserve: expected shape"),
    ({"w": torch.ones(2, 2, 3, 8)}, "w: expected 2"),
)


def weights(kind: str, rows: int, cols: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, cols, generator=gen)
    if kind == "ties":
        w = (2 * w).round()
    elif kind == "zeros":
        w = torch.where(torch.rand(rows, cols, generator=gen) < 0.7, 0 * w, w)
    elif kind == "special":
        chosen = torch.randint(len(SPECIAL), (rows, cols), generator=gen)
        w = torch.where(
            torch.rand(rows, cols, generator=gen) < 0.4, torch.tensor(SPECIAL)[chosen], w
        )
    elif kind == "equal":
        w = torch.full((rows, cols), -1.5)
    return w.to(dtype)


def terms(names: tuple[str, ...], rows: int, cols: int, device: str, seed: int = 1) -> dict:
    gen = torch.Generator().manual_seed(seed)
    made = {
        # Few distinct scales: products tie across columns as well.
        "column_scale": torch.randint(0, 4, (cols,), generator=gen) / 3,
        "row_scale": torch.rand(rows, generator=gen) + 0.1,
        "addend": torch.rand(rows, cols, generator=gen),
        "preserve": torch.rand(rows, cols, generator=gen) < 0.7,
    }
    return {name: made[name].to(device) for name in names}


def scores(w, column_scale=None, row_scale=None, addend=None, preserve=None) -> list[list[float]]:
    """Scores as Python floats (fp32 values), NaN as the highest and forbidden as the lowest."""
    s = w.cpu().double() if w.dtype == torch.float64 else w.cpu().float()
    if column_scale is not None and addend is not None:
        s = s * (column_scale.cpu().to(s.dtype) + addend.cpu().to(s.dtype))
    elif column_scale is not None or addend is not None:
        factor = addend if column_scale is None else column_scale
        s = s * factor.cpu().to(s.dtype)
    if row_scale is not None:
        s = s * row_scale.cpu().to(s.dtype)[:, None]
    ranked = [[(1, 0.0) if math.isnan(v) else (0, abs(v)) for v in row] for row in s.tolist()]
    if preserve is not None:
        allowed = preserve.cpu().tolist()
        ranked = [
            [r if ok else (-1, 0.0) for r, ok in zip(row, oks, strict=True)]
            for row, oks in zip(ranked, allowed, strict=True)
        ]
    return ranked


def brute_force(ranked: list, pruned: int) -> list[bool]:
    """True for all but the first `pruned` of the (score, index) pairs in ascending order."""
    order = sorted(range(len(ranked)), key=lambda i: (ranked[i], i))
    gone = set(order[:pruned])
    return [i not in gone and ranked[i] != (-1, 0.0) for i in range(len(ranked))]


def brute_force_groups(w: torch.Tensor, group: int, pruned: int, **given) -> torch.Tensor:
    """Brute force among every `group` consecutive columns."""
    kept = [
        keep
        for row in scores(w, **given)
        for start in range(0, len(row), group)
        for keep in brute_force(row[start : start + group], pruned)
    ]
    return torch.tensor(kept, dtype=torch.bool).view(w.shape)


def golden_weights() -> torch.Tensor:
    """W of the golden example: R = 4, C = 8, fp64."""
    i = torch.arange(4, dtype=torch.float64)[:, None]
    j = torch.arange(8, dtype=torch.float64)[None]
    return torch.cos(2.3 * i + 1.7 * j + 0.5 * i * j)


def golden_column_norms() -> torch.Tensor:
    """Norms of the golden example's activations over 32 tokens."""
    t = torch.arange(32, dtype=torch.float64)[:, None]
    j = torch.arange(8, dtype=torch.float64)[None]
    x = torch.cos(0.4 + 0.5 * t) + 0.6 * torch.sin(0.9 * t + 0.8 * j)
    x = (1 + 3 * (j == 3)) * (x + 0.3 * torch.cos(2.1 * t * (j + 1)))
    return x.norm(dim=0)


def pruned_pattern(mask: torch.Tensor) -> str:
    """`1` = pruned, `.` = kept, rows separated by slashes."""
    return " / ".join("".join(".1"[not keep] for keep in row) for row in mask.tolist())


def check_stack(select, names: tuple[str, ...], shared: bool, device: str) -> None:
    """`select(w, **terms)` of a stack is that of its matrices, whatever its strides."""
    made = [weights("ties", 3, 12, torch.bfloat16, seed=b) for b in range(4)]
    w = torch.stack(made).to(device)
    each = [terms(names, 3, 12, device, seed=b) for b in range(4)]
    given = {name: torch.stack([one[name] for one in each]) for name in names}
    if shared and "column_scale" in given:
        given["column_scale"] = given["column_scale"][0]
        each = [one | {"column_scale": given["column_scale"]} for one in each]
    want = torch.stack([select(w[b], **one) for b, one in enumerate(each)])
    assert torch.equal(select(w, **given), want)
    got = select(w.transpose(0, 1).contiguous().transpose(0, 1), **given)
    assert torch.equal(got, want) and got.is_contiguous()
