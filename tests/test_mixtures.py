"""Mixtures of every kind, from the checkpoint that is pruned to the compressed one that is run."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from sparse_checkpoints import bits_equal, tensors_of
from tiny_models import MIXTURES, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

import pyprune
from pyprune import cli
from pyprune.checkpoint import Checkpoint
from pyprune.config import PruneConfig
from pyprune.depth.graph import ResidualGraph
from pyprune.depth.save import drop_layers
from pyprune.errors import UserError
from pyprune.inspection import inspect_checkpoint
from pyprune.models.adapter import Adapter
from pyprune.prune import prune_checkpoint
from pyprune.sparse.choice import Candidates
from pyprune.sparse.convert import compress_checkpoint, decompress_checkpoint
from pyprune.sparse.experts import SparseExperts
from pyprune.sparse.format import stacks_of
from pyprune.sparse.layout import LayerFormat
from pyprune.sparse.linear import SparseLinear
from pyprune.sparse.stored import StoredCheckpoint
from pyprune.width.structure import Widths

SPARSE = {"deepseek_v2": 1, "deepseek_v32": 1, "nemotron_h": 1}  # of two layers
STACKED = ("granitemoe", "gpt_oss", "llama4_text")


def saved(folder, family):
    tiny_model(family).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Called with a folder and a family: pruned 2:4 by wanda, in a copy of its own; and the report.
    `in` is what was pruned."""
    reports, root = {}, tmp_path_factory.mktemp("mixtures")

    def prune_once(folder, family):
        if family not in reports:
            source, out = root / family / "in", root / family / "out"
            saved(source, family)
            config = PruneConfig(method="wanda", pattern="2:4")
            batches = [tiny_tokens(8, 32, seed) for seed in range(2)]
            reports[family] = prune_checkpoint(source, out, config, batches=batches)
        shutil.copytree(root / family, folder, dirs_exist_ok=True)
        return folder / "out", reports[family]

    return prune_once


def expert_tensors(tensors):
    stacked = {n: list(w) for n, w in tensors.items() if w.dim() == 3 and "conv" not in n}
    single = {n: [w] for n, w in tensors.items() if ".experts." in n and w.dim() == 2}
    matrices = {**stacked, **single}
    return {n: ws for n, ws in matrices.items() if not n.endswith("bias")}


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_is_pruned_and_routers_are_not(family, pruned, tmp_path):
    out, report = pruned(tmp_path, family)
    before, after = tensors_of(tmp_path / "in"), tensors_of(out)
    experts = expert_tensors(after)
    projections = 2 if family in STACKED or family == "nemotron_h" else 3
    matrices = [w for ws in experts.values() for w in ws]
    assert len(matrices) == SPARSE.get(family, 2) * 4 * projections
    for name, ws in experts.items():
        for w in ws:
            w = w.T if family in ("gpt_oss", "llama4_text") else w
            kept = (w != 0).reshape(-1, 4).sum(1)
            assert int(kept.max()) == 2 and float((w == 0).float().mean()) >= 0.5, name
    shared = [
        n for n in after if "shared_expert" in n and after[n].dim() == 2 and "gate.w" not in n
    ]
    assert all(float((after[n] == 0).float().mean()) >= 0.5 for n in shared)
    (note,) = [note for note in report.notes if note.startswith("not pruned, ")]
    for name, w in after.items():
        if "router" in name or name.endswith(("mlp.gate.weight", "mixer.gate.weight")):
            assert bits_equal(w, before[name])
            assert name.rsplit(".", 2)[1].removesuffix("_proj") in note or "router" in note
    assert not any(note.startswith("loaded whole") for note in report.notes)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("family", MIXTURES)
