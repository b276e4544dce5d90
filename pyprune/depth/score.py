"""Scores of a model with some branches left out: perplexity, or divergence from the dense model."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pyprune.calibration.tokens import Batch
from pyprune.depth.graph import Branch, ResidualGraph, repeated
from pyprune.errors import UserError
from pyprune.models.running import positions_at_once

ObjectiveName = Literal["perplexity", "kl"]


class Scorer:
    """Scores hidden states of fixed batches; smaller is better.

    "perplexity": exp of the mean over rows of each row's mean negative log-likelihood
    (BlockPruner's definition, arXiv 2406.10594). "kl": mean over rows of the mean KL(dense ||
    pruned) per position; only the dense decoder outputs are kept, the dense logits are recomputed
    chunk by chunk. Padding is never a target.

    every: score each `every`-th target of a row, the same ones for every candidate. counted: which
    tokens are targets, bool [B, T] for every batch; None: all.
    """

    def __init__(
        self,
        graph: ResidualGraph,
        batches: Sequence[Batch],
        objective: ObjectiveName = "perplexity",
        every: int = 1,
        counted: Sequence[Tensor] | None = None,
    ) -> None:
        self.graph = graph
        self.objective = objective
        self.every = every
        self.batches = [batch.to(graph.device) for batch in batches]
        # Rows without a target (a single token) have no score.
        tokens = [None] * len(batches) if counted is None else counted
        self._weights = list(map(self._scored, self.batches, tokens))
        if not any(bool(weights.any()) for weights in self._weights):
            raise UserError("calibration: expected sequences of 2 tokens or more, got none")
        self._dense: list[Tensor] = []
        if objective == "kl":
            with torch.no_grad():
                self._dense = [self._finished(i, self._run(i)) for i in range(len(self.batches))]

    def _run(self, i: int, removed: Collection[Branch] = ()) -> Tensor:
        state, context = self.graph.start(self.batches[i])
        return self.graph.advance((0, len(self.graph.branches)), state, context, removed).total

    def _scored(self, batch: Batch, counted: Tensor | None) -> Tensor:
        """1 for targets that count, float64 [B, n]."""
        ids = batch.input_ids
        mask = torch.ones_like(ids) if batch.attention_mask is None else batch.attention_mask
        if counted is not None:
            mask = mask * counted.to(mask)
        return mask[:, 1:][:, :: self.every].double()

    def _finished(self, i: int, hidden: Tensor) -> Tensor:
        """Decoder outputs at the positions that predict a scored target."""
        batch = repeated(self.batches[i], len(hidden) // len(self.batches[i].input_ids))
        return self.graph.finish(hidden, batch)[:, :-1][:, :: self.every]

    @torch.no_grad()
    def rows(self, i: int, hidden: Tensor) -> Tensor:
        """Mean loss of every row of batch `i`, for S streams at once: float64 [S, B].

        hidden: outputs of the last layer, [S * B, T, d], stream by stream.
        """
        ids = self.batches[i].input_ids
        streams = len(hidden) // len(ids)
        finished = self._finished(i, hidden)
        targets = ids[:, 1:][:, :: self.every].repeat(streams, 1)
        step = positions_at_once(self.graph.model, len(finished))
        losses = torch.empty(targets.shape, dtype=torch.float64, device=targets.device)
        for at in range(0, targets.shape[1], step):
            piece = slice(at, at + step)
            logits = self.graph.logits(finished[:, piece], ids)
            if self.objective == "kl":
                losses[:, piece] = self._divergence(i, piece, logits)
            else:
                of_target = logits.gather(-1, targets[:, piece, None])[..., 0]
                losses[:, piece] = (logits.logsumexp(-1) - of_target).double()
        return self._means(i, losses.view(streams, *self._weights[i].shape))

    def _divergence(self, i: int, piece: slice, logits: Tensor) -> Tensor:
        """KL(dense || pruned) per position, [S * B, t]."""
        dense = self.graph.logits(self._dense[i][:, piece], self.batches[i].input_ids)
        log_p = dense.log_softmax(-1)
        log_q = logits.log_softmax(-1).view(-1, *log_p.shape)
        return ((log_p.exp() * (log_p - log_q)).sum(-1)).flatten(0, 1).double()

    @torch.no_grad()
    def score(self, removed: Collection[Branch] = ()) -> float:
        """Score without `removed`."""
        rows = [self.rows(i, self._run(i, removed)) for i in range(len(self.batches))]
        return self.total(rows)[0]

    @torch.no_grad()
    def rows_naive(self, i: int, removed: Collection[Branch]) -> Tensor:
        """The same by one forward of the whole model with `removed` skipped, all logits at once:
        [1, B]. What everything faster is checked against."""
        batch = self.batches[i]
        with self.graph.skipping(removed):
            logits = self.graph.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits.float()
        scored = logits[:, :-1][:, :: self.every]
        if self.objective == "kl":
            losses = self._divergence(i, slice(None), scored)
        else:
            targets = batch.input_ids[:, 1:][:, :: self.every]
            losses = F.cross_entropy(scored.flatten(0, 1), targets.flatten(), reduction="none")
        return self._means(i, losses.double().view(1, *self._weights[i].shape))

    def all_naive(self, removed: Collection[Branch]) -> list[Tensor]:
        """`rows_naive` of every batch."""
        return [self.rows_naive(i, removed) for i in range(len(self.batches))]

    def score_naive(self, removed: Collection[Branch]) -> float:
        """Score without `removed`, by a full forward of every batch."""
        return self.total(self.all_naive(removed))[0]

    def _means(self, i: int, losses: Tensor) -> Tensor:
        weights = self._weights[i]
        # Where, not times: a NaN or infinity in the padding must stay out.
        kept = torch.where(weights > 0, losses, torch.zeros_like(losses))
        return kept.sum(-1) / weights.sum(-1).clamp(min=1)

    def total(self, rows: Sequence[Tensor]) -> list[float]:
        """Scores of S streams from their row means, one [S, B] per batch (in order; the first few
        batches will do)."""
        return [self.of_mean(float(mean)) for mean in self.counted(rows).mean(dim=1)]

    def counted(self, rows: Sequence[Tensor]) -> Tensor:
        """The row means that count, of all batches together, [S, R]."""
        real = torch.cat([w.sum(-1) > 0 for w in self._weights[: len(rows)]])
        return torch.cat(list(rows), dim=1)[:, real]

    def of_mean(self, mean: float) -> float:
        """The score that a mean loss amounts to."""
        if self.objective == "kl":
            return mean
        return math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN

    def mean_of(self, score: float) -> float:
        """The mean loss behind a score."""
        if self.objective == "kl":
            return score
        return -math.inf if score == 0 else math.log(score)  # NaN stays NaN


def or_inf(value: float) -> float:
    """NaN is never best: it is as bad as infinity."""
    return math.inf if math.isnan(value) else value


def perplexities(
    graph: ResidualGraph,
    batches: Sequence[Batch],
    removals: Sequence[Collection[Branch]] = ((),),
) -> list[float]:
    """Perplexity (see `Scorer`) of the model without each of `removals`."""
    scorer = Scorer(graph, batches)
    return [scorer.score(removed) for removed in removals]
