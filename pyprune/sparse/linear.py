"""`SparseLinear`: an `nn.Linear` whose weight stays compressed, and putting it into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pyprune import ops
from pyprune.errors import LayerError, UserError
from pyprune.ops import registry
from pyprune.sparse import layout
from pyprune.sparse.direct import Prepared, PreparesWeight, can_prepare, is_alone, is_plain
from pyprune.sparse.layout import CODED, FORMATS, LayerFormat, dtype_name
from pyprune.sparse.weight import KINDS, StoredWeight, autocast, pack

# What computes x @ W^T + bias and nothing else. Conv1D holds W transposed.
LINEAR, CONV1D = "torch.nn.modules.linear.Linear", "transformers.pytorch_utils.Conv1D"
FALCON = "transformers.models.falcon.modeling_falcon.FalconLinear"


def weight_of(module: nn.Module) -> Tensor | None:
    """The weight `[R, C]`, a detached view, of a module that a `SparseLinear` can stand for; None
    for any other. Exact classes: a subclass may compute something else."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind not in (LINEAR, CONV1D, FALCON):
        return None
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.T if kind == CONV1D else weight


def stored_transposed(module: nn.Module) -> bool:
    """Whether the module holds its weight as `[C, R]`."""
    return f"{type(module).__module__}.{type(module).__qualname__}" == CONV1D


def compressed_bytes(weight: Tensor, format: str) -> int | None:
    """Bytes that `weight [R, C]` takes in `format` ("dense", "sparse24", "bitmap"), without packing
    it; None if it does not fit the format (more than two non-zero of four)."""
    if format == "dense":
        return weight.nbytes
    if format not in FORMATS:
        raise UserError(f"format: expected dense, {', '.join(FORMATS)}, got {format!r}")
    return layout.sparse_bytes(_kept(weight), weight.dtype, (format,))[0].get(format)


def _kept(weight: Tensor) -> Tensor:
    """Which elements `pack` stores: negative zeros become +0, and go too."""
    return (weight != 0).contiguous()


class SparseLinear(PreparesWeight, StoredWeight):
    """`y = x @ W^T + bias` with `W [out_features, in_features]` kept compressed.

    Made by `from_dense`, or by `SparseLinear(...)` followed by `load_state_dict`. Gradients flow
    through it to x, and to the bias if that is asked to have one; there is none with respect to the
    weights: they are buffers. Within `torch.autocast` x and the result have its dtype, as with
    `nn.Linear`. `decompress()` returns the dense weight, equal to the original but for negative
    zeros, which become +0, and for int8 values, which are off by up to half of their row's scale;
    "coded" keeps every bit.

    Args:
        in_features, out_features: C and R.
        format, int8, nnz, dtype, device, tied_to: as for `StoredWeight`; dtype is that of the bias
            too.
        bias: as for `nn.Linear`.

    Raises:
        UserError: unknown format, or a width that 2:4 cannot hold.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        format: str,
        *,
        int8: bool = False,
        bias: bool = True,
        nnz: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        tied_to: StoredWeight | None = None,
    ) -> None:
        super().__init__(
            out_features, in_features, format,
            int8=int8, nnz=nnz, dtype=dtype, device=device, tied_to=tied_to,
        )  # fmt: skip
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(
            "bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None
        )

    @classmethod
    def from_dense(cls, linear: nn.Module, format: str, int8: bool = False) -> SparseLinear:
        """`linear` (see `weight_of`) with its zeros left out, or its exponents coded. Raises
        UserError if it is no linear layer, or its weight does not fit or is not finite (int8)."""
        weight = weight_of(linear)
        if weight is None:
            raise UserError(f"expected a linear layer, got {type(linear).__name__}")
        if format == "sparse24" and not layout.is_24(_kept(weight)):
            raise UserError(
                "sparse24: expected a multiple of 8 inputs and at most 2 non-zero of every 4"
            )
        if format == CODED and weight.dtype is not torch.bfloat16:
            raise UserError(f"coded: expected bfloat16 weights, got {weight.dtype}")
        layer = LayerFormat(format, (weight.shape[0], weight.shape[1]), int8)
        parts = dict(zip(layer.parts, pack(weight, layer, _kept(weight)), strict=True))
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        own = None if bias is None else bias.detach().clone()
        return cls.of_parts(layer, parts, own, dtype=weight.dtype).train(linear.training)

    @classmethod
    def of_parts(
        cls,
        layer: LayerFormat,
        parts: Mapping[str, Tensor],
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
    ) -> SparseLinear:
        """The layer of a weight that is stored as `layer` says in `parts`, and of `bias`: these
        tensors themselves, which are taken to be right. dtype: as for the constructor."""
        rows, cols = layer.shape
        new = cls(
            cols, rows, layer.format, int8=layer.int8, bias=bias is not None, dtype=dtype,
            device="meta",
        )  # fmt: skip
        for part, tensor in parts.items():
            setattr(new, part, tensor)
        new.bias = bias
        return new

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` this stands for."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.decompress(), requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain(x) and x.shape[-1:] == (self.in_features,):
            ready = self._ready()
            if ready is not None:
                return ready.product(x)
        x = autocast(x)
        if self._direct_on_cuda(x):
            result: Tensor = registry.call(self._op, x, *self._weight, self.bias)
            return result
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x: expected [..., {self.in_features}], got shape {tuple(x.shape)}")
        product: Callable[..., Tensor] = getattr(ops, self._op)
        return product(x, *self._weight, bias=self.bias)

    @property
    def _op(self) -> str:
        return KINDS[self.format, self.int8].op

    def _ready(self) -> Prepared | None:
        """The weight and bias ready for the CPU kernel. None where it does not serve, or a gradient
        is asked for."""
        weight, bias, known = self._weight, self._buffers["bias"], self._prepared
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            return None
        if known is None or not known.is_of(weight, bias):
            known = None
            if can_prepare(weight, bias, self.in_features):
                known = Prepared(self._op, weight, bias, self.out_features, self.in_features)
            self._prepared = known
        return known

    def _direct_on_cuda(self, x: Tensor) -> bool:
        """Whether the implementation may be called without the operator's dispatch."""
        if not is_alone(x):
            return False
        values, bias = self._values, self._buffers["bias"]
        return (
            x.device.type == "cuda"
            and x.dtype in registry.HALF_OR_SINGLE
            and x.shape[-1:] == (self.in_features,)
            and not (bias is not None and bias.requires_grad and torch.is_grad_enabled())
            and values.device == x.device
            and values.dtype is not torch.float64
        )

    def extra_repr(self) -> str:
        values = self._values
        dtype = torch.bfloat16 if self.format == CODED else values.dtype
        density = values.numel() / max(1, self.in_features * self.out_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format}, density={density:.3f}, "
            f"dtype={dtype_name(dtype)}"
        )