def test_compressed_it_computes_the_same_and_comes_back(family, int8, pruned, tmp_path):
    dense, _ = pruned(tmp_path, family)
    report = compress_checkpoint(dense, tmp_path / "small", int8=int8)
    experts = [name for name in report.formats if "experts." in name or "_linear.weight." in name]
    experts = [name for name in experts if "shared" not in name]
    projections = 2 if family in STACKED or family == "nemotron_h" else 3
    assert len(experts) == SPARSE.get(family, 2) * 4 * projections
    assert {report.formats[name] for name in experts} == {"sparse24"} and not report.notes
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == (6 if family in STACKED else 2 if int8 else 1)
    decompress_checkpoint(tmp_path / "small", tmp_path / "back")
    one, other = tensors_of(dense), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys()
    assert int8 or all(bits_equal(one[name], other[name]) for name in one)
    model = pyprune.load(tmp_path / "small", dtype=torch.float32)
    mixtures = [m for m in model.modules() if isinstance(m, SparseExperts)]
    assert len(mixtures) == SPARSE.get(family, 2)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    calls = []
    for mixture in mixtures:
        mixture.register_forward_hook(lambda *call: calls.append(call))
    names = {id(module): name for name, module in model.named_modules()}
    with torch.no_grad():
        got, want = model(tiny_tokens()).logits, twin(tiny_tokens()).logits
        for mixture, given, output in calls:
            expected = twin.get_submodule(names[id(mixture)])(*given)
            within = 0.01 if int8 else 1e-5  # what comes back is rounded to bf16
            assert float((output - expected).norm()) <= within * float(expected.norm())
    assert len(calls) == len(mixtures)
    if int8:
        # What comes back is rounded to bf16, and a router or an indexer between two choices may
        # make the other one. The int8 numbers times their scales are what these kernels compute.
        exact = copy.deepcopy(model)
        for name, module in list(exact.named_modules()):
            if isinstance(module, SparseLinear):
                exact.set_submodule(name, module.to_dense())
        with torch.no_grad():
            want = exact(tiny_tokens()).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if not int8:
        model.save_pretrained(tmp_path / "again")
        again = pyprune.load(tmp_path / "again", dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(again(tiny_tokens()).logits, got)


@pytest.mark.parametrize("family", ["gpt_oss", "llama4_text"])
def test_stacked_experts_are_inspected_and_compressed_again(family, pruned, tmp_path):
    dense, _ = pruned(tmp_path, family)
    compress_checkpoint(dense, tmp_path / "small")
    opened = StoredCheckpoint.open(tmp_path / "small")
    assert len(opened.stacks) == 4
    original = Checkpoint.open(dense)
    for tensor in opened.stacks:
        assert opened.entries[tensor].shape == original.tensors[tensor].shape
        assert bits_equal(opened.read(tensor), tensors_of(dense)[tensor])
    found, want = inspect_checkpoint(opened), inspect_checkpoint(original)
    assert [layer.name for layer in found.layers] == [layer.name for layer in want.layers]
    assert [layer.zeros for layer in found.layers] == [layer.zeros for layer in want.layers]
    assert {layer.format for layer in found.layers} == {"sparse24"} and not found.others
    assert found.nbytes < 0.8 * want.nbytes == 0.8 * found.nbytes_dense
    compress_checkpoint(tmp_path / "small", tmp_path / "bitmap", allowed=("bitmap",))
    decompress_checkpoint(tmp_path / "bitmap", tmp_path / "back")
    one, other = tensors_of(dense), tensors_of(tmp_path / "back")
    assert one.keys() == other.keys() and all(bits_equal(one[name], other[name]) for name in one)


def test_a_stack_with_a_dense_expert_stays_one_tensor(pruned, tmp_path):
    dense, _ = pruned(tmp_path, "gpt_oss")
    file = dense / "model.safetensors"
    state = load_file(file)
    tensor = "model.layers.1.mlp.experts.down_proj"
    state[tensor][2] += 1
    save_file(state, file, {"format": "pt"})
    compress_checkpoint(dense, tmp_path / "small")
    opened = StoredCheckpoint.open(tmp_path / "small")
    assert sorted(opened.stacks) == [
        f"model.layers.0.mlp.experts.{p}" for p in ("down_proj", "gate_up_proj")
    ]
    assert tensor in opened.stored
    model = pyprune.load(tmp_path / "small", dtype=torch.float32)
    kinds = [isinstance(model.model.layers[i].mlp.experts, SparseExperts) for i in (0, 1)]
    assert kinds == [True, False]
    twin = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        want = twin(tiny_tokens()).logits
        torch.testing.assert_close(model(tiny_tokens()).logits, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def small(pruned, tmp_path):
    dense, _ = pruned(tmp_path, "gpt_oss")
    compress_checkpoint(dense, tmp_path / "small")
    return tmp_path / "small"


def edit(folder, change):
    file = folder / "config.json"
    raw = json.loads(file.read_text())
    change(raw, raw["quantization_config"]["layers"])
    file.write_text(json.dumps(raw))


LAYER = "model.layers.0.mlp.experts.down_proj"


def lose(raw, layers):
    del layers[f"{LAYER}.1"]


def older(raw, layers):
    raw["quantization_config"]["format_version"] = 5


def coded(raw, layers):
    layers[f"{LAYER}.1"] = {"format": "coded", "shape": [32, 16], "stacked": True}


def no_flag(raw, layers):
    layers[f"{LAYER}.1"]["stacked"] = "yes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose, r"expected layers model.layers.0.mlp.experts.down_proj.0 to .*2, which are stacked"),
        (older, r"needs format_version 6, got 5"),
        (coded, r"down_proj.1: coded: expected none that is stacked"),
        (no_flag, r"stacked: expected true or false, got 'yes'"),
    ],
)
def test_bad_stacks(change, message, small, tmp_path):
    edit(small, change)
    with pytest.raises(UserError, match=message):
        decompress_checkpoint(small, tmp_path / "back")
    with pytest.raises(UserError, match=message):
        pyprune.load(small)


