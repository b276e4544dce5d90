"""How much memory it takes to prune a checkpoint, against the size of the checkpoint.

    python benchmarks/bench_memory.py --json memory.json
    python benchmarks/bench_memory.py --methods magnitude wanda sparsegpt

A random bf16 Llama of 16 blocks (1.8 GB) is written shard by shard and pruned by
`prune_checkpoint` in a process of its own, whose peak resident memory is compared to that of a
process that only imports pyprune, PyTorch and transformers. Before it counts, the output is
checked: the sparsity asked for, and everything outside the pruned matrices byte for byte the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _harness import environment, write_rows
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pyprune.checkpoint import Checkpoint, TensorEntry
from pyprune.inspection import inspect_checkpoint

Sizes = dict[str, int]
SIZES: Sizes = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "vocab_size": 32000,
}
SMOKE_SIZES: Sizes = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
}
NSAMPLES, SEQLEN, BATCH = 16, 256, 4

# Not getrusage: its maximum survives exec, so it would be this process's if that is larger.
PEAK = """
from pyprune.measure import Measure
print(Measure.peak_rss_bytes())
"""
IMPORTS = """
import sys
from pyprune.config import PruneConfig
from pyprune.prune import prune_checkpoint
"""
PRUNE = """
prune_checkpoint(sys.argv[1], sys.argv[2], PruneConfig.from_yaml(sys.stdin.read()))
"""


def make_checkpoint(folder: Path, sizes: Sizes, zeros: str | None = None) -> None:
    """One block a shard, so that making it needs no more memory than pruning it. zeros: in the
    blocks' matrices; "2:4", or "random" for half of them anywhere."""
    config = LlamaConfig(
        **sizes,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    gen = torch.Generator().manual_seed(0)
    h, f = config.hidden_size, config.intermediate_size

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=gen, dtype=torch.bfloat16) * 0.02

    def pruned(rows: int, columns: int) -> torch.Tensor:
        w = matrix(rows, columns)
        if zeros == "2:4":
            w[:, 0::4] = w[:, 3::4] = 0
        elif zeros == "random":
            w[torch.rand(rows, columns, generator=gen) < 0.5] = 0
        return w

    shards: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, {"format": "pt"})
        shards.update(dict.fromkeys(tensors, name))

    embeddings = matrix(config.vocab_size, h)
    norm = torch.ones(h, dtype=torch.bfloat16)
    save("rest.safetensors", {"model.embed_tokens.weight": embeddings, "model.norm.weight": norm})
    for i in range(config.num_hidden_layers):
        block = {f"self_attn.{p}_proj": (h, h) for p in "qkvo"}
        block |= {"mlp.gate_proj": (f, h), "mlp.up_proj": (f, h), "mlp.down_proj": (h, f)}
        tensors = {f"{name}.weight": pruned(*shape) for name, shape in block.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{name}.weight"] = torch.ones(h, dtype=torch.bfloat16)
        prefix = f"model.layers.{i}."
        save(f"block-{i:02d}.safetensors", {prefix + name: t for name, t in tensors.items()})
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_text(folder: Path, vocabulary: int) -> Path:
    """A tokenizer of random words, saved with the model, and enough of them for calibration."""
    words = [f"w{i}" for i in range(vocabulary)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0").save_pretrained(folder)
    gen = torch.Generator().manual_seed(1)
    drawn = torch.randint(vocabulary, (2 * NSAMPLES, SEQLEN), generator=gen)
    text = folder.parent / "text.txt"
    text.write_text("\n\n".join(" ".join(words[i] for i in row) for row in drawn))
    return text


def child(code: str, *arguments: str, given: str = "") -> int:
    """Peak resident bytes of a process that runs `code`."""
    done = subprocess.run([sys.executable, "-c", code + PEAK, *arguments], input=given,
                          capture_output=True, text=True, check=False)  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"the measured process failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def check(dense: Checkpoint, folder: Path) -> float:
    """The sparsity reached; raises if anything but the pruned matrices changed."""
    found = inspect_checkpoint(Checkpoint.open(folder))
    pruned = {layer.name for layer in found.layers}
    for name, entry in dense.tensors.items():
        if name not in pruned and raw(entry, entry.file) != raw(entry, folder / entry.file.name):
            raise AssertionError(f"{name} changed")
    return found.sparsity


def raw(entry: TensorEntry, file: Path) -> bytes:
    with file.open("rb") as stream:
        stream.seek(entry.offset)
        return stream.read(entry.nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "wanda"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--dtype", default="auto", help="to compute in; auto: bf16, as stored")
    args = parser.parse_args()
    sizes = SMOKE_SIZES if args.smoke else SIZES
    if args.smoke:
        args.methods = args.methods[-1:]
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        source = Path(tmp) / "dense"
        source.mkdir()
        make_checkpoint(source, sizes)
        text = make_text(source, sizes["vocab_size"])
        dense = Checkpoint.open(source)
        imports = child(IMPORTS)
        for method in args.methods:
            config = {"method": method, "sparsity": args.sparsity, "device": args.device,
                      "dtype": args.dtype,
                      "calibration": {"source": str(text), "nsamples": NSAMPLES,
                                      "seqlen": SEQLEN, "batch_size": BATCH}}  # fmt: skip
            out = Path(tmp) / method
            started = time.perf_counter()
            peak = child(IMPORTS + PRUNE, str(source), str(out), given=json.dumps(config))
            seconds = time.perf_counter() - started
            rows.append({
                "op": "prune_checkpoint", "method": method, "dtype": args.dtype,
                "model_bytes": dense.nbytes, "blocks": sizes["num_hidden_layers"],
                "block_bytes": block_bytes(dense), "calibration_tokens": NSAMPLES * SEQLEN,
                "peak_rss_bytes": peak, "imports_rss_bytes": imports,
                "share_of_model": (peak - imports) / dense.nbytes, "seconds": seconds,
                "sparsity": check(dense, out), **environment(args.device),
            })  # fmt: skip
    show(rows)
    write_rows(args.json, rows)


def block_bytes(checkpoint: Checkpoint) -> int:
    return sum(e.nbytes for n, e in checkpoint.tensors.items() if n.startswith("model.layers.0."))


def show(rows: list[dict]) -> None:
    table = Table("method", "model MB", "block MB", "imports MB", "peak MB", "(peak - imports) / "
                  "model", "sparsity", "s")  # fmt: skip
    for row in rows:
        sizes = ("model_bytes", "block_bytes", "imports_rss_bytes", "peak_rss_bytes")
        table.add_row(row["method"], *(f"{row[key] / 1e6:,.0f}" for key in sizes),
                      f"{row['share_of_model']:.2f}", f"{row['sparsity']:.4f}",
                      f"{row['seconds']:.1f}")  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