def _choose(weight: Tensor, allowed: tuple[str, ...]) -> str:
    """The smallest of the allowed formats, "dense" where none saves a tenth of the bytes."""
    sizes = {f: n for f in allowed if (n := compressed_bytes(weight, f)) is not None}
    return next(iter(layout.worthwhile(sizes, weight.nbytes)), "dense")


def compress_model(
    model: nn.Module,
    formats: tuple[str, ...] | Mapping[str, str] = FORMATS,
    *,
    int8: bool = False,
) -> dict[str, str]:
    """Replaces pruned linear modules of `model` (see `weight_of`) by `SparseLinear`, in place.

    Args:
        model: any module. Weights shared with another module (tied embeddings) stay dense, and so
            do modules that are in more than one place.
        formats: those to choose from (per layer the smallest that saves a tenth of the bytes), or a
            mapping from module names to "sparse24", "bitmap" or "dense" for full control.
        int8: whether the layers that are replaced get int8 values.

    Returns:
        The format of every linear module, "dense" for those left alone.

    Raises:
        UserError: unknown format or module name. LayerError: a layer does not fit its format, or
            has no weights (meta device).
    """
    names = [n for n, m in model.named_modules() if weight_of(m) is not None]
    if isinstance(formats, Mapping):
        unknown = sorted(set(formats) - set(names))
        if unknown:
            raise UserError(f"formats: {unknown[0]!r} is not a linear layer of this model")
    owners: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen: dict[str, str] = {}
    # One dense weight is held at a time: those replaced are gone before the next is packed.
    for name in names:
        linear = model.get_submodule(name)
        weight = weight_of(linear)
        assert weight is not None  # by the choice of names
        if weight.is_meta:
            raise LayerError(name, "expected weights in memory, got the meta device")
        if isinstance(formats, Mapping):
            chosen[name] = formats.get(name, "dense")
        elif owners[id(linear.weight)] > 1:
            chosen[name] = "dense"
        else:
            chosen[name] = _choose(weight, tuple(formats))
        if chosen[name] != "dense":
            try:
                sparse = SparseLinear.from_dense(linear, chosen[name], int8)
            except UserError as error:
                raise LayerError(name, str(error)) from error
            model.set_submodule(name, sparse)
    return chosen
