"""Models that are saved and come back, and the command that prunes them in between."""

from __future__ import annotations

import json
from pathlib import Path

from byte_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM

from pyprune import cli
from pyprune.checkpoint import write_report
from pyprune.depth.decision import SHARED, DepthDecision

BAD_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def reloaded(folder: Path, **options):
    """What plain transformers makes of a directory, in evaluation mode: its tensors are those of
    the model, all of them and no others."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in BAD_KEYS), info
    assert not model.training
    return model


def save_model(model, tokenizer, folder: Path, report=None) -> None:
    """An ordinary Hugging Face directory, with a pyprune.json if there is a `report`."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if report is not None:
        write_report(folder, report, "")


def save_source(folder: Path, model, report=None) -> Path:
    """`folder` with a checkpoint in `in`, of a vocabulary of bytes, and a text."""
    save_model(model, byte_tokenizer(), folder / "in", report=report)
    (folder / "in" / "LICENSE").write_text("Do as you like.\n")
    (folder / "text.txt").write_text("A stitch in time saves nine, they say. " * 100)
    return folder


def load_decision(folder: Path) -> DepthDecision:
    """The decision in the pyprune.json of a model without some of its branches."""
    values = json.loads((folder / "pyprune.json").read_text(encoding="utf-8"))
    shared = {key: values[key] for key in SHARED}
    return DepthDecision.from_dict({**values["decision"], **shared})


def prune_source(folder: Path, *more: str, out: str = "out") -> int:
    """`pyprune prune` of `folder`/in with its text into `folder`/`out`."""
    text = ["--calibration", str(folder / "text.txt"), "--nsamples", "4", "--seqlen", "32"]
    return cli.main(["prune", str(folder / "in"), "-o", str(folder / out), *text, *more])