def test_a_stack_of_other_experts(small, tmp_path):
    edit(small, lambda raw, layers: raw.update(num_local_experts=5))
    with pytest.raises(UserError, match="the model lacks gate_up_proj, down_proj of 5 experts"):
        pyprune.load(small)


def test_stacks_are_of_one_shape():
    layers = {f"X.{e}": LayerFormat("bitmap", (4, 8 + 8 * e), stacked=True) for e in range(2)}
    with pytest.raises(
        UserError, match=r"^here: layers X.\*: expected one shape, they are stacked"
    ):
        stacks_of(layers, "here")
    layers["X.1"] = LayerFormat("bitmap", (4, 8), stacked=True)
    assert stacks_of(layers, "here") == {"X": ["X.0", "X.1"]}


@pytest.mark.parametrize("family", MIXTURES)
def test_depth_and_width_know_the_layers(family):
    model = tiny_model(family)
    if family == "nemotron_h":
        with pytest.raises(UserError, match=r"unknown residual structure .*children mixer, norm"):
            ResidualGraph.of(model)
        return
    graph = ResidualGraph.of(model)
    assert graph.layouts[1].mlp[0] in ("mlp", "block_sparse_moe", "feed_forward")
    widths = Widths.of(model)
    experts = [group for group in widths.groups if group.writer.index is not None]
    assert len(experts) == SPARSE.get(family, 2) * 4
    # Channels that are cut off, with all that they own, change nothing more than their writers.
    group = experts[0]
    kept = {group.name: torch.arange(0, group.units, 2)}
    with torch.no_grad():
        group.slices[-1].zero(torch.arange(1, group.units, 2))
        want = model(tiny_tokens()).logits
        widths.mask(kept)
        got = model(tiny_tokens()).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["jamba", "lfm2_moe"])
def test_hybrids_are_pruned_and_lose_layers(family, pruned, tmp_path):
    model = tiny_model(family)
    attentions = [layout.attention for layout in ResidualGraph.of(model).layouts]
    assert attentions == ["mamba" if family == "jamba" else "conv", "self_attn"]
    pruned(tmp_path, family)
    if family == "jamba":  # every second layer, from the second on, is one of attention
        with pytest.raises(UserError, match="JambaForCausalLM: its configuration cannot express"):
            drop_layers(model, [1])
        return
    drop_layers(model, [1])
    assert model.config.layer_types == ["full_attention"] and len(model.model.layers) == 1


