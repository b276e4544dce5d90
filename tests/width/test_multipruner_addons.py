"""Add-ons after MultiPruner's two searches: fitted from the narrow model, to the dense one."""

import json

import pytest
import torch
from depth_streams import fitted, model_of
from saved_models import reloaded, save_model
from tiny_models import tiny_tokens
from torch import nn
from transformers import Conv1D

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import Batch
from pyprune.depth.compensate import streams
from pyprune.depth.graph import KINDS, Branch, ResidualGraph, gaps
from pyprune.depth.score import Scorer
from pyprune.errors import UserError
from pyprune.width import multipruner
from pyprune.width.config import WidthConfig
from pyprune.width.decision import ADD_ONS
from pyprune.width.registry import run_width
from pyprune.width.structure import Widths

IDS = tiny_tokens(6, 32)
TOKENS = as_token_set(list(IDS.split(2)), vocabulary=64, positions=128)
RIDGE = 1e-2
SEARCH = {"blocks": 0.6, "steps": 8, "every": 1}


def pruned(family, **add_ons):
    model = model_of(family)
    options = {**SEARCH, **add_ons}
    config = WidthConfig("multipruner", ratio=0.4, method_options=options)
    return model, run_width(model, TOKENS, config)


def masked(family, decision):
    """The graph of a model that is as narrow as `decision` says, and the branches that went."""
    model = model_of(family)
    Widths.of(model).mask(decision.kept())
    kinds = dict(zip("AM", KINDS, strict=True))
    return ResidualGraph.of(model), [Branch(kinds[n[0]], int(n[1:])) for n in decision.branches]


def run(graph, removed, end, factors=None):
    """The stream before position `end`, multiplied at the positions of `factors`: [B, T, d]."""
    state, context = graph.start(Batch(IDS))
    for branch in graph.branches[:end]:
        factor = (factors or {}).get(branch.position, 1.0)
        state = type(state)(*(part * factor for part in state))
        gone = branch in removed
        state = graph.skip(branch, state) if gone else graph.run(branch, state, context)
    return state.total


def fold(graph, branch, transform):
    """Multiplies what the branch adds by `transform`."""
    block = graph.adapter.blocks[branch.layer]
    for name in graph.layouts[branch.layer].inner(branch.kind):
        for path, module in block.get_submodule(name).named_modules():
            if not path.endswith(("o_proj", "down_proj", "c_proj", "experts")):
                continue
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 1 or isinstance(module, Conv1D):
                    parameter.copy_(parameter.double() @ transform)
                elif isinstance(module, nn.Linear) or parameter is module.down_proj:
                    parameter.copy_(transform.T @ parameter.double())


def written(decision):
    return json.loads(json.dumps(decision.to_dict()))["transforms"][1:]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_gaps_are_fitted_in_the_narrow_model(family, tmp_path):
    _, plain = pruned(family)
    model, decision = pruned(family, refit=True, ridge=RIDGE)
    assert decision.removed == plain.removed and decision.branches == plain.branches
    assert plain.transforms == decision.transforms[:1]
    targets = list(streams(ResidualGraph.of(model_of(family)), Batch(IDS)))
    graph, removed = masked(family, decision)
    found = [gap for gap in gaps(removed, 4) if gap[0] > 0]
    fits = written(decision)
    assert len(fits) == len(found) > 0
    for fit, (start, end) in zip(fits, found, strict=True):
        last = graph.branches[start - 1]
        assert (fit["kind"], fit["branch"]) == ("refit", str(last))
        before, after = (run(graph, removed, at).flatten(0, 1) for at in (start - 1, start))
        m, target = after - before, targets[end]
        missing = target - after
        assert fit["before"] == pytest.approx(
            float(missing.square().sum() / target.square().sum()), rel=1e-3
        )
        fold(graph, last, fitted(m, missing, RIDGE))
        error = (run(graph, removed, end).flatten(0, 1) - target).square().sum()
        assert fit["after"] == pytest.approx(float(error / target.square().sum()), rel=1e-2)
        assert fit["after"] < fit["before"]
    with graph.skipping(removed):
        expected = graph.model(IDS, use_cache=False).logits
    got = model(IDS, use_cache=False).logits
    assert (got - expected).norm() < 1e-3 * expected.norm()
    # The curve ends with what the add-ons made of it; they take nothing away.
    (_, size, before), (name, same, after) = decision.curve[-2:]
    assert decision.curve[:-1] == plain.curve and (name, same) == (ADD_ONS, size)
    assert after == pytest.approx(
        Scorer(ResidualGraph.of(model), TOKENS.batches).score_naive([]), rel=1e-4
    )
    assert after != before
    save_model(model, None, tmp_path / "out")
    loaded = reloaded(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(loaded(IDS, use_cache=False).logits, got)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "gemma2"])
def test_gaps_are_compensated_in_the_narrow_model(family):
    model, decision = pruned(family, compensate=True)
    targets = list(streams(ResidualGraph.of(model_of(family)), Batch(IDS)))
    graph, removed = masked(family, decision)
    (done,) = written(decision)
    norms, scale = [target.norm(dim=1) for target in targets], {}
    for factor, (start, end) in zip(done["factors"], gaps(removed, 4), strict=True):
        sizes = run(graph, removed, start, scale).flatten(0, 1).norm(dim=1)
        assert factor == pytest.approx(float((norms[end] / sizes).mean()), rel=1e-4)
        scale[start] = factor
    assert done["kind"] == "compensate" and max(abs(f - 1) for f in scale.values()) > 0.05
    expected = graph.logits(graph.finish(run(graph, removed, 8, scale), Batch(IDS)), IDS)
    got = model(IDS, use_cache=False).logits
    assert (got - expected).norm() < 2e-3 * expected.norm()


def test_refusals_come_before_the_search(monkeypatch):
    monkeypatch.setattr(multipruner, "run_search", lambda *_: pytest.fail("it searches"))
    with pytest.raises(UserError, match="end in a norm, not a linear map"):
        pruned("gemma2", refit=True)
    for add_on in ("refit", "compensate"):
        with pytest.raises(UserError, match="compensate, refit: expected with blocks above 0"):
            pruned("llama", blocks=0.0, **{add_on: True})
    with pytest.raises(UserError, match="ridge: expected none without refit"):
        pruned("llama", ridge=RIDGE)
