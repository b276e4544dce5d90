"""What can be done for a model whose layers are about to go, without changing its architecture."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Conv1D

from pyprune.calibration.tokens import Batch
from pyprune.depth.criteria import run_layer
from pyprune.depth.graph import Branch, ResidualGraph
from pyprune.depth.hidden import magnitudes, real_tokens, visit_states
from pyprune.errors import UserError

# Last linear maps of a branch, by name, in every supported family.
WRITERS = ("o_proj", "out_proj", "dense", "c_proj", "dense_4h_to_h", "down_proj", "fc2")
AFTER = {"attention": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
TOLERANCE = 1e4  # times eps: how far scaled states may be from the multiples they should be


def gaps(removed: Collection[int], layers: int) -> list[tuple[int, int]]:
    """Runs of consecutive removed layers as (first, end), end exclusive, ascending."""
    gone = sorted(set(removed))
    if gone and not (gone[0] >= 0 and gone[-1] < layers and len(gone) < layers):
        raise UserError(f"removed: expected some, not all, of 0 to {layers - 1}, got {gone}")
    starts = [i for i in gone if i - 1 not in gone]
    ends = [i + 1 for i in gone if i + 1 not in gone]
    return list(zip(starts, ends, strict=True))


def writers(graph: ResidualGraph, branch: Branch) -> list[Tensor]:
    """The parameters whose multiplication by a number multiplies what the branch adds: weights and
    biases of its last linear maps (every expert's). Raises UserError if they are not known, or if
    a norm comes after them."""
    block, layout = graph.adapter.blocks[branch.layer], graph.layouts[branch.layer]
    if _norm_after(graph, branch) is not None:
        raise UserError(f"{type(block).__name__}: its branches end in a norm, not a linear map")
    names = (layout.attention,) if branch.kind == "attention" else layout.mlp[-1:]
    found: list[Tensor] = []
    for name in names:
        for path, module in block.get_submodule(name).named_modules(prefix=name):
            if isinstance(module, nn.Linear | Conv1D):
                if path.rpartition(".")[2] in WRITERS:
                    found += list(module.parameters(recurse=False))
            else:
                own = dict(module.named_parameters(recurse=False))
                found += [p for n, p in own.items() if n in ("down_proj", "down_proj_bias")]
    if not found:
        raise UserError(f"{type(block).__name__}: unknown last linear map of its {branch.kind}")
    return found


def _norm_after(graph: ResidualGraph, branch: Branch) -> nn.Module | None:
    layout = graph.layouts[branch.layer]
    norms = layout.attention_norms if branch.kind == "attention" else layout.mlp_norms
    name = AFTER[branch.kind]
    return graph.adapter.blocks[branch.layer].get_submodule(name) if name in norms else None


@torch.no_grad()
def compensate(
    graph: ResidualGraph, removed: Collection[int], batches: Sequence[Batch]
) -> list[float]:
    """Prune&Comp (arXiv 2507.18212): before each gap, everything that was written to the stream is
    multiplied by E[|h_after| / |h_before|], in place; returns these factors, gap by gap.

    Embeddings (untied from the head first), the last linear maps of all branches before the gap,
    or the norms after them where there are some. Norms make the branches' own input independent of
    the scale. The layers to remove are still there, and must be removed afterwards. Raises
    UserError if the hidden states do not scale by this; the model must not be used after it.
    """
    layers = len(graph.layouts)
    found = gaps(removed, layers)
    if not found:
        return []
    size = magnitudes(graph.adapter, batches)
    factors = [float(size[start, end]) for start, end in found]
    first = batches[0]
    for (start, _), factor in zip(found, factors, strict=True):
        # Of the model as it is now: the layers of an earlier gap are still in it, and not scaled by
        # that gap's factor.
        before = _states(graph, first)
        _scale_embeddings(graph, factor)
        for layer in range(start):
            _scale_layer(graph, layer, factor)
        after = _states(graph, first)
        tolerance = TOLERANCE * torch.finfo(next(graph.model.parameters()).dtype).eps
        for position in range(start + 1):
            expected = before[position] * factor
            off = (after[position] - expected).norm() / expected.norm()
            if not off <= tolerance:
                raise UserError(
                    f"{type(graph.model).__name__}: its hidden states do not scale with the "
                    f"embeddings and the branches' outputs (position {position}, off by "
                    f"{float(off):.1e}): compensation is not possible"
                )
    return factors


def _states(graph: ResidualGraph, batch: Batch) -> list[Tensor]:
    states: list[Tensor] = []

    def visit(_position: int, state: Tensor) -> None:
        states.append(real_tokens(state, batch))

    visit_states(graph.adapter, batch, visit)
    return states


def _scale_layer(graph: ResidualGraph, layer: int, factor: float) -> None:
    for kind in ("attention", "mlp"):
        branch = Branch(kind, layer)
        norm = _norm_after(graph, branch)
        if norm is not None:
            _scale_norm(norm, factor)
            continue
        for parameter in writers(graph, branch):
            parameter.mul_(factor)


def _scale_norm(norm: nn.Module, factor: float) -> None:
    """Whether the norm multiplies by its weight or by 1 + it (Gemma) is tried out."""
    weight: Tensor = norm.weight  # type: ignore[assignment]
    probe = torch.linspace(-1.0, 2.0, weight.numel(), device=weight.device).to(weight.dtype)[None]
    expected = norm(probe) * factor
    old = weight.clone()
    for scaled in (old * factor, (1 + old) * factor - 1):
        weight.copy_(scaled)
        if torch.allclose(norm(probe), expected, rtol=1e-2, atol=1e-5):
            break
    for name, parameter in norm.named_parameters(recurse=False):
        if name == "bias":
            parameter.mul_(factor)


def _scale_embeddings(graph: ResidualGraph, factor: float) -> None:
    """Multiplies the first layer's input: the last thing before it that can be scaled."""
    decoder = graph.adapter.decoder
    children = dict(decoder.named_children())
    if "word_embeddings_layernorm" in children:  # BLOOM
        for parameter in children["word_embeddings_layernorm"].parameters():
            parameter.mul_(factor)
        return
    tables = [m for m in children.values() if isinstance(m, nn.Embedding)]
    project = children.get("project_in")  # OPT: positions are added after it
    if project is not None:
        entry = graph.model.get_input_embeddings()
        for parameter in project.parameters():
            parameter.mul_(factor)
        tables = [m for m in tables if m is not entry]
    else:
        untie(graph.model)
    for table in tables:
        table.weight.mul_(factor)


def untie(model: Any) -> None:
    """Gives the head its own copy of the embeddings, so that they can differ."""
    head, entry = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not entry.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone(), head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


@torch.no_grad()
def refit(
    graph: ResidualGraph,
    removed: Collection[int],
    batches: Sequence[Batch],
    ridge: float = 1e-3,
) -> list[dict[str, float]]:
    """ReplaceMe (arXiv 2505.02819, section 3.2): before each gap i..j-1 the MLP of layer i - 1 is
    multiplied by the matrix T that minimises |M T - (h_j - u)|^2 + lambda |T - I|^2, in place.

    u: the stream before that MLP and M what the MLP adds, in the model as pruned (earlier gaps
    refitted); h_j: of the model as given. Padding excluded. The Gram matrix and the solve are
    float64; lambda = ridge x mean diagonal of M'M, and pulls to the identity (the paper pulls to
    zero), so that little text does no harm. A gap at layer 0 has nothing before it and is left.

    Returns per gap {"first", "end", "before", "after"}: relative squared errors of the stream at
    the gap's end on this text. The layers to remove must be removed afterwards.
    """
    if not ridge > 0:
        raise UserError(f"ridge: expected a positive number, got {ridge}")
    found = [gap for gap in gaps(removed, len(graph.layouts)) if gap[0] > 0]
    gone = set(removed)
    for start, _ in found:
        writers(graph, Branch("mlp", start - 1))  # refused before anything is changed
    originals: dict[int, list[Tensor]] = {}
    report = []
    for start, end in found:
        parameters = writers(graph, Branch("mlp", start - 1))
        folded = {i: [p.clone() for p in _mlp(graph, i)] for i in originals}
        gram, right, total = _normal_equations(graph, gone, (start, end), batches, originals)
        originals[start - 1] = [p.clone() for p in parameters]
        for i, values in folded.items():
            _put(graph, i, values)
        weight = gram.diagonal().mean() * ridge
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        transform = eye + torch.linalg.solve(gram + weight * eye, right - gram)
        _fold(graph, start - 1, transform)
        errors = [
            float(total - 2 * (t * right).sum() + (t * (gram @ t)).sum()) for t in (eye, transform)
        ]
        report.append({"first": start, "end": end, "before": errors[0], "after": errors[1]})
    return report


def _mlp(graph: ResidualGraph, layer: int) -> list[Tensor]:
    return writers(graph, Branch("mlp", layer))


def _put(graph: ResidualGraph, layer: int, values: list[Tensor]) -> None:
    for parameter, value in zip(_mlp(graph, layer), values, strict=True):
        parameter.copy_(value)


def _normal_equations(
    graph: ResidualGraph,
    gone: set[int],
    gap: tuple[int, int],
    batches: Sequence[Batch],
    originals: dict[int, list[Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """M'M [d, d], M'(h_j - u) [d, d] and |h_j - u|^2, divided by the latter's sum of |h_j|^2."""
    start, end = gap
    gram: Any = 0.0
    right: Any = 0.0
    total: Any = 0.0
    scale: Any = 0.0
    current = {i: [p.clone() for p in _mlp(graph, i)] for i in originals}
    for batch in batches:
        first, context = graph.start(batch)
        for i, values in originals.items():
            _put(graph, i, values)
        state = first
        for layer in range(end):
            state = run_layer(graph, layer, state, context)
        target = real_tokens(state.total, batch).double()
        for i, values in current.items():
            _put(graph, i, values)
        state = first
        for layer in range(start - 1):
            if layer not in gone:
                state = run_layer(graph, layer, state, context)
        state = graph.run(Branch("attention", start - 1), state, context)
        u = real_tokens(state.total, batch).double()
        state = graph.run(Branch("mlp", start - 1), state, context)
        m = real_tokens(state.total, batch).double() - u
        gram, right = gram + m.T @ m, right + m.T @ (target - u)
        total, scale = total + (target - u).square().sum(), scale + target.square().sum()
    return gram / scale, right / scale, total / scale


def _fold(graph: ResidualGraph, layer: int, transform: Tensor) -> None:
    """Right-multiplies what the layer's MLP adds by `transform`."""
    width = len(transform)
    modules = {
        id(p): m for m in graph.adapter.blocks[layer].modules() for p in m.parameters(recurse=False)
    }
    for parameter in _mlp(graph, layer):
        value = parameter.double()
        if value.dim() == 1 or isinstance(modules[id(parameter)], Conv1D):
            value = value @ transform
        elif value.shape[-2] == width:  # [d, f], or [experts, d, f]
            value = transform.T @ value
        else:
            raise UserError(f"layer {layer}: unknown shape {tuple(value.shape)} of an MLP's output")
        parameter.copy_(value)
