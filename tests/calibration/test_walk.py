import pytest
import torch
from calibration.walks import (
    Batch,
    assert_same,
    batches,
    run_walk,
    scale_input,
    state,
    wanda_half,
)
from tiny_models import FAMILIES, MOE_FAMILIES, tiny_model, tiny_tokens

from pyprune.calibration.stats import NormStatistic
from pyprune.calibration.walk import InMemoryStore, walk
from pyprune.errors import LayerError
from pyprune.models.adapter import Adapter


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

        def update(self, x):
            self.updates += 1
            super().update(x)

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
