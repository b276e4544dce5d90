"""Which weights `obs_sweep` removes: exact counts, ties, preserved positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.layers import random_layer, random_mask
from ops.sweep import ISAS, ONE_OF_EACH, OP, RULES, fewer

from pyprune import ops
from pyprune.patterns import pruned_count

# --- exact counts -------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.777, 1.0])
@pytest.mark.parametrize("scope", ["row", "block", "layer"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 45), (20, 300)], ids=str)
def test_counts_are_exact(backend, device, use_backend, sparsity, scope, shape):
    use_backend(backend, OP, device, torch.float32)
    rows, cols = shape[0], fewer(backend, shape[1], min(shape[1], 50))
    w, h = random_layer(rows, cols)
    u = ops.obs_factor(h).u.float().to(device)
    got = ops.obs_sweep(w.float().to(device), u, sparsity=sparsity, scope=scope, block_size=24)
    pruned = (~got.mask.cpu()).sum(1)
    if scope == "row":
        assert pruned.tolist() == [pruned_count(cols, sparsity)] * rows
    else:
        assert int(pruned.sum()) == pruned_count(rows * cols, sparsity)
    if sparsity == 0:
        assert torch.equal(got.weight, w.float().to(device)) and bool((got.loss == 0).all())


def test_block_counts_spread_by_cumulative_rounding(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(5, 50)
    u = ops.obs_factor(h).u.float().to(device)
    got = ops.obs_sweep(w.float().to(device), u, sparsity=0.5, scope="row", block_size=9)
    per_block = [part.shape[1] - part.sum(1) for part in got.mask.cpu().split(9, dim=1)]
    assert torch.stack(per_block, 1).tolist() == [[5, 4, 5, 4, 5, 2]] * 5


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8), (1, 1), (3, 6), (7, 10)])
def test_nm_counts(backend, device, use_backend, nm):
    use_backend(backend, OP, device, torch.float32)
    n, m = nm
    cols = fewer(backend, 240, 120)
    w, h = random_layer(9, cols)
    u = ops.obs_factor(h).u.float().to(device)
    for block_size in (1, 64, 1000) if backend == "native" else (64,):
        mask = ops.obs_sweep(w.float().to(device), u, nm=nm, block_size=block_size).mask.cpu()
        assert bool((mask.view(9, -1, m).sum(2) == n).all())


@pytest.mark.parametrize("large", [True, False], ids=["large", "small"])
@pytest.mark.parametrize("isa", ISAS)
def test_block_cut_survives_a_misleading_sample(use_backend, use_isa, isa, large):
    """The native kernel samples the weights at these places of each strip of rows to bracket the
    cut; here they tell nothing about the others, on whichever side of the cut those are."""
    use_backend("native", OP, "cpu", torch.float32)
    use_isa(isa)
    rows, cols = 96, 128
    for lanes in (8, 16, 24, 48):
        w = torch.rand(rows, cols, generator=torch.Generator().manual_seed(lanes)) + 1
        at = torch.arange(64)
        for strip in range(rows // lanes):
            w[strip * lanes + at * 37 % lanes, at * 53 % cols] *= 100 if large else 0.01
        mask = ops.obs_sweep(w, torch.eye(cols), sparsity=0.5, block_size=cols).mask
        cut = w.flatten().sort().values[rows * cols // 2]
        assert torch.equal(mask, w >= cut)


def test_reference_count_prunes_one_more_and_all_ties(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    eye = torch.eye(8, device=device)
    w = torch.tensor([[1.0, 2, 2, 2, 3, 4, 5, 6]], device=device)
    for sparsity, pruned in ((0.0, 1), (0.1, 1), (0.125, 4), (0.5, 5)):
        got = ops.obs_sweep(w, eye, sparsity=sparsity, reference_count=True)
        assert int((~got.mask).sum()) == pruned


# --- ties ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["row", "block", "layer"])
@pytest.mark.parametrize("value", [0.0, 0.75])
def test_ties_prune_the_lower_index(backend, device, use_backend, scope, value):
    use_backend(backend, OP, device, torch.float32)
    rows, cols = 40, 20
    w, u = torch.full((rows, cols), value, device=device), torch.eye(cols, device=device)
    got = ops.obs_sweep(w, u, sparsity=0.33, scope=scope).mask.cpu()
    want = torch.ones(rows, cols, dtype=torch.bool)
    if scope == "row":
        want[:, : pruned_count(cols, 0.33)] = False
    else:
        want.view(-1)[: pruned_count(rows * cols, 0.33)] = False
    assert torch.equal(got, want)


def test_ties_in_groups_prune_the_lower_index(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, u = torch.ones(3, 48, device=device), torch.eye(48, device=device)
    for n, m in ((2, 4), (3, 8), (1, 6), (5, 16)):
        mask = ops.obs_sweep(w, u, nm=(n, m)).mask.cpu().view(3, -1, m)
        assert not mask[..., : m - n].any() and bool(mask[..., m - n :].all())


def test_partial_ties_across_rows(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w = torch.tensor([[3.0, 1, 2], [2, 2, 5], [1, 2, 9], [2, 2, 2]], device=device)
    got = ops.obs_sweep(w, torch.eye(3, device=device), sparsity=5 / 12).mask.cpu()
    assert torch.equal(got, torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]) > 0)


# --- preserved and repeated pruning ---------------------------------------------------------


@pytest.mark.parametrize("rule", [r for r in RULES if "reference_count" not in r], ids=str)
def test_preserved_positions_stay_pruned_and_count(backend, device, use_backend, rule):
    use_backend(backend, OP, device, torch.float32)
    cols = fewer(backend, 280, 40)
    w, h = random_layer(20, cols)
    u = ops.obs_factor(h).u.float().to(device)
    # All in the first quarter of the columns, but less than any quota there.
    preserve = torch.ones(20, cols, dtype=torch.bool)
    preserve[:, : cols // 4 : 5] = False
    before = w.float() * preserve
    got = ops.obs_sweep(before.to(device), u, preserve=preserve.to(device), **rule)
    mask = got.mask.cpu()
    assert not mask[~preserve].any()
    if "nm" in rule:
        n, m = rule["nm"]
        assert bool((mask.view(20, -1, m).sum(2) == n).all())
    else:
        assert int((~mask).sum()) == pruned_count(20 * cols, rule["sparsity"])
    if rule.get("scope") == "row":
        assert (~mask).sum(1).tolist() == [pruned_count(cols, rule["sparsity"])] * 20


@pytest.mark.parametrize("scope", ["row", "block", "layer"])
def test_more_preserved_than_asked_for(backend, device, use_backend, scope):
    use_backend(backend, OP, device, torch.float32)
    cols = fewer(backend, 300, 50)
    w, h = random_layer(10, cols)
    u, preserve = ops.obs_factor(h).u.float().to(device), random_mask(10, cols)
    before = (w.float() * preserve).to(device)
    got = ops.obs_sweep(before, u, sparsity=0.2, scope=scope, preserve=preserve.to(device))
    assert torch.equal(got.mask.cpu(), preserve)
    assert torch.equal(got.weight, before)
    got = ops.obs_sweep(before, u, nm=(4, 5), preserve=preserve.to(device))
    assert not got.mask.cpu()[~preserve].any()


def test_preserve_with_a_given_mask(backend, device, use_backend):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(10, 50)
    mask, preserve = random_mask(10, 50, 1).to(device), random_mask(10, 50, 2).to(device)
    u = ops.obs_factor(h).u.float().to(device)
    got = ops.obs_sweep(w.float().to(device), u, mask=mask, preserve=preserve)
    want = ops.obs_sweep(w.float().to(device), u, mask=mask & preserve)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", [{"sparsity": 0.5}, {"nm": (2, 4)}], ids=str)
def test_pruning_again_is_a_no_op(backend, device, use_backend, rule):
    use_backend(backend, OP, device, torch.float32)
    w, h = random_layer(16, fewer(backend, 132, 44))
    u = ops.obs_factor(h).u.float().to(device)
    once = ops.obs_sweep(w.float().to(device), u, **rule)
    twice = ops.obs_sweep(once.weight, u, preserve=once.mask, **rule)
    assert torch.equal(twice.weight, once.weight) and torch.equal(twice.mask, once.mask)
    assert bool((twice.loss == 0).all())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    cols=st.integers(1, 150),
    block_size=st.sampled_from([1, 7, 64, 128]),
    sparsity=st.floats(0, 1),
    scope=st.sampled_from(["row", "block", "layer"]),
    levels=st.integers(1, 6),
    preserved=st.sampled_from([None, 0.1, 0.6]),
    seed=st.integers(0, 10_000),
)
def test_fuzz_selection_with_many_ties(
    rows, cols, block_size, sparsity, scope, levels, preserved, seed
):
    """With U = I nothing is updated and every score is exact: masks must agree bit for bit."""
    gen = torch.Generator().manual_seed(seed)
    w = torch.randint(-levels, levels + 1, (rows, cols), generator=gen).float()
    preserve = None if preserved is None else torch.rand(rows, cols, generator=gen) >= preserved
    kwargs = {"sparsity": sparsity, "scope": scope, "block_size": block_size, "preserve": preserve}
    want = ops.obs_sweep(w.double(), torch.eye(cols).double(), **kwargs)
    got = ops.obs_sweep(w, torch.eye(cols), **kwargs)
    assert torch.equal(got.mask, want.mask)
    assert torch.equal(got.weight, want.weight.float())


@pytest.mark.parametrize("shape", [(5, 16), (5, 13), (2, 3, 9), (0, 8), (4, 0)], ids=str)
def test_packed_mask_is_the_bitmap(shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    swept = ops.obs_sweep(w, torch.eye(shape[-1]), sparsity=0.4)
    _, bitmap, _ = ops.pack_bitmap(swept.weight.flatten(0, -2), swept.mask.flatten(0, -2))
    assert torch.equal(swept.packed_mask(), bitmap.view(*shape[:-1], -(-shape[-1] // 8)))


@pytest.mark.parametrize("rule", ONE_OF_EACH, ids=str)
def test_a_row_of_zeros_stays_one(backend, device, use_backend, rule):
    use_backend(backend, OP, device)
    w, h = (t.float().to(device) for t in random_layer(5, fewer(backend, 40, 16)))
    w[2] = 0
    got = ops.obs_sweep(w, ops.obs_factor(h).u, **rule)
    assert not got.weight[2].any() and got.loss[2] == 0
    assert bool(got.loss[[0, 1, 3, 4]].gt(0).any())


@pytest.mark.parametrize("all_ties", [False, True])
@pytest.mark.parametrize("n", [1, 64, 777])
def test_triton_radix_select_takes_the_first_of_equal_keys(use_backend, monkeypatch, n, all_ties):
    """Many equal keys over many programs, keys in every digit, those that must stay pruned (-1),
    NaN above infinity; from no key to all of them."""
    from pyprune.kernels import obs_choice as kernel

    use_backend("triton", "obs_sweep", "cpu")
    monkeypatch.setattr(kernel, "KEYS_PER_PROGRAM", 64)
    gen = torch.Generator().manual_seed(n)
    some = torch.tensor([-1, 0, 1, 255, 256, 65536, 2**24, 2**31 - 1, 0x7F800000, 0x7FC00000])
    keys = some[torch.randint(len(some), (4, n), generator=gen)].int()
    keys[3] = torch.randn(n, generator=gen).abs().view(torch.int32)
    for count in ([0, 1, n, n // 2], [n // 3, n, 1, 0]):
        wanted = torch.tensor(count, dtype=torch.int32)
        kept = kernel.keep_but_smallest(keys, wanted, all_ties)
        for row, few, got in zip(keys, count, kept, strict=True):
            pruned = torch.zeros(n, dtype=torch.bool)
            order = row.argsort(stable=True)
            pruned[order[:few]] = True
            if all_ties:
                pruned = row <= row[order[max(few, 1) - 1]]
            assert torch.equal(got, ~pruned & (row >= 0))


def test_more_weights_than_are_counted_are_refused():
    w = torch.zeros(1).expand(2**16, 2**16)
    wanted = r"fewer than 2\^31 weights that are chosen together, got 4294967296 \(65536 rows"
    with pytest.raises(ValueError, match=wanted):
        ops.obs_sweep(w, w, sparsity=0.6, scope="layer")
    with pytest.raises(ValueError, match=wanted):
        ops.obs_sweep(w, w, sparsity=0.6, block_size=2**16)