def test_renamed_tensors_and_parts_are_streamed(tmp_path):
    source = saved(tmp_path / "in", "phimoe")
    names = Checkpoint.open(source).names
    assert not names.problem and not names.unused
    (router,) = names.pieces["model.layers.0.mlp.router.weight"]
    assert router.tensor == "model.layers.0.block_sparse_moe.gate.weight" and router.whole
    pieces = names.pieces["model.layers.0.mlp.experts.gate_up_proj"]
    assert sorted((p.expert, p.part, p.parts) for p in pieces) == [
        (e, half, 2) for e in range(4) for half in (0, 1)
    ]
    adapter = Adapter.of(AutoModelForCausalLM.from_pretrained(source))
    tensors = tensors_of(source)
    (ref,) = [ref for ref in adapter.linears(0) if ref.name.endswith("gate_up_proj.3")]
    for half, name in enumerate(("w1", "w3")):
        tensor = tensors[f"model.layers.0.block_sparse_moe.experts.3.{name}.weight"]
        rows = ref.weight()[half * 32 : (half + 1) * 32]
        assert torch.equal(rows, tensor.to(rows.dtype))


def test_rows_of_experts_without_a_weight_stay_and_do_not_count(pruned, tmp_path, capsys):
    """LongCat's first projection has rows for the experts that give back what they get."""
    out, report = pruned(tmp_path, "longcat_flash")
    before, after = tensors_of(tmp_path / "in"), tensors_of(out)
    zero = {n for n in before if ".experts.4." in n or ".experts.5." in n}
    assert len(zero) == 4 and all(bool(before[n].any()) for n in zero)
    changed = {n for n in before if not bits_equal(before[n], after[n])}
    matrices = {n for n, w in before.items() if "_proj" in n and w.dim() == 2} - zero
    assert changed == matrices
    experts = [layer.name for layer in report.layers if "experts" in layer.name]
    assert len(experts) == 4 * 2 and all(name[-1] in "0123" for name in experts)
    assert report.sparsity == 0.5
    found = inspect_checkpoint(Checkpoint.open(out))
    assert {layer.name for layer in found.layers} == matrices and found.sparsity == 0.5
    assert sum(layer.elements for layer in found.layers) == sum(
        layer.elements for layer in report.layers
    )
    # The experts stay dense, and that is said; the rest is compressed.
    compressed = compress_checkpoint(out, tmp_path / "small")
    (note,) = compressed.notes
    assert note == (
        "Experts stay dense in model.layers.0.mlp.experts: not all have every matrix (gate_up_proj "
        "of 6, down_proj of 4)"
    )
    assert cli.main(["compress", str(out), "--out", str(tmp_path / "again")]) == 0
    assert note in " ".join(capsys.readouterr().out.split())
    assert compressed.formats and not any("experts" in name for name in compressed.formats)
    model = pyprune.load(tmp_path / "small", dtype=torch.float32)
    twin = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        want = twin(tiny_tokens()).logits
        torch.testing.assert_close(model(tiny_tokens()).logits, want, rtol=1e-4, atol=1e-4)


def test_a_note_names_one_module_of_many():
    refused = {f"layers.{i}.experts": "no" if i else "other" for i in range(3)}
    assert Candidates({}, (), (), refused).notes() == (
        "Experts stay dense in layers.0.experts: other",
        "Experts stay dense in layers.1.experts and 1 more: no",
    )


@pytest.mark.parametrize("method", ["magnitude", "obd", "llm-surgeon"])
def test_rows_of_experts_without_a_weight_have_no_gradient_and_no_score(method):
    model = tiny_model("longcat_flash")
    experts = model.model.layers[0].mlp.experts
    before = experts.gate_up_proj.detach().clone()
    model.model.layers[0].mlp.experts.gate_up_proj.data[4:] *= 1e-6  # the first to go by score
    report = pyprune.prune(model, [tiny_tokens(8, 32)], method, 0.5)
    assert torch.equal(experts.gate_up_proj[4:], before[4:] * 1e-6)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert float((experts.gate_up_proj[:4] == 0).float().mean()) > 0.2
