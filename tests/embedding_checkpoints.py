"""Checkpoints with int8 or coded embeddings and heads, tied and not."""

import pytest
from safetensors.torch import load_file, save_file
from sparse_checkpoints import pruned_checkpoint

from pyprune.sparse.convert import compress_checkpoint

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
PARTS = {
    "int8": ("values", "scales"),
    "coded": ("low", "codes", "bases", "escapes", "row_offsets"),
}
ROUNDED = pytest.mark.parametrize("kind", ["int8"], indirect=True)
EXACT = pytest.mark.parametrize("kind", ["coded"], indirect=True)


def compressed(folder, family="llama", tied=True, kind="int8", **options):
    config = {"tie_word_embeddings": tied}
    if family == "gemma2":
        config["final_logit_softcapping"] = 3.0
    if family == "opt":
        config["word_embed_proj_dim"] = 48  # of 16 columns too little would be saved
    dense = pruned_checkpoint(folder / "dense", family, **config)
    report = compress_checkpoint(dense, folder / "small", embeddings=kind, **options)
    return dense, folder / "small", report


def changed_embedding(source, folder, change):
    """A copy of a one-file dense checkpoint with another embedding."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    state = load_file(source / "model.safetensors")
    state[f"{EMBEDDING}.weight"] = change(state[f"{EMBEDDING}.weight"])
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder
