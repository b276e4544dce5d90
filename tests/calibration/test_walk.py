from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from greenlet import greenlet
from tiny_models import FAMILIES, MOE_FAMILIES, tiny_model, tiny_tokens
from torch import nn

from pyprune.calibration.stats import NormStatistic
from pyprune.calibration.walk import InMemoryStore, walk
from pyprune.errors import LayerError, UserError
from pyprune.models.adapter import Adapter


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None = None


def batches(padded=False):
    """Three batches of different shapes; padded on the left, on the right, and not at all."""
    made = []
    for j, (rows, length) in enumerate([(2, 16), (3, 11), (1, 16)]):
        ids, mask = tiny_tokens(rows, length, seed=j), torch.ones(rows, length, dtype=torch.long)
        if padded and j < 2:
            pad = slice(0, 4) if j == 0 else slice(8, None)
            mask[0, pad] = 0
            ids[0, pad] = 0
        made.append(Batch(ids, mask if padded else None))
    return made


def wanda_half(group):
    """Removes half of every row by |w| * ||x||; an expert that saw nothing by |w|."""
    norms = group.statistic.column_norms().sqrt() if group.statistic.tokens else 1.0
    for ref in group.linears:
        w = ref.weight().float()
        order = (w.abs() * norms).argsort(dim=1, stable=True)
        ref.write(w.scatter(1, order[:, : w.shape[1] // 2], 0.0))


def run_walk(model, given, prune_group=wanda_half, statistic=NormStatistic, **kwargs):
    adapter = Adapter.of(model)
    kwargs.setdefault("store", InMemoryStore(adapter, "cpu"))
    return walk(adapter, given, statistic=statistic, prune_group=prune_group, **kwargs)


def state(model):
    return {key: t.clone() for key, t in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def hook_count(model):
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    return hooks + sum("forward" in m.__dict__ for m in model.modules())


@contextmanager
def untouched(model, given):
    """The body must leave no hook behind and the model able to run."""
    training = [m.training for m in model.modules()]
    before = hook_count(model)
    yield
    assert hook_count(model) == before
    assert [m.training for m in model.modules()] == training
    with torch.no_grad():
        assert model(given[0].input_ids).logits.isfinite().all()


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_single_forward_equals_the_naive_walk_bit_for_bit(family, padded):
    dense = state(tiny_model(family))
    results = {}
    for mode in ("single", "naive"):
        model = tiny_model(family)
        model.config.use_cache = True
        report = run_walk(model, batches(padded), mode=mode)
        results[mode] = state(model), report.passes
    assert_same(results["single"][0], results["naive"][0])
    assert results["single"][1] < 1.4 and results["naive"][1] >= 3
    pruned = {ref.parameter_name for i in range(2) for ref in Adapter.of(model).linears(i)}
    for key, t in results["single"][0].items():
        if key in pruned:
            assert (t == 0).float().mean() == 0.5
        else:
            assert torch.equal(t, dense[key])


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_bit_for_bit_in_bfloat16(family):
    models = [tiny_model(family).bfloat16() for _ in range(2)]
    for model, mode in zip(models, ("single", "naive"), strict=True):
        run_walk(model, batches(), mode=mode)
    assert_same(state(models[0]), state(models[1]))


class Inputs:
    """Plain hooks: sums of squares of what each nn.Linear or Conv1D reads, real tokens only."""

    def __init__(self, refs):
        self.refs = [ref for ref in refs if ref.index is None]

    def of(self, model, given):
        sums = {}

        def watch(ref, keep):
            def hook(module, args):
                x = args[0].reshape(-1, args[0].shape[-1])[keep]
                sums[ref.name] = sums.get(ref.name, 0) + x.double().square().sum(0)

            return ref.module.register_forward_pre_hook(hook)

        for batch in given:
            mask = batch.attention_mask
            keep = slice(None) if mask is None else mask.reshape(-1).bool()
            hooks = [watch(ref, keep) for ref in self.refs]
            with torch.no_grad():
                model(batch.input_ids, attention_mask=mask, use_cache=False)
            for hook in hooks:
                hook.remove()
        return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_statistics_are_those_of_the_model_as_pruned_so_far(family):
    """When a group is due, a plain forward of the whole model gives the same sums."""
    model, given = tiny_model(family), batches(padded=True)
    model.set_experts_implementation("eager")
    watched = Inputs([ref for i in range(2) for ref in Adapter.of(model).linears(i)])
    checked = []

    def check(group):
        if group.linears[0].index is None:
            sums = watched.of(model, given)
            for ref in group.linears:
                torch.testing.assert_close(
                    group.statistic.sum_squares.double(), sums[ref.name], rtol=1e-4, atol=1e-5
                )
                checked.append(ref.name)
        wanda_half(group)

    run_walk(model, given, check)
    assert sorted(checked) == sorted(ref.name for ref in watched.refs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_two_passes_take_statistics_of_the_dense_block(family):
    model, given = tiny_model(family), batches()
    adapter = Adapter.of(model)
    sums = {}

    def check(group):
        if group.block not in sums:  # nothing of this block is pruned yet
            sums[group.block] = Inputs(adapter.linears(group.block)).of(model, given)
        for ref in group.linears:
            torch.testing.assert_close(
                group.statistic.sum_squares.double(), sums[group.block][ref.name], rtol=1e-4,
                atol=1e-5,
            )  # fmt: skip
        wanda_half(group)

    report = run_walk(model, given, check, mode="two-pass")
    # Two blocks: both once dense, the first once more; and one batch of one block tried out.
    assert report.passes == pytest.approx((2 * 2 * 3 - 3 + 1) / 6)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_expert_statistics_come_from_routed_tokens(family):
    model, given = tiny_model(family), batches(padded=True)
    model.set_experts_implementation("eager")
    groups = {}
    run_walk(model, given, lambda group: groups.update({group.linears[0].name: group}))
    experts = Adapter.of(model).experts(1)[0]
    name = next(n for n, m in model.named_modules() if m is experts)
    inputs = []
    hook = experts.register_forward_pre_hook(lambda _, args: inputs.append(args))
    with torch.no_grad():
        for batch in given:
            model(batch.input_ids, attention_mask=batch.attention_mask)
    hook.remove()
    for e in range(4):
        gate_up, down = (groups[f"{name}.{p}.{e}"].statistic for p in ("gate_up_proj", "down_proj"))
        want, hidden = torch.zeros(32), torch.zeros(down.sum_squares.shape)
        for (x, index, _), batch in zip(inputs, given, strict=True):
            routed = x[(index == e).any(1) & batch.attention_mask.reshape(-1).bool()]
            want += routed.square().sum(0)
            gate, up = (routed @ experts.gate_up_proj[e].T).detach().chunk(2, -1)
            hidden += (experts.act_fn(gate) * up).square().sum(0)
        torch.testing.assert_close(gate_up.sum_squares, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(down.sum_squares, hidden, rtol=1e-4, atol=1e-5)
    tokens = sum(groups[f"{name}.gate_up_proj.{e}"].statistic.tokens for e in range(4))
    assert tokens == 2 * sum(int(b.attention_mask.sum()) for b in given)


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
def test_some_matrices_only(mode):
    model = tiny_model("mixtral")
    adapter = Adapter.of(model)
    chosen = [f"model.layers.1.mlp.experts.down_proj.{e}" for e in (1, 3)]
    chosen.append("model.layers.1.self_attn.k_proj")
    found = []
    for only in (adapter, adapter.restricted(chosen)):
        groups = {}

        def note(group, groups=groups):
            groups.update({ref.name: group.statistic for ref in group.linears})

        walk(
            only, batches(padded=True), statistic=NormStatistic, prune_group=note, mode=mode,
            store=InMemoryStore(adapter, "cpu"),
        )  # fmt: skip
        found.append(groups)
    assert sorted(found[1]) == sorted(chosen)
    for name, statistic in found[1].items():
        assert statistic.tokens == found[0][name].tokens > 0
        # Not bit for bit: experts of which none is chosen run as transformers runs them (grouped
        # products), the others one by one.
        torch.testing.assert_close(
            statistic.sum_squares, found[0][name].sum_squares, rtol=1e-5, atol=0
        )


def test_padding_needs_experts_that_see_every_token():
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda m, args: tuple(a.repeat(2, 1) for a in args))
    experts.register_forward_hook(lambda m, args, out: out[: len(out) // 2])
    run_walk(model, batches())
    with pytest.raises(LayerError, match=r"experts.gate_up_proj: expected one row for each"):
        run_walk(model, batches(padded=True))


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
def test_an_expert_without_tokens_gets_an_empty_statistic(mode):
    model = tiny_model("mixtral")
    tokens = {}

    def prune(group):
        tokens[group.linears[0].name] = group.statistic.tokens
        wanda_half(group)

    run_walk(model, [Batch(torch.tensor([[5, 5]]))], prune, mode=mode)
    counts = [tokens[f"model.layers.0.mlp.experts.down_proj.{e}"] for e in range(4)]
    assert sum(counts) == 4 and counts.count(0) == 2


STAGES = {
    "llama": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]],
    "phi": [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
    "gpt2": [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    "falcon": [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
@pytest.mark.parametrize("family", STAGES)
def test_matrices_that_read_one_tensor_share_one_statistic(family, mode):
    made, groups = [], []

    class Counting(NormStatistic):
        updates = 0

        def update(self, x, weight=None):
            self.updates += 1
            super().update(x, weight)

    def factory(columns, device):
        made.append(Counting(columns, device))
        return made[-1]

    run_walk(tiny_model(family), batches(), groups.append, factory, mode=mode)
    names = [[ref.name.split(".")[-1] for ref in group.linears] for group in groups]
    assert names == STAGES[family] * 2
    assert [group.block for group in groups] == [0] * len(STAGES[family]) + [1] * len(
        STAGES[family]
    )
    assert len(made) == len(groups)
    assert all(group.statistic is s for group, s in zip(groups, made, strict=True))
    assert all(s.updates == 3 for s in made)


def scale_input(module, args, output):
    args[0].mul_(1.25)


def test_a_write_to_the_tensor_between_two_readers_separates_them():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    # After q has read it and before k does, the shared input is changed in place.
    attention.q_proj.register_forward_hook(scale_input)
    groups = []
    run_walk(model, batches(), groups.append)
    names = [[ref.name.split(".")[-1] for ref in g.linears] for g in groups if g.block == 0]
    assert names[:2] == [["q_proj"], ["k_proj", "v_proj"]]


def test_padding_counts_for_nothing():
    ids = tiny_tokens(2, 12)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    statistics = []
    for given in (Batch(ids), Batch(padded, mask)):
        groups = []
        run_walk(tiny_model("gemma2"), [given], groups.append)
        statistics.append([group.statistic for group in groups])
    for plain, with_padding in zip(*statistics, strict=True):
        assert plain.tokens == with_padding.tokens == 24
        torch.testing.assert_close(
            plain.sum_squares, with_padding.sum_squares, rtol=1e-4, atol=1e-6
        )


def test_garbage_in_padding_is_harmless():
    model = tiny_model("llama")
    ids, mask = tiny_tokens(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    ids[0, :2] = 0
    model.model.embed_tokens.weight.data[0] = float("nan")
    norm = model.model.layers[0].input_layernorm
    # Only the statistic of the first stage: attention would spread the NaN.
    groups = []

    def first_only(group):
        groups.append(group)
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run_walk(model, [Batch(ids, mask)], first_only)
    want = norm(model.model.embed_tokens(ids[:, 2:])).square().sum((0, 1))
    torch.testing.assert_close(groups[0].statistic.sum_squares, want.detach())


def test_padding_needs_one_row_a_token():
    model = tiny_model("llama")
    down = model.model.layers[0].mlp.down_proj
    repeat = down.register_forward_pre_hook(lambda m, args: (args[0].repeat(1, 2, 1),))
    undo = down.register_forward_hook(lambda m, args, out: out[:, : out.shape[1] // 2])
    run_walk(model, batches())  # no padding: the rows are whatever the layer sees
    with pytest.raises(LayerError, match=r"layers.0.mlp.down_proj: expected one row for each"):
        run_walk(model, batches(padded=True))
    repeat.remove()
    undo.remove()
    run_walk(model, batches(padded=True))


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinite_inputs_name_the_layer(mode, bad):
    model, seen = tiny_model("llama"), []
    model.model.layers[1].post_attention_layernorm.weight.data[3] = bad
    with pytest.raises(LayerError, match=r"^model.layers.1.mlp.gate_proj: .*NaN or infinite"):
        run_walk(model, batches(), lambda g: seen.append(g.linears[0].name), mode=mode)
    assert "model.layers.1.mlp.gate_proj" not in seen and "model.layers.0.mlp.gate_proj" in seen


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_a_failure_leaves_no_trace(family, mode, error):
    model, given = tiny_model(family), batches()
    model.train()
    model.model.layers[0].eval() if family == "llama" else None
    want = state(model)
    seen = []

    def fail(group):
        seen.append(group)
        if len(seen) == 3:
            raise error("from prune_group")

    with untouched(model, given), pytest.raises(error, match="from prune_group"):
        run_walk(model, given, fail, mode=mode, spill="disk")
    assert_same(state(model), want)


def test_a_failure_inside_the_forward_leaves_no_trace():
    model, given = tiny_model("llama"), batches()

    def fail(module, args):
        raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.act_fn.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run_walk(model, given)
    hook.remove()
    assert hook_count(model) == 0
    assert torch.is_grad_enabled()


def test_waiting_forwards_are_abandoned(monkeypatch):
    import pyprune.calibration.coroutine as coroutine

    made = []

    def counted(run):
        made.append(greenlet(run))
        return made[-1]

    monkeypatch.setattr(coroutine, "greenlet", counted)
    run_walk(tiny_model("llama"), batches())
    assert len(made) == 3 and all(g.dead for g in made)


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


def test_progress():
    events = []
    run_walk(tiny_model("llama"), batches(), progress=events.append)
    blocks = [e for e in events if e.kind == "block"]
    assert [(e.name, e.done, e.total) for e in blocks] == [
        ("model.layers.0", 1, 2), ("model.layers.1", 2, 2),
    ]  # fmt: skip
    linears = [e for e in events if e.kind == "linear" and e.block == 1]
    assert [e.done for e in linears] == list(range(1, 8)) and {e.total for e in linears} == {7}
    at_down = [e for e in events if e.kind == "batch" and e.name == "model.layers.1.mlp.down_proj"]
    assert [(e.done, e.total, e.blocks) for e in at_down] == [(1, 3, 2), (2, 3, 2), (3, 3, 2)]


def test_report():
    report = run_walk(tiny_model("llama"), batches(padded=True))
    assert report.tokens == 2 * 16 + 3 * 11 + 16 - 4 - 3
    assert report.passes == pytest.approx(1 + 1 / 6)
    assert set(report.seconds) == {"forward", "statistics", "prune", "load", "flush"}
    assert report.seconds["forward"] > 0 and report.seconds["statistics"] > 0
    # The widest input, down_proj's 64 columns in fp32, of all batches at once.
    assert report.held_bytes == (2 * 16 + 3 * 11 + 16) * 64 * 4
    assert report.spilled_bytes == 0


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


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mode": "double"}, "mode: expected one of single, two-pass, naive, got 'double'"),
        ({"spill": "tape"}, "spill: expected one of none, host, disk, got 'tape'"),
        ({"spill": "host"}, "spill: host needs a GPU"),
        ({"given": []}, "expected at least one token"),
        ({"given": [Batch(torch.tensor([1, 2]))]}, r"batch 0: expected token ids \[B, T\]"),
        (
            {"given": [Batch(torch.ones(2, 3).long(), torch.ones(2, 2))]},
            r"batch 0: expected an attention mask of shape \(2, 3\), got \(2, 2\)",
        ),
        (
            {"given": [Batch(torch.ones(1, 3).long(), torch.zeros(1, 3))]},
            "expected at least one token",
        ),
    ],
)
def test_bad_arguments(kwargs, message):
    model = tiny_model("llama")
    with pytest.raises(UserError, match=message):
        run_walk(model, kwargs.pop("given", batches()), **kwargs)
    assert hook_count(model) == 0


class Detour(nn.Module):
    """An MLP that leaves out a matrix for short sequences, or runs one twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(32, 32), nn.Linear(32, 32), nn.LayerNorm(32)
        self.skip = True
        self.stop = self.twice = False

    def forward(self, x):
        short = x.shape[1] < 12
        if self.stop or not (short and self.skip):
            x = self.first(x)
        if self.stop and short:
            return x
        if self.twice:
            x = self.first(x)
        return self.second(self.norm(x))


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
def test_forwards_must_not_depend_on_the_data(mode):
    model = tiny_model("llama")
    model.model.layers[0].mlp = Detour()
    with pytest.raises(UserError, match=r"batch 1 reached .*second where .*first was expected"):
        run_walk(model, batches(), mode=mode)
    model.model.layers[0].mlp.stop = True
    with pytest.raises(UserError, match=r"batch 1 reached .* where .*second was expected"):
        run_walk(model, batches(), mode=mode)
    model.model.layers[0].mlp.stop = False
    model.model.layers[0].mlp.skip = False
    run_walk(model, batches(), mode=mode)
    model.model.layers[0].mlp.twice = True
    with pytest.raises(LayerError, match=r"mlp.first: runs more than once"):
        run_walk(model, batches(), mode=mode)
    model.model.layers[0].mlp.twice = False
    model.model.layers[0].mlp.unused = nn.Linear(32, 32)
    with pytest.raises(LayerError, match=r"mlp.unused: is not called"):
        run_walk(model, batches(), mode=mode)
    assert hook_count(model) == 0


@pytest.mark.parametrize("mode", ["single", "naive", "two-pass"])
def test_a_tensor_shared_in_one_batch_only_is_an_error(mode):
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(
        lambda m, args: (args[0].clone(),) if args[0].shape[1] == 11 else None
    )
    with pytest.raises(LayerError, match=r"k_proj: reads another tensor than .*q_proj"):
        run_walk(model, batches(), mode=mode)


def test_a_decoder_that_skips_a_block_is_an_error():
    model = tiny_model("llama")
    decoder = model.model
    adapter = Adapter.of(model)
    run = type(decoder).forward
    decoder.forward = lambda **kwargs: (
        kwargs["input_ids"] if kwargs["input_ids"].shape[1] == 11 else run(decoder, **kwargs)
    )
    with pytest.raises(UserError, match=r"batch 1 reached the end .* model.layers.0 was expected"):
        walk(
            adapter, batches(), statistic=NormStatistic, prune_group=wanda_half,
            store=InMemoryStore(adapter, "cpu"),
        )  # fmt: skip


def test_inside_inference_mode_and_with_gradients_on():
    want = tiny_model("llama")
    run_walk(want, batches())
    model = tiny_model("llama")
    with torch.inference_mode():
        run_walk(model, batches())
    assert_same(state(model), state(want))
    assert torch.is_grad_enabled() and all(p.grad_fn is None for p in model.parameters())


def test_a_block_that_writes_to_its_input():
    results = []
    for mode in ("single", "naive"):
        model = tiny_model("llama")
        model.model.layers[1].input_layernorm.register_forward_hook(scale_input)
        run_walk(model, batches(), mode=mode)
        results.append(state(model))
    assert_same(*results)


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
