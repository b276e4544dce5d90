"""The sweep that chooses by |w| times a given scale of the column: Wanda's score, with updates."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.isa import AVAILABLE, restricted
from ops.layers import damped, random_layer

from pyprune import ops
from pyprune.patterns import pruned_count

OP = "obs_sweep"
ISAS = ["portable", "avx2", "avx512"]
RULES = [
    {"sparsity": 0.5, "scope": "row"},
    {"sparsity": 0.4, "scope": "block"},
    {"sparsity": 0.5, "scope": "layer"},
    {"nm": (2, 4)},
    {"nm": (3, 5)},
    {"nm": (4, 20)},
]


def scales(cols, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.rand(cols, generator=gen, dtype=torch.float64) + 0.2


def oracle(w, h, scale, n, m):
    """Group by group of N:M, column by column (fp64)."""
    u = torch.linalg.cholesky(torch.linalg.inv(damped(h)), upper=True)
    w, kept = w.clone(), torch.ones_like(w, dtype=torch.bool)
    for a in range(0, w.shape[1], m):
        order = (w[:, a : a + m].abs() * scale[a : a + m]).sort(dim=1, stable=True).indices
        kept[:, a : a + m].scatter_(1, order[:, : m - n], False)
        for c in range(a, a + m):
            error = torch.where(kept[:, c], 0, w[:, c] / u[c, c])
            w[:, c:] -= error[:, None] * u[c, c:]
            w[~kept[:, c], c] = 0
    return w, kept


@pytest.mark.parametrize("nm", [(2, 4), (1, 3), (7, 12)], ids=str)
def test_reference_is_the_algorithm(nm):
    w, h = random_layer(7, 24)
    weight, kept = oracle(w, h, scales(24), *nm)
    got = ops.obs_sweep(w, ops.obs_factor(h).u, nm=nm, column_scale=scales(24))
    assert torch.equal(got.mask, kept)
    torch.testing.assert_close(got.weight, weight, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_matches_float64(backend, device, use_backend, rule):
    cols = 40 if backend == "triton" else 280
    w, h = random_layer(50, cols)
    u, scale = ops.obs_factor(h).u, scales(cols)
    want = ops.obs_sweep(w, u, column_scale=scale, **rule)
    assert not torch.equal(want.mask, ops.obs_sweep(w, u, **rule).mask)
    use_backend(backend, OP, device)
    got = ops.obs_sweep(
        *(t.float().to(device) for t in (w, u)), column_scale=scale.to(device), **rule
    )
    assert (got.mask.cpu() == want.mask).double().mean() > 0.998
    torch.testing.assert_close(got.loss.cpu().double().sum(), want.loss.sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_every_instruction_set(isa, use_isa, rule):
    w, h = random_layer(61, 180)
    u, scale = ops.obs_factor(h).u, scales(180)
    use_isa(isa)
    got = ops.obs_sweep(w.float(), u.float(), column_scale=scale, **rule)
    again = ops.obs_sweep(w, u, mask=got.mask)  # fp64: the reference
    torch.testing.assert_close(got.weight.double(), again.weight, rtol=1e-4, atol=1e-4)


def test_its_own_diagonal_changes_nothing(backend, device, use_backend):
    use_backend(backend, OP, device)
    w, h = random_layer(9, 40)
    w, u = w.float().to(device), ops.obs_factor(h).u.float().to(device)
    for rule in RULES[:4]:
        same = ops.obs_sweep(w, u, column_scale=1 / u.diagonal(), **rule)
        assert torch.equal(same.mask, ops.obs_sweep(w, u, **rule).mask)


def test_one_scale_for_each_matrix_of_a_batch(backend, device, use_backend):
    use_backend(backend, OP, device)
    w = torch.stack([random_layer(6, 8, seed=s)[0] for s in range(3)]).float().to(device)
    u = ops.obs_factor(random_layer(6, 8)[1]).u.float().to(device)
    each = torch.stack([scales(8, seed=s) for s in range(3)]).to(device)
    for scale in (each, each[:1], each[0]):
        batch = ops.obs_sweep(w, u, nm=(2, 4), column_scale=scale)
        for b in range(3):
            own = scale if scale.dim() == 1 else scale[b % len(scale)]
            single = ops.obs_sweep(w[b], u, nm=(2, 4), column_scale=own)
            for whole, part in zip(batch, single, strict=True):
                assert torch.equal(whole[b], part)


def test_preserved_positions_go_first(backend, device, use_backend):
    use_backend(backend, OP, device)
    w, h = random_layer(8, 40)
    u, scale = ops.obs_factor(h).u.float().to(device), scales(40).to(device)
    preserve = torch.ones(8, 40, dtype=torch.bool)
    preserve[:, ::7] = False
    w = (w.float() * preserve).to(device)
    for rule in RULES[:4]:
        got = ops.obs_sweep(w, u, column_scale=scale, preserve=preserve.to(device), **rule)
        assert not got.mask.cpu()[~preserve].any()
        if "sparsity" in rule:
            assert int((~got.mask).sum()) == pruned_count(320, rule["sparsity"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"column_scale": torch.ones(7)}, "column_scale: expected shape"),
        ({"column_scale": torch.ones(2, 8)}, "column_scale: expected shape"),
        ({"nm": None, "mask": torch.ones(3, 8) > 0}, "column_scale: expected none with a mask"),
    ],
)
def test_bad_arguments(args, message):
    args = {"nm": (2, 4), "column_scale": torch.ones(8), **args}
    with pytest.raises(ValueError, match=message):
        ops.obs_sweep(torch.zeros(3, 8), torch.eye(8), **args)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    groups=st.integers(1, 40),
    nm=st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 5)]),
    isa=st.sampled_from(AVAILABLE),
    seed=st.integers(0, 10_000),
)
def test_fuzz_chosen_groups_are_the_smallest(rows, groups, nm, isa, seed):
    """With U = I every score is exact: the masks are those of `mask_nm`."""
    gen = torch.Generator().manual_seed(seed)
    cols = groups * nm[1]
    w = torch.randint(-4, 5, (rows, cols), generator=gen).float()
    scale = torch.randint(1, 4, (cols,), generator=gen).float()
    with restricted(isa):
        got = ops.obs_sweep(w, torch.eye(cols), nm=nm, column_scale=scale)
        assert torch.equal(got.mask, ops.mask_nm(w, *nm, column_scale=scale))
