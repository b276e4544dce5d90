"""How a decoder layer of each family is made of residual branches.

A layout names, relative to the layer, what one branch is made of. It is chosen by the names of the
layer's children; `pyprune.depth.graph` then checks on real numbers that the layer computes what the
layout says, so that a family that merely reuses the names is refused, not misread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from pyprune.errors import UserError


@dataclass(frozen=True)
class Layout:
    """One kind of decoder layer.

    Attributes:
        attention: the attention module, or what a hybrid has in its place; returns its output, or
            a tuple of that and something else.
        mlp: the MLP or mixture module, or the first and last linear map where the layer itself
            runs the MLP (OPT).
        attention_norms, mlp_norms: norms that only this branch reads, before and after its module.
        shared: norms that both branches of a parallel layer read.
        parallel: whether attention and MLP read the same state and are added together.
        adds_inside: whether the modules take the residual as second argument and add it (BLOOM).
    """

    attention: str
    mlp: tuple[str, ...]
    attention_norms: tuple[str, ...] = ()
    mlp_norms: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    parallel: bool = False
    adds_inside: bool = False

    def modules(self, kind: str) -> tuple[str, ...]:
        """Everything whose parameters belong to the branch alone."""
        return (*self.inner(kind), *self.norms(kind))

    def norms(self, kind: str) -> tuple[str, ...]:
        """Those that only this branch reads."""
        return self.attention_norms if kind == "attention" else self.mlp_norms

    def last(self, kind: str) -> str:
        """What gives the branch's output, but for a norm behind it."""
        return self.inner(kind)[-1]

    def inner(self, kind: str) -> tuple[str, ...]:
        """The attention, or what the MLP is made of, without their norms."""
        return (self.attention,) if kind == "attention" else self.mlp


_PRE = Layout("self_attn", ("mlp",), ("input_layernorm",), ("post_attention_layernorm",))
_SANDWICH = Layout(
    "self_attn",
    ("mlp",),
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_POST = Layout(
    "self_attn", ("mlp",), ("post_attention_layernorm",), ("post_feedforward_layernorm",)
)
_ONE_NORM = Layout("self_attn", ("mlp",), shared=("input_layernorm",), parallel=True)
_OPT = Layout("self_attn", ("fc1", "fc2"), ("self_attn_layer_norm",), ("final_layer_norm",))
_GPT2 = Layout("attn", ("mlp",), ("ln_1",), ("ln_2",))
_JAMBA = Layout("self_attn", ("mlp",), ("input_layernorm",), ("pre_ff_layernorm",))
_LFM2 = Layout("self_attn", ("mlp",), ("operator_norm",), ("ffn_norm",))
_GPTJ = Layout("attn", ("mlp",), shared=("ln_1",), parallel=True)
_BLOOM = Layout(
    "self_attention",
    ("mlp",),
    ("input_layernorm",),
    ("post_attention_layernorm",),
    adds_inside=True,
)


# What a family calls the attention of a layer, and its MLP or mixture.
ATTENTIONS = ("self_attn", "linear_attn", "mamba", "conv")
MLPS = ("mlp", "block_sparse_moe", "feed_forward")


def layout_of(layer: nn.Module, config: Any) -> Layout:
    """The layout of `layer`.

    config: the model's text configuration, which says what the children's names do not.

    Raises:
        UserError: no layout has the layer's children; the message says what to add, and where.
    """
    children = {name for name, _ in layer.named_children()}
    found = _choose(children, config)
    if found is None:
        raise UserError(
            f"{type(layer).__name__}: unknown residual structure (children "
            f"{', '.join(sorted(children)) or 'none'}); a layout of it, naming the attention, the "
            "MLP and their norms, has to be added in pyprune.depth.layouts; methods that prune "
            "weights (`pyprune methods`) do not need one"
        )
    return found


def _choose(children: set[str], config: Any) -> Layout | None:
    if "attention" in children:
        return _neox(children, config)
    if "self_attention" in children:
        return _falcon(children, config)
    attentions = [name for name in ATTENTIONS if name in children]
    mlps = [name for name in MLPS if name in children]
    for layout in (_SANDWICH, _PRE, _POST, _ONE_NORM, _JAMBA, _LFM2, _OPT, _GPT2, _GPTJ):
        if layout.attention == "self_attn" and layout.mlp == ("mlp",):
            if len(attentions) != 1 or len(mlps) != 1:
                continue
            layout = replace(layout, attention=attentions[0], mlp=(mlps[0],))
        named = {*layout.modules("attention"), *layout.modules("mlp"), *layout.shared}
        if named <= children and not _extra(children - named):
            return layout
    return None


def _extra(children: set[str]) -> set[str]:
    """Children that hold something: not dropouts and activations."""
    return {name for name in children if "dropout" not in name and "activation" not in name}


def _neox(children: set[str], config: Any) -> Layout | None:
    norms = {"input_layernorm", "post_attention_layernorm"}
    if _extra(children) != {"attention", "mlp", *norms}:
        return None
    parallel = bool(getattr(config, "use_parallel_residual", False))
    return Layout(
        "attention", ("mlp",), ("input_layernorm",), ("post_attention_layernorm",), (), parallel
    )


def _falcon(children: set[str], config: Any) -> Layout | None:
    """BLOOM, and Falcon with its three arrangements of norms."""
    if not hasattr(config, "parallel_attn"):
        known = {*_BLOOM.modules("attention"), *_BLOOM.modules("mlp")}
        inside = not getattr(config, "apply_residual_connection_post_layernorm", False)
        return _BLOOM if _extra(children) == known and inside else None
    rest = _extra(children) - {"self_attention", "mlp"}
    if rest == {"ln_attn", "ln_mlp"}:
        attention, mlp, shared = ("ln_attn",), ("ln_mlp",), ()
    elif rest == {"input_layernorm"}:
        attention, mlp, shared = (), (), ("input_layernorm",)  # type: ignore[assignment]
    elif rest == {"input_layernorm", "post_attention_layernorm"}:
        attention, mlp, shared = ("input_layernorm",), ("post_attention_layernorm",), ()
    else:
        return None
    parallel = bool(config.parallel_attn or config.new_decoder_architecture)
    return Layout("self_attention", ("mlp",), attention, mlp, shared, parallel)
