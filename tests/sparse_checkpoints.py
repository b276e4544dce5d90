"""Small pruned checkpoints on disk, and a writer of compressed-tensors' old sparse layouts."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from torch import nn


def prune_in_place(model: nn.Module, pattern: str) -> None:
    """2:4 by position, or a random half, in every 2-d weight of the decoder blocks."""
    gen = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if p.dim() == 2 and (".layers." in name or ".h." in name):
            if pattern == "2:4":
                kept = torch.rand(p.numel() // 4, 4, generator=gen).argsort(1) < 2
            else:
                kept = torch.rand(p.numel() // 4, 4, generator=gen) < 0.5
            p.data[~kept.view(p.shape)] = 0.0


def pruned_checkpoint(folder: Path, family="llama", pattern="2:4", shard="5GB", **config) -> Path:
    model = tiny_model(family, **config).to(torch.bfloat16)
    prune_in_place(model, pattern)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def bits_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    same = a.dtype == b.dtype and a.shape == b.shape
    return same and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def write_legacy(
    folder: Path, out: Path, kind: str, key: str = "quantization_config", early: bool = False
) -> None:
    """Rewrites a one-file checkpoint as compressed-tensors 0.9 to 0.14 did; early: as 0.6 did."""
    state: dict[str, torch.Tensor] = {}
    for name, w in load_file(folder / "model.safetensors").items():
        if w.dim() != 2 or ".layers." not in name:
            state[name] = w
            continue
        stem = name if early else name.removesuffix(".weight")
        if kind == "sparse-24-bitmask":
            top = w.abs().float().view(-1, 4).topk(2, dim=1).indices
            mask = torch.zeros(w.numel() // 4, 4, dtype=torch.bool).scatter_(1, top, True)
            mask = mask.view(w.shape)
            state[f"{stem}.compressed"] = w[mask].view(w.shape[0], -1)
        else:
            mask = w != 0
            state[f"{stem}.compressed"] = w[mask]
            counts = mask.sum(1)
            state[f"{stem}.row_offsets"] = counts.cumsum(0) - counts
        padded = nn.functional.pad(mask, (0, -w.shape[1] % 8)).view(w.shape[0], -1, 8)
        state[f"{stem}.bitmask"] = (padded * (1 << torch.arange(8))).sum(2).to(torch.uint8)
        state[f"{stem}.shape"] = torch.tensor(w.shape).view(-1, 1)
    out.mkdir()
    save_file(state, out / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    sparsity = {"format": kind, "targets": ["Linear"], "ignore": [], "global_sparsity": 0.5}
    config[key] = {
        "quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity,
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
