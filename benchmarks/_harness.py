"""What every benchmark shares: side-by-side timing, measured limits, rows, table, JSON.

A benchmark builds a `Bench`, hands it one `Case` after another and calls `finish`:

    bench = Bench("gram", parse(__doc__))
    bench.run(Case(shape=(2048, 576), dtype=torch.float32, flops=..., bytes=..., limit="gemm",
                   providers={"native": lambda i: ..., "torch": lambda i: ...}, check=...))
    bench.finish()

A provider takes the number of the call, so that it can rotate its inputs (`copies` says how many
keep the GPU's L2 cold). All providers of a case are checked first, then timed in turns, so that a
change of clock or a busy neighbour hits them alike: read ratios, not single times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

Provider = Callable[[int], Any]

# A timed sample holds as many calls as fill this many seconds: far above the clock's resolution.
# A GPU's events resolve half a microsecond, so less will do there, and MOST_CALLS bounds how long
# the GPU is made to wait while they are queued.
SAMPLE_SECONDS = {"cpu": 0.02, "cuda": 0.004}
MOST_CALLS = {"cpu": 1000, "cuda": 100}
SMOKE_SAMPLE_SECONDS = 0.0
# How far a first, unhidden launch may be above what a sample is to hold and be asked again.
ROUGHLY = {"cpu": 1, "cuda": 10}
# A provider whose calls are long is timed in fewer turns, but two at least; its row says in how
# many.
PROVIDER_SECONDS = {"cpu": 6.0, "cuda": 2.0}
FEWEST_TURNS = 2


def parse(
    description: str | None, repetitions: int = 9, **extra: dict[str, Any]
) -> argparse.Namespace:
    """The command line of a benchmark; `extra` adds options, e.g. `tokens={"type": int}`.
    repetitions: by default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="smallest shapes, one repetition")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows here")
    parser.add_argument(
        "--repetitions", type=int, default=repetitions, help="timed samples of each provider"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default=_default_device())
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    args = parser.parse_args()
    if args.repetitions < 1:
        parser.error(f"--repetitions: expected at least 1, got {args.repetitions}")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return args


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """One problem solved by several providers.

    flops, bytes: the least work and memory traffic the problem needs (what `share_of_limit` is
        computed from), the same for every provider.
    limit: "gemm" (flops at the measured GEMM rate), "copy" (bytes at the measured copy bandwidth)
        or the name of a provider whose time is the limit.
    check: called with each provider's name and the result of its first call; raises if it is wrong.
    baseline: the provider that ratios are given against; None takes the last one.
    graphs: on a GPU, time replays of a CUDA graph of calls. What the host does between kernels then
        stays out, also where it takes longer than they do; no provider may wait for the device.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    flops: float
    bytes: float
    providers: Mapping[str, Provider]
    limit: str = "gemm"
    check: Callable[[str, Any], None] | None = None
    baseline: str | None = None
    note: Mapping[str, Any] = field(default_factory=dict)
    graphs: bool = False


def settle_allocator() -> None:
    """Frees one block as large as glibc ever takes for a measure of what to map anew.

    It maps blocks of 128 KiB and more from the system, and has their pages cleared, each time they
    are asked for, until one has been freed: from then on blocks up to that size are kept. What ran
    before would decide how long PyTorch's temporaries take, by up to 1.7x for a loop over columns
    of 2048. A process that has freed temporaries of a model's size is past that."""
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)


