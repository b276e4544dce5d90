"""What transformers calls while it loads a compressed checkpoint.

Imported while transformers itself is being imported: everything else of pyprune comes in later, in
the methods.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial, wraps
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyprune.errors import UserError

if TYPE_CHECKING:
    from pyprune.checkpoint import TensorEntry
    from pyprune.sparse.format import LayerFormat
    from pyprune.sparse.weight import StoredWeight

METHOD = "pyprune"
EMBEDDINGS = ("dense", "coded")  # formats that an embedding may have: int8 rows, coded ones


class PyPruneConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of config.json; see docs/format.md."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = METHOD


class PyPruneQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty `SparseLinear` and `FactoredLinear` layers and `StoredEmbedding`s into the model
    before its weights are read, so that these go straight to their layers, and checks them
    afterwards."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._layers: dict[str, LayerFormat] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._parts: dict[str, dict[str, TensorEntry]] = {}
        self._placed: dict[str, str] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def update_attn_implementation(self, config: Any) -> Any:
        # The advice for those without pyprune stands where a file name could; see docs/format.md.
        if getattr(config, "transformers_weights", None) is not None:
            del config.transformers_weights
        return config

    # What transformers before 5.18 calls between making the quantizer and looking for files.
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        from pyprune.checkpoint.names import EXPERT, has_place_for
        from pyprune.checkpoint.shards import read_headers
        from pyprune.models.experts import is_fused
        from pyprune.sparse import format as formats
        from pyprune.sparse.dense import use_own_kernels

        if not checkpoint_files:
            raise UserError("expected the safetensors files of a compressed checkpoint, got none")
        folder = Path(checkpoint_files[0]).parent
        fields = self.quantization_config.to_dict()
        self._layers = formats.parse_quantization_config(fields, str(folder / "config.json"))
        self._entries = read_headers(map(Path, checkpoint_files))
        formats.stacks_of(self._layers, str(folder / "config.json"))
        mixtures: dict[str, dict[str, str]] = {}
        for name, layer in self._layers.items():
            self._parts[name] = formats.check_entries(name, layer, self._entries, folder)
            match = EXPERT.match(name + formats.WEIGHT)
            fused = self._find(model, match["experts"]) if match else None
            if layer.stacked:
                path, place = self._stacked(model, name)
                mixtures.setdefault(path, {})[place] = name
            elif match and fused and is_fused(fused[1]):
                place = f"{match['expert']}.{match['projection']}"
                mixtures.setdefault(fused[0], {})[place] = name
            else:
                self._place(model, name)
        listed = {f"{name}.{part}" for name, found in self._parts.items() for part in found}
        others = {name: entry for name, entry in self._entries.items() if name not in listed}
        takes = partial(has_place_for, model)
        formats.refuse_unlisted(others, str(folder / "config.json"), takes)
        for experts, names in mixtures.items():
            self._place_experts(model, experts, names)
        self._tie(model)
        use_own_kernels(model)  # for the layers that are left dense
        self._dtypes = {name: t.dtype for name, t in _tensors(model) if t.is_floating_point()}

    def _find(self, model: Any, name: str) -> tuple[str, nn.Module] | None:
        """The module that the checkpoint calls `name`, after its path in the model."""
        from pyprune.checkpoint.names import candidate_names

        for tensor in candidate_names(f"{name}.weight", model):
            path = tensor.removesuffix(".weight")
            try:
                return path, model.get_submodule(path)
            except AttributeError:
                continue
        return None

    def _place(self, model: Any, name: str) -> None:
        """An empty module of the stored format in the place of one linear layer or embedding."""
        from pyprune.sparse.linear import stored_transposed, weight_of

        path, old = self._find(model, name) or ("", None)
        layer, weight = self._layers[name], None if old is None else weight_of(old)
        if isinstance(old, nn.Embedding) and layer.format in EMBEDDINGS:
            weight = old.weight
        fits = weight is not None and tuple(weight.shape) == layer.shape
        if old is None or not fits or stored_transposed(old) != layer.transposed:
            self._refuse(name, f"a linear layer or embedding {name} of {list(layer.shape)}", old)
        model.set_submodule(path, self._empty(name, old))
        # GPT-2 initialises projections from the module around them, by their weight.
        parent = model.get_submodule(path.rpartition(".")[0])
        if not (parent._parameters or parent._buffers):
            parent._is_hf_initialized = True
        self._placed[name] = path

    def _tie(self, model: Any) -> None:
        """Modules that are tied to one of stored rows read their weight from it, and transformers
        is not to tie parameters that they do not have."""
        owners = {
            f"{path}.weight": name
            for name, path in self._placed.items()
            if self._layers[name].format in EMBEDDINGS
        }
        if not owners:
            return
        for target, source in list(model.all_tied_weights_keys.items()):
            if target not in owners and source not in owners:
                continue
            del model.all_tied_weights_keys[target]
            if target in owners and source in owners:
                continue  # the checkpoint holds both
            name = owners.get(source) or owners[target]
            other = (target if source in owners else source).removesuffix(".weight")
            beside = next((t for t in self._entries if self._is_of(model, t, other)), None)
            if beside is not None:
                raise UserError(
                    f"{self._entries[beside].file}: tensor {beside}: expected none, it is tied to "
                    f"{name}"
                )
            owner, old = model.get_submodule(self._placed[name]), model.get_submodule(other)
            model.set_submodule(other, self._empty(name, old, tied_to=owner))
        model._tied_weights_keys = {
            target: source
            for target, source in (model._tied_weights_keys or {}).items()
            if target not in owners and source not in owners
        }

    def _is_of(self, model: Any, tensor: str, module: str) -> bool:
        from pyprune.checkpoint.names import candidate_names

        return f"{module}.weight" in candidate_names(tensor, model)

    def _stacked(self, model: Any, name: str) -> tuple[str, str]:
        """Where the layer `name`, X.<expert>, belongs: the path of the fused experts, and
        `<projection>.<expert>`."""
        from pyprune.checkpoint.names import candidate_names
        from pyprune.models.experts import is_fused, projections

        tensor, _, number = name.rpartition(".")
        for parameter in candidate_names(tensor, model):
            path, _, projection = parameter.rpartition(".")
            try:
                module = model.get_submodule(path)
            except AttributeError:
                continue
            if is_fused(module) and projection in projections(module):
                return path, f"{projection}.{number}"
        self._refuse(name, f"experts with a parameter {tensor}", None)

    def _place_experts(self, model: Any, path: str, names: Mapping[str, str]) -> None:
        """Empty `SparseExperts` in the place of the fused experts module at `path`.

        names: the layers by `<expert>.<projection>` or `<projection>.<expert>`.
        """
        from pyprune.models import experts
        from pyprune.sparse.experts import GATED, SparseExperts, kinds

        old = model.get_submodule(path)
        count, expert_first = experts.expert_count(old), next(iter(names))[0].isdecimal()
        kind = next(iter(kinds(old, expert_first, names)), GATED[0])
        joined = ("{0}.{1}" if expert_first else "{1}.{0}").format
        expected = {joined(e, projection): projection for e in range(count) for projection in kind}
        if expected.keys() != names.keys():
            named = next(iter(names.values()))
            self._refuse(named, f"{', '.join(kind)} of {count} experts", old)
        first, last = (cast(Tensor, getattr(old, which)) for which in experts.projections(old))
        transposed = experts.is_transposed(old)
        (wide, hidden), narrow = (
            w.shape[:0:-1] if transposed else w.shape[1:] for w in (first, last)
        )
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
            kind[:-1], (wide // (len(kind) - 1), hidden)
        )
        shapes[kind[-1]] = tuple(narrow)
        made: dict[str, nn.Module] = {}
        for place, name in names.items():
            layer, shape = self._layers[name], shapes[expected[place]]
            if layer.shape != shape or layer.transposed != (transposed and not expert_first):
                self._refuse(name, f"the shape {list(shape)}", old)
            made[place] = self._empty_linear(name, first.dtype, False)
            self._placed[name] = f"{path}.{place}"
        model.set_submodule(path, SparseExperts(old, made))

    def _empty(self, name: str, old: nn.Module, tied_to: StoredWeight | None = None) -> nn.Module:
        """What stands for `old`, a linear layer or embedding, with the weight of layer `name`."""
        from pyprune.sparse.embedding import StoredEmbedding, embedding_scale
        from pyprune.sparse.linear import weight_of

        dtype = cast(Tensor, old.weight).dtype
        if weight_of(old) is not None:
            return self._empty_linear(name, dtype, old.bias is not None, tied_to)
        try:
            scale = embedding_scale(old)
        except UserError as error:
            part = self._layers[name].main
            file = self._parts[name][part].file
            raise UserError(f"{file}: tensor {name}.{part}: {error}") from error
        layer = self._layers[name]
        return StoredEmbedding(
            *layer.shape, layer.format, scale=scale, nnz=max(0, layer.count(self._parts[name])),
            dtype=dtype, device="meta", tied_to=tied_to,
        )  # fmt: skip

    def _empty_linear(
        self, name: str, dtype: torch.dtype, bias: bool, tied_to: StoredWeight | None = None
    ) -> nn.Module:
        from pyprune.sparse.factored import FactoredLinear
        from pyprune.sparse.layout import FACTORED
        from pyprune.sparse.linear import SparseLinear

        layer = self._layers[name]
        rows, cols = layer.shape
        if layer.format == FACTORED:
            return FactoredLinear(cols, rows, layer.rank, bias=bias, dtype=dtype, device="meta")
        nnz = max(0, layer.count(self._parts[name]))
        return SparseLinear(
            cols, rows, layer.format,
            int8=layer.int8, bias=bias, nnz=nnz, dtype=dtype, device="meta", tied_to=tied_to,
        )  # fmt: skip

    def _refuse(self, name: str, expected: str, model_has: nn.Module | None) -> NoReturn:
        part = self._layers[name].main
        file, got = self._parts[name][part].file, str(model_has or "none").splitlines()[0]
        raise UserError(f"{file}: tensor {name}.{part}: the model lacks {expected}: got {got}")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from pyprune.sparse import format as formats
        from pyprune.sparse.range import check_coded_range, check_range

        self._cast_as_planned(model)
        check_range(model, self._entries)
        for name, path in self._placed.items():
            module, layer = model.get_submodule(path), self._layers[name]
            owned = getattr(module, "weight_buffers", layer.parts)
            tensors = {part: attrgetter(part)(module) for part in owned}
            where = self._entries[f"{name}.{layer.main}"].file
            formats.check_tensors(name, layer, tensors, str(where))
        check_coded_range(model, self._entries)
        return model

    def _cast_as_planned(self, model: Any) -> None:
        """Casts what came in the file's dtype to the model's: transformers (5.17 still) takes every
        tensor that it renames (routers, fused experts, GPT-NeoX's head) for a quantized one, and
        leaves it as stored."""
        in_fp32 = {
            *(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()),
        }  # fmt: skip
        for name, tensor in _tensors(model):
            planned = self._dtypes.get(name, tensor.dtype)
            if tensor.dtype != planned and in_fp32.isdisjoint(name.split(".")):
                tensor.data = tensor.data.to(planned)

    def _dequantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            "dequantize: not in memory; `pyprune decompress DIR --out DENSE` writes it dense"
        )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def save_with_advice() -> None:
    """Lets transformers write the configuration of a compressed model with the advice for those
    without pyprune (docs/format.md): it takes `transformers_weights` off whatever it saves, and
    the copy would then be filled with random numbers."""
    write = PreTrainedConfig.to_json_file

    @wraps(write)
    def to_json_file(
        self: Any, json_file_path: str | os.PathLike[str], *args: Any, **kw: Any
    ) -> None:
        write(self, json_file_path, *args, **kw)
        if isinstance(getattr(self, "quantization_config", None), PyPruneConfig):
            from pyprune.sparse.format import HOW_TO_LOAD

            file = Path(json_file_path)
            fields = json.loads(file.read_text(encoding="utf-8"))
            fields["transformers_weights"] = HOW_TO_LOAD
            text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
            file.write_text(text, encoding="utf-8")

    PreTrainedConfig.to_json_file = to_json_file
