"""A cache of fixed size decodes what `generate` does; a graph of a step what the step does."""

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, tiny_model
from transformers.utils import logging

from pyprune.errors import UserError
from pyprune.sparse.bench import _time
from pyprune.sparse.decoding import StaticDecoding, cache_name

# In some releases of transformers BLOOM's position biases do not fit a static cache.
FAMILIES = sorted(set(CONFIGS) - {"bloom"})


def prompt(batch=3, tokens=7):
    gen = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB, (batch, tokens), generator=gen)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family):
    model, ids = tiny_model(family), prompt()
    decoding = StaticDecoding(model, 3, 16)
    for first in (0, 1):  # the second prompt finds nothing of the first
        given = ids.roll(first)
        wanted = model.generate(
            given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=9,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        assert torch.equal(decoding.continued(given, 8), wanted[:, 7:])


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_has_the_name_that_transformers_wants(monkeypatch):
    # Of an argument's old name transformers 5.24 warns, of an output's it logs, once a process.
    logger = logging.get_logger("transformers.utils.generic")
    monkeypatch.setattr(logger, "warning_once", pytest.fail, raising=False)
    model = tiny_model("llama")
    StaticDecoding(model, 3, 16).continued(prompt(), 2)
    _time(model, prompt(), 2)


def test_code_that_came_with_a_checkpoint_may_know_the_old_name():
    class Older(torch.nn.Module):
        def forward(self, input_ids, past_key_values=None, **kwargs):
            raise NotImplementedError

    assert cache_name(Older()) == "past_key_values"


def test_a_sliding_window_cannot_be_recorded():
    decoding = StaticDecoding(tiny_model("mistral"), 1, 16)
    with pytest.raises(UserError, match=r"got StaticSlidingWindowLayer \(--no-graph"):
        decoding.record(prompt(1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_repeats_the_step(dtype):
    model, ids = tiny_model("llama").to("cuda", dtype), prompt()
    decoding = StaticDecoding(model, 3, 16)
    wanted = decoding.continued(ids, 8)
    decoding.record(ids)
    for _ in range(2):
        assert torch.equal(decoding.continued(ids, 8), wanted)
    other = ids.roll(1)
    again = StaticDecoding(model, 3, 16)
    assert torch.equal(decoding.continued(other, 8), again.continued(other, 8))
