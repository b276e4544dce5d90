"""Where a walk keeps blocks and inputs that wait: stores, spilling, a GPU."""

import pytest
import torch
from calibration.walks import (
    assert_same,
    batches,
    run_walk,
    state,
    wanda_half,
)
from limited_files import limited_files
from tiny_models import FAMILIES, tiny_model
from torch import nn

from pyprune.calibration.stats import NormStatistic
from pyprune.calibration.walk import InMemoryStore, walk
from pyprune.errors import UserError
from pyprune.models.adapter import Adapter


class OneBlockStore:
    """Blocks that are not loaded hold NaN: anything that runs them is noticed."""

    def __init__(self, adapter):
        self.adapter, self.saved, self.log = adapter, {}, []
        for i in range(len(adapter.blocks)):
            self._hide(i)

    def _hide(self, i):
        self.saved[i] = [p.detach().clone() for p in self.adapter.blocks[i].parameters()]
        for p in self.adapter.blocks[i].parameters():
            p.data.fill_(float("nan"))

    def load_rest(self):
        self.log.append("rest")

    def load(self, i):
        self.log.append(("load", i))
        for p, saved in zip(self.adapter.blocks[i].parameters(), self.saved[i], strict=True):
            p.data.copy_(saved)

    def flush(self, i):
        self.log.append(("flush", i))
        self._hide(i)


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt", "qwen3_moe"])
def test_one_block_is_resident_at_a_time(family, mode):
    want = tiny_model(family, num_hidden_layers=3, **more_layers(family))
    run_walk(want, batches(), mode=mode)
    model = tiny_model(family, num_hidden_layers=3, **more_layers(family))
    store = OneBlockStore(Adapter.of(model))
    run_walk(model, batches(), mode=mode, store=store)
    assert store.log == ["rest", *((what, i) for i in range(3) for what in ("load", "flush"))]
    for i in range(3):
        store.load(i)
    assert_same(state(model), state(want))


def more_layers(family):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return {"layer_types": kinds} if family.startswith("gemma") else {}


def test_the_store_may_replace_parameters():
    class Replacing(InMemoryStore):
        def load(self, i):
            for module in adapter.blocks[i].modules():
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(p.detach().clone()))

    model = tiny_model("mixtral")
    adapter = Adapter.of(model)
    walk(
        adapter, batches(), statistic=NormStatistic, prune_group=wanda_half,
        store=Replacing(adapter, "cpu"),
    )  # fmt: skip
    want = tiny_model("mixtral")
    run_walk(want, batches())
    assert_same(state(model), state(want))


def test_no_statistic_needs_no_tokens():
    model, groups, log = tiny_model("qwen3_moe"), [], []
    store = OneBlockStore(Adapter.of(model))
    report = run_walk(
        model, [], groups.append, None, store=store, progress=lambda e: log.append(e.kind)
    )
    assert [g.linears[0].name for g in groups] == [
        ref.name for i in range(2) for ref in Adapter.of(model).linears(i)
    ]
    assert all(len(g.linears) == 1 and g.statistic is None for g in groups)
    assert report.passes == 0 and "batch" not in log
    assert "rest" not in store.log


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
@pytest.mark.parametrize("family", ["llama", "falcon", "bloom", "mixtral"])
def test_disk_spill_is_bit_identical(family, mode, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    models, reports = [tiny_model(family) for _ in range(2)], []
    for model, spill in zip(models, ("none", "disk"), strict=True):
        seen = []

        def prune(group, seen=seen):
            wanda_half(group)
            seen.append(len(list(tmp_path.glob("*/*"))))

        reports.append(run_walk(model, batches(), prune, mode=mode, spill=spill))
        assert (max(seen) >= 3) == (spill == "disk")
    assert_same(state(models[0]), state(models[1]))
    assert reports[1].held_bytes == 0 and reports[1].spilled_bytes > reports[0].held_bytes > 0
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    from pyprune.calibration.spill import Spill

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(UserError, match=r"spill: cannot write into \S+/pyprune-spill-\w+: File too"),
        Spill("disk", torch.device("cpu")) as spill,
        limited_files(1000),
    ):
        spill.put("0", [torch.randn(5000)])
    assert list(tmp_path.iterdir()) == []


