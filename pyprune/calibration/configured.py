"""Calibration tokens as a run's configuration asks for them."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedTokenizerBase

from pyprune.calibration.batches import as_token_set
from pyprune.calibration.tokens import TokenSet, calibration_tokens
from pyprune.config import CalibrationConfig
from pyprune.errors import UserError
from pyprune.models.positions import positions_of

logger = logging.getLogger("pyprune")


def configured_tokens(data: object, wanted: CalibrationConfig, config: Any) -> TokenSet:
    """What a model with the transformers configuration `config` is shown.

    data: a tokenizer, with which `wanted` is read (sequences are cut to the model's positions, with
    a warning), or the batches themselves, see `as_token_set`. Raises UserError for anything else,
    too little text, or batches that do not fit the model.
    """
    text_config = config.get_text_config()
    positions = positions_of(config)
    if isinstance(data, PreTrainedTokenizerBase):
        seqlen = min(wanted.seqlen, positions or wanted.seqlen)
        data = calibration_tokens(
            wanted.source,
            data,
            nsamples=wanted.nsamples,
            seqlen=seqlen,
            seed=wanted.seed,
            batch_size=wanted.batch_size,
            padding=wanted.padding,
            bos=wanted.bos,
        )
        if seqlen < wanted.seqlen:
            logger.warning(
                "sequences of %d tokens instead of %d: the model has no more positions",
                seqlen,
                wanted.seqlen,
            )
    if data is None:
        raise UserError("calibration: expected a tokenizer or batches, got none")
    return as_token_set(data, vocabulary=text_config.vocab_size, positions=positions)
