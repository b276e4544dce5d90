"""A walk over a tiny model, and what the tests compare of it."""

from contextlib import contextmanager

import torch
from tiny_models import tiny_tokens

from pyprune.calibration.stats import NormStatistic
from pyprune.calibration.tokens import Batch
from pyprune.calibration.walk import InMemoryStore, walk
from pyprune.models.adapter import Adapter


def batches(padded=False):
    """Three batches of different shapes; padded on the left, on the right, and not at all."""
    made = []
    for j, (rows, length) in enumerate([(2, 16), (3, 11), (1, 16)]):
        ids, mask = tiny_tokens(rows, length, seed=j), torch.ones(rows, length, dtype=torch.long)
        if padded and j < 2:
            pad = slice(0, 4) if j == 0 else slice(8, None)
            mask[0, pad] = 0
            ids[0, pad] = 0
        made.append(Batch(ids, mask if padded else None))
    return made


def wanda_half(group):
    """Removes half of every row by |w| * ||x||; an expert that saw nothing by |w|."""
    norms = group.statistic.column_norms().sqrt() if group.statistic.tokens else 1.0
    for ref in group.linears:
        w = ref.weight().float()
        order = (w.abs() * norms).argsort(dim=1, stable=True)
        ref.write(w.scatter(1, order[:, : w.shape[1] // 2], 0.0))


def run_walk(model, given, prune_group=wanda_half, statistic=NormStatistic, **kwargs):
    adapter = Adapter.of(model)
    kwargs.setdefault("store", InMemoryStore(adapter, "cpu"))
    return walk(adapter, given, statistic=statistic, prune_group=prune_group, **kwargs)


def state(model):
    return {key: t.clone() for key, t in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def hook_count(model):
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return hooks + sum("forward" in m.__dict__ for m in model.modules())


@contextmanager
def untouched(model, given):
    """The body must leave no hook behind and the model able to run."""
    training = [m.training for m in model.modules()]
    before = hook_count(model)
    yield
    assert hook_count(model) == before
    assert [m.training for m in model.modules()] == training
    with torch.no_grad():
        assert model(given[0].input_ids).logits.isfinite().all()


def scale_input(module, args, output):
    args[0].mul_(1.25)