def test_spilled_tensors_are_freed():
    from pyprune.calibration.spill import Spill

    x = torch.randn(40, 8)
    view, want = x[3:, ::2], x.clone()
    with Spill("disk", torch.device("cpu")) as spill:
        parked = spill.put("0", [x, view, torch.empty(0, 4)])
        assert x.untyped_storage().nbytes() == 0 and spill.spilled_bytes == x.nbytes
        parked.restore()
        assert torch.equal(x, want) and torch.equal(view, want[3:, ::2]) and x._version == 0
        fixed = torch.frombuffer(bytearray(32), dtype=torch.float32)  # cannot be resized: stays
        parked = spill.put("0", [fixed])
        assert parked.held_bytes == 32 and not parked.moved


def test_store_moves_the_rest_and_one_block_and_takes_them_back(monkeypatch):
    """With the move itself replaced by a note; `test_on_a_gpu` moves."""
    moves = []
    monkeypatch.setattr(
        "pyprune.calibration.store._move",
        lambda module, name, t, device: moves.append((names[module], name, str(device))),
    )
    model = tiny_model("llama")
    names = {module: name for name, module in model.named_modules()}
    adapter = Adapter.of(model)

    def moved():
        made = sorted(moves)
        moves.clear()
        return made

    with InMemoryStore(adapter, "meta") as store:
        store.load_rest()
        rest = [("model.embed_tokens", "weight"), ("model.norm", "weight")]
        rotary = [("model.rotary_emb", name) for name, _ in model.model.rotary_emb.named_buffers()]
        assert moved() == sorted((*at, "meta") for at in rest + rotary)
        store.load(1)
        block = {
            (f"model.layers.1.{key}".rsplit(".", 1)[0], key.rsplit(".", 1)[1])
            for key in adapter.blocks[1].state_dict()
        }
        assert moved() == sorted((*at, "meta") for at in block)
        store.flush(1)
        assert moved() == sorted((*at, "cpu") for at in block)
    assert moved() == sorted((*at, "cpu") for at in rest + rotary)
    with InMemoryStore(adapter, "cpu") as store:
        store.load_rest()
        store.load(0)
    assert moved() == []


def test_moving_keeps_the_parameter_object():
    from pyprune.calibration.store import _move

    module = nn.BatchNorm1d(3)
    weight, mean = module.weight, module.running_mean
    _move(module, "weight", weight, torch.device("cpu"))
    _move(module, "running_mean", mean, torch.device("cpu"))
    assert module.weight is weight and "running_mean" in module.state_dict()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spill", ["none", "host", "disk"])
def test_on_a_gpu(family, spill):
    results = []
    for mode, how in (("naive", "none"), ("single", spill)):
        model = tiny_model(family)
        adapter = Adapter.of(model)
        with InMemoryStore(adapter, "cuda") as store:
            report = walk(
                adapter, batches(padded=True), statistic=NormStatistic, prune_group=wanda_half,
                store=store, device="cuda", mode=mode, spill=how,
            )  # fmt: skip
        assert all(t.device.type == "cpu" for t in model.state_dict().values())
        results.append(state(model))
    assert (report.spilled_bytes > 0) == (spill != "none")
    assert_same(*results)


@pytest.mark.gpu
def test_one_block_at_a_time_on_a_gpu():
    model = tiny_model("llama")
    adapter = Adapter.of(model)

    def check(group):
        for i, block in enumerate(adapter.blocks):
            where = "cuda" if i == group.block else "cpu"
            assert {p.device.type for p in block.parameters()} == {where}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), InMemoryStore(adapter, "cuda") as store:
        walk(
            adapter, batches(), statistic=NormStatistic, prune_group=check, store=store,
            device="cuda",
        )  # fmt: skip
    assert all(t.device.type == "cpu" for t in [*model.parameters(), *model.buffers()])
