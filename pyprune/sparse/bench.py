"""Dense and compressed models side by side: bytes, load time, prefill and decode rates.

All models are in memory at once and take turns, so that whatever else the machine does meets them
alike; every figure is a median with its least and greatest. Ratios are against the fastest dense
model of that line: PyTorch's kernels in each dtype, or our own dense bf16 kernel.

On a CUDA device every model, dense or compressed, decodes by replaying a CUDA graph of one step
(`sparse.decoding`): launched from Python, a step takes as long as Python does.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyprune.errors import UserError
from pyprune.measure import held_bytes
from pyprune.models.positions import positions_of
from pyprune.progress import Progress
from pyprune.sparse.compare import differences
from pyprune.sparse.decoding import WARM_UP, StaticDecoding, cache_name
from pyprune.sparse.dense import DenseLinear, use_own_kernels
from pyprune.sparse.embedding import StoredEmbedding
from pyprune.sparse.factored import FactoredLinear
from pyprune.sparse.layout import dtype_name
from pyprune.sparse.linear import SparseLinear
from pyprune.sparse.load import load
from pyprune.sparse.stored import DENSE, StoredCheckpoint

TORCH, OWN = "torch", "pyprune"  # whose kernels multiply the linear layers
DTYPES = (torch.float32, torch.bfloat16)
PHASES = ("prefill", "decode")
TRIED_TOKENS = 32  # before memory is measured
CHECKED_STEPS = 8  # of a graph, against the same steps launched one by one


def threads(number: int) -> str:
    """How many, in words."""
    return "1 thread" if number == 1 else f"{number} threads"


@dataclass(frozen=True)
class Protocol:
    """prompt: tokens of every sequence in prefill. steps: tokens decoded after it. rounds: how
    often each model takes its turn, after one that does not count. graph: decode by CUDA graphs;
    None: on CUDA devices."""

    batches: tuple[int, ...] = (1, 4, 16, 64)
    prompt: int = 32
    steps: int = 16
    rounds: int = 3
    seed: int = 0
    graph: bool | None = None

    def __post_init__(self) -> None:
        numbers = (*self.batches, self.prompt, self.steps, self.rounds)
        if not self.batches or min(numbers) < 1 or max(numbers) >= 1 << 31:
            given = f"{self.batches}, {self.prompt}, {self.steps} and {self.rounds}"
            raise UserError(
                f"expected batches, prompt, steps and rounds above 0 and below 2^31, got {given}"
            )


@dataclass(frozen=True)
class Contestant:
    """One model in one dtype. name: DENSE or what the compressed one is called. seconds: to load.
    file_bytes: of the tensors on disk. weight_bytes: of the model's weights in memory, summed.
    resident_bytes: what the process held more once it was loaded and had been run, measured;
    None for a model that was made in memory. kernels: of its linear layers. differs: in what
    its model differs from the dense one, beyond the values of its weights; empty if in nothing."""

    name: str
    dtype: str
    seconds: float | None
    file_bytes: int
    weight_bytes: int
    model: PreTrainedModel = field(repr=False, compare=False)
    kernels: str = OWN
    differs: str = ""
    resident_bytes: int | None = None

    @property
    def label(self) -> str:
        return label(self.name, self.dtype, self.kernels)

    def facts(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "load_seconds": self.seconds,
            "file_bytes": self.file_bytes,
            "weight_bytes": self.weight_bytes,
            "resident_bytes": self.resident_bytes,
            "kernels": self.kernels,
            "differs": self.differs,
        }


def label(name: str, dtype: str, kernels: str) -> str:
    return f"{name} {dtype}, own kernel" if (name, kernels) == (DENSE, OWN) else f"{name} {dtype}"


@dataclass(frozen=True)
class Rate:
    """Tokens per second of one model in one phase at one batch size."""

    name: str
    dtype: str
    phase: str
    batch: int
    median: float
    least: float
    greatest: float
    kernels: str = OWN

    @property
    def label(self) -> str:
        return label(self.name, self.dtype, self.kernels)


@dataclass(frozen=True)
class BenchResult:
    models: list[dict[str, Any]]
    rates: list[Rate]
    protocol: Protocol
    device: str
    threads: int
    torch_version: str

    def fastest(self, name: str, phase: str, batch: int) -> Rate:
        """The model's fastest dtype and kernels on that line."""
        line = (r for r in self.rates if (r.name, r.phase, r.batch) == (name, phase, batch))
        return max(line, key=lambda rate: rate.median)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(str(model["name"]) for model in self.models))

    def ratios(self) -> list[dict[str, Any]]:
        """The rate of every compressed model in every dtype over that of the fastest dense one."""
        rows = []
        for rate in self.rates:
            if rate.name != DENSE:
                dense = self.fastest(DENSE, rate.phase, rate.batch)
                row = {"name": rate.name, "dtype": rate.dtype, "phase": rate.phase}
                ratio = {"batch": rate.batch, "ratio": rate.median / dense.median}
                fastest = {"dense_dtype": dense.dtype, "dense_kernels": dense.kernels}
                rows.append({**row, **ratio, **fastest})
        return rows

    def memory(self) -> dict[str, float]:
        """Of every compressed model in a 16-bit dtype, by label, its weights' bytes over those of
        the dense model in that dtype."""
        dense = {m["dtype"]: m["weight_bytes"] for m in self.models if m["name"] == DENSE}
        return {
            label(m["name"], m["dtype"], OWN): m["weight_bytes"] / dense[m["dtype"]]
            for m in self.models
            if m["name"] != DENSE and m["dtype"] in ("bfloat16", "float16") and m["dtype"] in dense
        }

    def warnings(self) -> list[str]:
        """One sentence for each model whose rates differ from the dense one's for other reasons
        than how its weights are stored."""
        found = {m["name"]: m["differs"] for m in self.models if m.get("differs")}
        return [
            f"{name} is another model than the dense one: {what}. Ratios compare the two models."
            for name, what in found.items()
        ]

    def verdict(self) -> list[str]:
        """One sentence for each compressed model in each dtype: where it loses to dense."""
        lost: dict[str, list[str]] = {}
        for row in self.ratios():
            losses = lost.setdefault(f"{row['name']} {row['dtype']}", [])
            if row["ratio"] < 1:
                losses.append(f"{row['phase']} at batch {row['batch']} ({row['ratio']:.2f}x)")
        return [
            f"{label} loses to the fastest dense model in {', '.join(losses)}."
            if losses
            else f"{label} loses nowhere here."
            for label, losses in lost.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        derived = {"ratios": self.ratios(), "memory": self.memory(), "verdict": self.verdict()}
        return {**asdict(self), **derived, "warnings": self.warnings()}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and persistent buffers, shared ones once."""
    tensors = model.state_dict(keep_vars=True).values()
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def densified(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` with plain `nn.Linear` and embeddings everywhere; weights that are dense
    are shared, and those that were tied stay tied."""
    dense = sharing_copy(model)
    made: dict[nn.Module, nn.Parameter] = {}
    for name, module in list(dense.named_modules()):
        if isinstance(module, FactoredLinear):
            dense.set_submodule(name, module.to_dense())
        elif isinstance(module, SparseLinear | StoredEmbedding):
            plain: Any = module.to_dense()
            plain.weight = made.setdefault(module.tied_to or module, plain.weight)
            dense.set_submodule(name, plain)
        elif isinstance(module, DenseLinear):
            dense.set_submodule(name, module.plain())
    return dense


def with_own_kernels(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a dense `model`, with the same weights in memory, whose linear layers use our dense
    kernel."""
    own = sharing_copy(model)
    use_own_kernels(own)
    return own


def sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Other modules, the same tensors."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return deepcopy(model, memo)


def contestants(
    sources: Mapping[str, str | Path],
    against: str | Path | None = None,
    dtypes: Iterable[torch.dtype] = DTYPES,
    device: str | None = None,
) -> list[Contestant]:
    """Loads the dense model and the compressed `sources` (by name), each in every dtype.

    against: the dense directory; None: the first source, decompressed in memory. What a source's
    model has other than the dense one (fewer layers, other widths) is noted. On the CPU the
    dense model takes part in bfloat16 once more, with our dense kernel in its linear layers.

    Raises UserError if a source is not compressed, `against` not dense, or a source has another
    vocabulary than the dense model.
    """
    opened = {name: StoredCheckpoint.open(source) for name, source in sources.items()}
    for name, stored in opened.items():
        if stored.kind != "pyprune":
            raise UserError(
                f"{stored.path}: {name}: expected a checkpoint of `pyprune compress`, it is stored "
                f"as {stored.kind}"
            )
    base = None if against is None else StoredCheckpoint.open(against)
    if base is not None and base.kind != DENSE:
        raise UserError(f"{base.path}: expected a dense checkpoint, it is {base.kind}")
    dense = base or next(iter(opened.values()), None)
    differ = {
        name: "" if dense is None or stored is dense else differences(stored, dense)
        for name, stored in opened.items()
    }
    made = []
    for dtype in dtypes:
        first: PreTrainedModel | None = None
        loaded = []
        for name, stored in opened.items():
            found = replace(_load(name, stored, dtype, device), differs=differ[name])
            first = first or found.model
            loaded.append(found)
        if base is not None:
            made.append(replace(_load(DENSE, base, dtype, device), kernels=TORCH))
        elif first is not None:
            model, size = densified(first), next(iter(opened.values())).dense_nbytes
            facts = (None, size, weight_bytes(model), model, TORCH)
            made.append(Contestant(DENSE, dtype_name(dtype), *facts))
        if made and dtype is torch.bfloat16 and made[-1].model.device.type == "cpu":
            own = with_own_kernels(made[-1].model)
            shared = replace(made[-1], seconds=None, resident_bytes=None)
            made.append(replace(shared, model=own, kernels=OWN))
        made += loaded
    return made


def _load(
    name: str, stored: StoredCheckpoint, dtype: torch.dtype, device: str | None
) -> Contestant:
    place = torch.device(device or "cpu")
    settle(stored, dtype, place)
    before = held_bytes(place)
    started = time.perf_counter()
    model = load(stored.path, dtype, device)
    touch(model)
    seconds = time.perf_counter() - started
    try_out(model)
    facts = (seconds, stored.nbytes, weight_bytes(model), model)
    held = max(0, held_bytes(place) - before)
    return Contestant(name, dtype_name(dtype), *facts, resident_bytes=held)


def settle(stored: StoredCheckpoint, dtype: torch.dtype, device: torch.device) -> None:
    """Has memory taken that is no model's own: for the code of its architecture, and for what
    PyTorch's products keep."""
    stored.checkpoint().build_model()
    linear = nn.Linear(256, 256, dtype=dtype, device=device)
    with torch.inference_mode():
        linear(torch.zeros(TRIED_TOKENS, 256, dtype=dtype, device=device))


def try_out(model: PreTrainedModel) -> None:
    """Runs the model on a few tokens: kernels may keep copies of weights from their first use."""
    tokens = min(TRIED_TOKENS, positions_of(model.config) or TRIED_TOKENS)
    with torch.inference_mode():
        model(torch.zeros(1, tokens, dtype=torch.long, device=model.device), use_cache=False)


def touch(model: nn.Module) -> None:
    """Reads every weight: transformers maps the file, and what keeps its dtype is read on first
    use only."""
    for t in model.state_dict().values():
        if t.numel():  # of a layer that is all zeros nothing is stored
            t.view(torch.uint8).amax() if t.dim() else t.item()


def bench(
    models: list[Contestant], protocol: Protocol, progress: Progress | None = None
) -> BenchResult:
    """Times every model's prefill and greedy decoding with a key-value cache.

    Raises UserError where that takes more positions than a model has, or graphs are asked for that
    cannot be had.
    """
    on_cuda = all(c.model.device.type == "cuda" for c in models)
    if protocol.graph and not on_cuda:
        raise UserError("graph: expected a CUDA device, this is the CPU")
    protocol = replace(protocol, graph=on_cuda if protocol.graph is None else protocol.graph)
    for positions in (positions_of(c.model.config) for c in models):
        if positions is not None and protocol.prompt + protocol.steps > positions:
            raise UserError(
                f"prompt, steps: expected at most the model's {positions} positions together, got "
                f"{protocol.prompt} and {protocol.steps}"
            )
    samples: dict[tuple[str, str, str, int, str], list[float]] = {}
    vocabulary = min(int(c.model.config.get_text_config().vocab_size) for c in models)
    gen = torch.Generator().manual_seed(protocol.seed)
    total, done = len(protocol.batches) * (protocol.rounds + 1) * len(models), 0
    for batch in protocol.batches:
        ids = torch.randint(0, vocabulary, (batch, protocol.prompt), generator=gen)
        recorded: dict[int, StaticDecoding] = {}
        for turn in range(protocol.rounds + 1):
            for k, c in enumerate(models):
                if progress is not None:
                    progress(f"batch {batch}, {c.label}", done, total)
                done += 1
                if protocol.graph and turn == 0:
                    recorded[k] = _recorded(c, ids, protocol.steps)
                prefill, decode = _time(c.model, ids, protocol.steps, recorded.get(k))
                if turn:
                    for phase, rate in (("prefill", prefill), ("decode", decode)):
                        key = (c.name, c.dtype, phase, batch, c.kernels)
                        samples.setdefault(key, []).append(rate)
    rates = [
        Rate(*line[:4], statistics.median(found), min(found), max(found), kernels=line[4])
        for line, found in samples.items()
    ]
    facts = [c.facts() for c in models]
    return BenchResult(
        facts, rates, protocol, _device(models), torch.get_num_threads(), torch.__version__
    )


def _device(models: list[Contestant]) -> str:
    device = models[0].model.device
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def _recorded(found: Contestant, ids: Tensor, steps: int) -> StaticDecoding:
    """A graph of the model's step on as many sequences as `ids` has; checked against the same steps
    launched one by one."""
    positions = ids.shape[1] + max(steps, WARM_UP)
    decoding = StaticDecoding(found.model, len(ids), positions)
    few = min(steps, CHECKED_STEPS)
    expected = decoding.continued(ids, few)
    decoding.record(ids)
    if not torch.equal(decoding.continued(ids, few), expected):
        raise RuntimeError(f"{found.label}: the CUDA graph of a step decodes other tokens")
    return decoding


@torch.inference_mode()
def _time(
    model: PreTrainedModel, ids: Tensor, steps: int, recorded: StaticDecoding | None = None
) -> tuple[float, float]:
    """Tokens per second in prefill and in decoding."""
    ids, cache = ids.to(model.device), cache_name(model)
    _wait(model)
    started = time.perf_counter()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1].argmax(-1, keepdim=True)
    _wait(model)
    prefilled = begun = time.perf_counter()
    if recorded is not None:
        del out
        recorded.start(ids)
        _wait(model)
        begun = time.perf_counter()
        for _ in range(steps):
            recorded.step()
    else:
        for _ in range(steps):
            out = model(token, **{cache: getattr(out, cache)}, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    _wait(model)
    end = time.perf_counter()
    return ids.numel() / (prefilled - started), len(ids) * steps / (end - begun)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
