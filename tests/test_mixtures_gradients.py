"""Methods with gradients on mixtures: what they refuse."""

import pytest
import torch
from tiny_models import MORE, tiny_model, tiny_tokens

from pyprune.eigendamage import EigenDamageConfig, prune_eigendamage
from pyprune.errors import LayerError
from pyprune.methods import METHODS
from pyprune.models.adapter import Adapter
from pyprune.prune import prune
from pyprune.width.config import WidthConfig
from pyprune.width.run import prune_width

# All but magnitude look at what a matrix reads.
LOOKING = [name for name, row in METHODS.items() if row.statistic or row.gradient]


def tokens():
    return [tiny_tokens(4, 32, seed) for seed in range(2)]


def run(method, model, **options):
    if method == "eigendamage":
        return prune_eigendamage(model, tokens(), EigenDamageConfig(**options))
    return prune(model, tokens(), method, 0.5, **options)


@pytest.mark.skipif("zaya" not in MORE, reason="this transformers does not know the family")
@pytest.mark.parametrize("method", [*LOOKING, "llm-surgeon", "eigendamage"])
def test_a_matrix_that_runs_twice_is_refused_by_name(method):
    """The second time on a zero: factors of one run would be taken for those of both."""
    model = tiny_model("zaya")
    with pytest.raises(LayerError, match=r"v_proj_delayed: runs .* --exclude '\*\.v_proj_delayed'"):
        run(method, model)
    before = {name: w.clone() for name, w in model.named_parameters()}
    run(method, model, exclude=["*.v_proj_delayed"])
    changed = {n for n, w in model.named_parameters() if not torch.equal(w, before[n])}
    assert changed and not any("v_proj_delayed" in name for name in changed)


def test_a_writer_that_runs_twice_is_refused_by_name():
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + mlp.down_proj(x.new_ones(1, 1, 64))
    config = WidthConfig("llm-surgeon-width", ratio=0.1, method_options={"multiple": 1})
    with pytest.raises(LayerError, match=r"1\.mlp\.down_proj: runs more than once"):
        prune_width(model, tokens(), config)
    assert Adapter.of(model).linears(1)[-1].weight().shape == (32, 64)
