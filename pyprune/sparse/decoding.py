"""Greedy decoding with a key-value cache of fixed size; on a CUDA device a step becomes a graph.

A decoding step of a transformers model is some thousand kernels of a few microseconds each, and
Python takes longer to launch them than the GPU to run them. Recorded once, a step is one launch.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from pyprune.errors import UserError

# Steps before a step is recorded: kernels are compiled, libraries choose their algorithms and
# allocate workspaces, none of which can happen while recording.
WARM_UP = 2


def cache_name(model: PreTrainedModel) -> str:
    """What `model` calls its key-value cache, as an argument and in its output.

    Transformers 5.24 renamed it, and warns of the old name; code that came with a checkpoint may
    know the old one alone.
    """
    new = "cache" in inspect.signature(model.forward).parameters
    return "cache" if new else "past_key_values"


class StaticDecoding:
    """Sequences that are continued together, each by its likeliest token.

    Args:
        model: a causal language model that works with transformers' `StaticCache`.
        batch: sequences. positions: tokens of each, prompt and continuation, that the cache holds.

    `token` `[batch, 1]` is what `step` reads, and replaces by the next one.
    """

    def __init__(self, model: PreTrainedModel, batch: int, positions: int) -> None:
        self._model = model
        self._cache = StaticCache(config=model.config, max_cache_len=positions)
        self._options = {cache_name(model): self._cache, "use_cache": True, "logits_to_keep": 1}
        self._graph: torch.cuda.CUDAGraph | None = None
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)

    @torch.inference_mode()
    def start(self, ids: Tensor) -> None:
        """Reads the prompts `[batch, T]`; whatever was there before is forgotten."""
        self._cache.reset()
        self._advance(ids.to(self.token.device))

    @torch.inference_mode()
    def step(self) -> None:
        if self._graph is None:
            self._advance(self.token)
        else:
            self._graph.replay()

    def continued(self, ids: Tensor, steps: int) -> Tensor:
        """The tokens after `ids`: `[batch, steps + 1]`, the first from the prompt itself."""
        self.start(ids)
        tokens = [self.token.clone()]
        for _ in range(steps):
            self.step()
            tokens.append(self.token.clone())
        return torch.cat(tokens, dim=1)

    @torch.inference_mode()
    def record(self, ids: Tensor) -> None:
        """From here on `step` replays a CUDA graph. `ids` is any prompt; the cache must have room
        for `WARM_UP` steps after it. The model's weights must stay where they are.

        Raises UserError for a model whose step is not the same kernels every time.
        """
        # A sliding window's cache counts in Python: a graph would keep the first count for ever.
        other = [type(x).__name__ for x in self._cache.layers if type(x) is not StaticLayer]
        if other:
            raise UserError(
                f"graph: expected layers that cache every position, got {other[0]} (--no-graph "
                "does without)"
            )
        device = self.token.device
        self.start(ids)
        aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._advance(self.token)
        torch.cuda.current_stream(device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        try:
            # Its own choice of a stream is on the first device that a graph was captured on.
            with torch.cuda.graph(graph, stream=aside):
                self._advance(self.token)
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise UserError(
                f"graph: a step of this model cannot be recorded (--no-graph does without): {first}"
            ) from error
        self._graph = graph

    def _advance(self, ids: Tensor) -> None:
        out = self._model(ids, **self._options)
        self.token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
