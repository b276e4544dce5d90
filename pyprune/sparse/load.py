"""`pyprune.load`: a compressed checkpoint as a transformers model."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from pyprune.checkpoint.source import main_dtype
from pyprune.devices import find_dtype
from pyprune.errors import UserError
from pyprune.sparse import format as formats
from pyprune.sparse.mapped import leave_files, tensor_bytes
from pyprune.sparse.range import check_range
from pyprune.sparse.stored import DENSE, StoredCheckpoint

KINDS = (DENSE, formats.METHOD)


def load(
    source: str | Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """The causal language model in `source`, for inference; compressed layers are `SparseLinear`,
    thin factors `FactoredLinear`, embeddings with int8 or coded rows `StoredEmbedding`.

    Args:
        source: a directory or hub id, compressed by `pyprune compress` or dense.
        dtype: of weights and activations, or its name; the checkpoint's own by default.
        device: the CPU by default.

    Raises:
        UserError: a file is truncated or damaged, a tensor is missing or does not fit, the version
            is unknown, the configuration cannot be used, or the checkpoint is quantized or in an
            old layout (`pyprune compress` converts those). File and tensor are named; nothing was
            computed by then. Or `dtype` is not a floating point one, or cannot hold a number of
            the checkpoint, which transformers would make an infinity of.
    """
    compute = find_dtype(dtype)
    stored = StoredCheckpoint.open(source)
    if stored.kind not in KINDS:
        raise UserError(
            f"{stored.path}: stored as {stored.kind}: convert it with `pyprune compress` first"
        )
    checkpoint = stored.checkpoint()  # which reads the configuration
    options: dict[str, Any] = {"device_map": str(device)} if device is not None else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            stored.path,
            dtype=compute or main_dtype(stored.path, stored.entries),
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            **options,
        )
    except UserError:
        raise
    except (ValueError, RuntimeError, TypeError, LookupError, OSError, SafetensorError) as error:
        line = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        where = stored.path
        if "mismatched" in line:
            # Of shapes transformers says no more than that they are listed "above", in its log.
            line = checkpoint.streaming_obstacle() or line
            tensor = stored.entries.get(line.partition(" ")[0])
            where = where if tensor is None else tensor.file
        raise UserError(f"{where}: cannot be loaded: {line}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        others = f", and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{stored.weights_file}: tensor {missing[0]} is missing{others}")
    if stored.kind == DENSE:  # the quantizer has looked at others
        check_range(model, stored.stored)
        leave_files(model, tensor_bytes(stored.stored))
    model.requires_grad_(False)
    return model.eval()