class Bench:
    def __init__(self, op: str, args: argparse.Namespace) -> None:
        settle_allocator()
        self.op = op
        self.smoke: bool = args.smoke
        self.device: str = args.device
        self.repetitions: int = 1 if args.smoke else args.repetitions
        self.path: Path | None = args.json
        self.rows: list[dict[str, Any]] = []
        self.console = Console()

    def run(self, case: Case) -> list[dict[str, Any]]:
        """Checks, times and tabulates one case; returns its rows."""
        first = {}
        for name, provider in case.providers.items():
            started = time.perf_counter()
            result = provider(0)
            first[name] = time.perf_counter() - started
            if case.check is not None:
                case.check(name, result)
        samples = time_interleaved(
            case.providers,
            self.device,
            self.repetitions,
            SMOKE_SAMPLE_SECONDS if self.smoke else SAMPLE_SECONDS[self.device],
            first if self.device == "cpu" else {},  # on a GPU it compiles, and does not wait
            graphs=case.graphs,
        )
        rows = [self._row(case, name, samples) for name in case.providers]
        self.rows += rows
        self.finish()  # after every case: an interrupted run keeps what it has measured
        self._print(case, rows)
        return rows

    def finish(self) -> None:
        write_rows(self.path, self.rows)

    def _row(self, case: Case, name: str, samples: dict[str, list[float]]) -> dict[str, Any]:
        median = statistics.median(samples[name])
        return {
            "op": self.op,
            "provider": name,
            "shape": list(case.shape),
            "dtype": str(case.dtype).removeprefix("torch."),
            "seconds_median": median,
            "seconds_min": min(samples[name]),
            "seconds_max": max(samples[name]),
            "repetitions": len(samples[name]),
            "flops": case.flops,
            "flops_rate": case.flops / median,
            "bytes": case.bytes,
            "bytes_rate": case.bytes / median,
            "share_of_limit": self._limit_seconds(case, samples) / median,
            "limit": case.limit,
            "baseline": self._baseline(case),
            "ratio_to_baseline": ratio(samples[name], samples[self._baseline(case)]),
            **case.note,
            **environment(self.device),
        }

    def _baseline(self, case: Case) -> str:
        return case.baseline or list(case.providers)[-1]

    def _limit_seconds(self, case: Case, samples: dict[str, list[float]]) -> float:
        if case.limit == "gemm":
            return case.flops / gemm_rate(self.device, case.dtype, self.smoke)
        if case.limit == "copy":
            return case.bytes / copy_bandwidth(self.device, self.smoke)
        return statistics.median(samples[case.limit])

    def _print(self, case: Case, rows: list[dict[str, Any]]) -> None:
        note = " ".join(f"{k}={v}" for k, v in case.note.items())
        dims = "x".join(map(str, case.shape))
        title = f"{self.op} {dims} {rows[0]['dtype']} {note}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE)
        table.add_column("provider", no_wrap=True)
        for column in ("median ms", "min", "max", "Gflop/s", "GB/s"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column(f"of {case.limit} limit", justify="right")
        table.add_column(f"time / {rows[0]['baseline']}", justify="right")
        for row in rows:
            table.add_row(
                row["provider"],
                *(f"{row[f'seconds_{k}'] * 1e3:.4g}" for k in ("median", "min", "max")),
                f"{row['flops_rate'] / 1e9:.1f}",
                f"{row['bytes_rate'] / 1e9:.1f}",
                f"{row['share_of_limit']:.1%}",
                f"{row['ratio_to_baseline']:.3f}",
            )
        self.console.print(table)


def write_rows(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """As JSON, where `--json` named a file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")


def ratio(ours: list[float], baseline: list[float]) -> float:
    """Median of the turn-by-turn ratios: each pair of samples was taken under the same load."""
    return statistics.median(a / b for a, b in zip(ours, baseline, strict=False))


def time_interleaved(
    providers: Mapping[str, Provider],
    device: str,
    repetitions: int,
    sample_seconds: float,
    first: Mapping[str, float] | None = None,
    graphs: bool = False,
) -> dict[str, list[float]]:
    """Seconds per call of each provider, `repetitions` samples taken in turns. `first`: seconds
    that a call has taken before. A provider whose calls are longer than a sample is spared those
    that find out how many a sample holds, and takes part in the first turns only if its samples
    would take longer than PROVIDER_SECONDS. graphs: on a GPU, see `Case`."""
    if graphs and device == "cuda":
        return _time_graphs(providers, repetitions, sample_seconds)
    sample = _sample_cuda if device == "cuda" else _sample_cpu
    calls, turns = {}, {}
    for name, provider in providers.items():
        seconds = (first or {}).get(name, 0.0)
        if device == "cuda":
            seconds = sample(provider, 1, 0)
        if seconds <= sample_seconds * ROUGHLY[device]:
            seconds = sample(provider, 2, 0)
        calls[name] = max(1, min(MOST_CALLS[device], int(sample_seconds / max(seconds, 1e-9))))
        turns[name] = repetitions
        longest = PROVIDER_SECONDS[device]
        if seconds > longest / repetitions:
            turns[name] = min(repetitions, max(FEWEST_TURNS, int(longest / seconds)))
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(repetitions):
        for name, provider in providers.items():
            if turn < turns[name]:
                samples[name].append(sample(provider, calls[name], turn))
    return samples


# Calls in a graph: as many as the most copies that inputs are rotated through, and enough that the
# gap between two replays does not count; fewer of calls so long that both matter less.
GRAPH_CALLS, FEWEST_GRAPH_CALLS = 32, 4
GRAPH_SECONDS = 0.01


def _time_graphs(
    providers: Mapping[str, Provider], repetitions: int, sample_seconds: float
) -> dict[str, list[float]]:
    """`time_interleaved` with every provider's calls captured once and replayed."""
    replays, calls = {}, {}
    for name, provider in providers.items():
        # What is set up at a first call, or the first with one of the inputs, cannot be captured.
        for i in range(GRAPH_CALLS):
            provider(i)
        seconds = _sample_cuda(provider, 1, 0)
        calls[name] = max(FEWEST_GRAPH_CALLS, min(GRAPH_CALLS, int(GRAPH_SECONDS / seconds)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(calls[name]):
                provider(i)
        replays[name] = lambda _, graph=graph: graph.replay()
    times = time_interleaved(replays, "cuda", repetitions, sample_seconds)
    return {name: [t / calls[name] for t in taken] for name, taken in times.items()}


def time_turns(
    providers: Mapping[str, Provider], device: str, turns: int
) -> dict[str, list[float]]:
    """Seconds of single calls of each provider, in turns and without a call to warm up: for calls
    that take seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for turn in range(turns):
        for name, provider in providers.items():
            start = time.perf_counter()
            provider(turn)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _sample_cpu(provider: Provider, calls: int, turn: int) -> float:
    start = time.perf_counter()
    for i in range(calls):
        provider(turn + i)
    return (time.perf_counter() - start) / calls


# Cycles a second of `torch.cuda._sleep`, no fewer than any GPU's clock makes.
SLEEP_CYCLES = 2e9
MOST_SLEEP = 0.1


def _sample_cuda(provider: Provider, calls: int, turn: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if calls > 1:
        torch.cuda.synchronize()
        started = time.perf_counter()
        provider(turn)
        queueing = (time.perf_counter() - started) * calls
        torch.cuda.synchronize()
        # The GPU is kept busy while the calls are queued: launch overhead stays out of the time. A
        # long call is timed with what its launches cost, as its user pays it.
        torch.cuda._sleep(int(min(1.5 * queueing + 1e-4, MOST_SLEEP) * SLEEP_CYCLES))
    begin.record()
    for i in range(calls):
        provider(turn + i)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e-3 / calls


def correlated_layer(rows: int, cols: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian weights, and the Gram matrix of inputs that share a few strong directions."""
    gen = torch.Generator(device=device).manual_seed(0)
    mix = torch.randn(cols // 8 + 1, cols, generator=gen, device=device)
    x = torch.randn(2 * cols, cols, generator=gen, device=device)
    x += 0.3 * torch.randn(2 * cols, len(mix), generator=gen, device=device) @ mix
    return torch.randn(rows, cols, generator=gen, device=device), x.T @ x


def copies(nbytes: int, device: str) -> int:
    """How many input sets of `nbytes` to rotate so that a GPU's L2 never holds the next one. One
    on a CPU, whose last level is larger than what a calibration batch keeps out of it."""
    if device != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(16, -(-3 * l2 // max(nbytes, 1))))


@cache
def gemm_rate(device: str, dtype: torch.dtype, smoke: bool = False, widened: bool = True) -> float:
    """Flops per second of the best of PyTorch's large square matrix products. A CPU's kernels
    multiply the 16-bit types' values in fp32, so its rate for them is fp32's unless not `widened`:
    for products that are the library's own."""
    if widened and device == "cpu" and dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32
    n = 256 if smoke else (8192 if device == "cuda" else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times = time_interleaved({"mm": lambda i: torch.mm(a, b, out=out)}, device, 5, 0.0)["mm"]
    return 2.0 * n**3 / min(times)


@cache
def copy_bandwidth(device: str, smoke: bool = False) -> float:
    """Bytes per second, read plus written, of a copy far larger than any cache."""
    nbytes = 1 << (20 if smoke else 30)
    # Random: constant data can move faster than what is timed against it.
    src = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    times = time_interleaved({"copy": lambda i: dst.copy_(src)}, device, 5, 0.0)["copy"]
    return 2.0 * nbytes / min(times)


def environment(device: str) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "torch": torch.__version__,
        "commit": _commit(),
        "others_share": others_share(),
    }


def _busy_and_own() -> tuple[float, float]:
    """CPU seconds spent so far: by the whole machine (time stolen by its host included), and by
    this process with its finished children."""
    ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = ticks[3] + ticks[4]
    own = os.times()
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK"), sum(own[:4])


def cpu_seconds_of_children() -> float:
    """What finished child processes and theirs took so far, of all cores together. Of a run on one
    thread it hardly depends on what else the machine does, as elapsed time does."""
    return sum(os.times()[2:4])


_STARTED = (time.perf_counter(), *_busy_and_own()) if Path("/proc/stat").exists() else None


def others_share() -> float | None:
    """The share of this machine's CPU time that others took since this module was imported, 0 to 1:
    what a row's times are worth. None where /proc/stat is missing."""
    if _STARTED is None:
        return None
    busy, own = _busy_and_own()
    seconds = max(time.perf_counter() - _STARTED[0], 1e-3)
    others = (busy - _STARTED[1]) - (own - _STARTED[2])
    return round(max(others, 0.0) / (seconds * (os.cpu_count() or 1)), 3)


def device_name(device: str) -> str:
    """What its maker calls it; of a processor whose widest vectors are AVX2's also that."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    values = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    name = values.get("model name") or platform.processor() or platform.machine()
    # Hosts of virtual machines leave the generation out of the name.
    flags = values.get("flags", "").split()
    return f"{name}, AVX2" if "avx2" in flags and "avx512f" not in flags else name


@cache
def _commit() -> str:
    """Short hash of the checkout, `+` appended when it has changes; outside a checkout what
    PYPRUNE_COMMIT says, or nothing."""
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PYPRUNE_COMMIT", "")


def our_backends(op: str, device: str, dtype: torch.dtype) -> list[str]:
    """The backends of `op` worth timing here: all but the Triton interpreter."""
    from pyprune.ops import registry

    names = registry.backends(op, device, dtype)
    return [b for b in names if not (b == "triton" and device == "cpu")]


@contextmanager
def forced_backend(backend: str) -> Iterator[None]:
    """PYPRUNE_BACKEND=`backend` for the length of the block."""
    before = os.environ.get("PYPRUNE_BACKEND")
    os.environ["PYPRUNE_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYPRUNE_BACKEND"]
        else:
            os.environ["PYPRUNE_BACKEND"] = before
