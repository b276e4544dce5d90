"""Modules of the stored formats in an empty model, in the places of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from pyprune.checkpoint import TensorEntry
from pyprune.checkpoint.names import EXPERT, candidate_names, has_place_for
from pyprune.checkpoint.shards import read_headers
from pyprune.errors import UserError
from pyprune.models import experts
from pyprune.sparse import format as formats
from pyprune.sparse.dense import use_own_kernels
from pyprune.sparse.embedding import StoredEmbedding, embedding_scale
from pyprune.sparse.experts import GATED, SparseExperts, kinds
from pyprune.sparse.factored import FactoredLinear
from pyprune.sparse.layout import CODED, DENSE_INT8, FACTORED
from pyprune.sparse.linear import SparseLinear, stored_transposed, weight_of
from pyprune.sparse.mapped import leave_files, tensor_bytes
from pyprune.sparse.range import check_coded_range, check_range
from pyprune.sparse.weight import StoredWeight

EMBEDDINGS = (DENSE_INT8, CODED)  # formats that an embedding may have: int8 rows, coded ones


class Placement:
    """Puts empty `SparseLinear` and `FactoredLinear` layers and `StoredEmbedding`s into `model`
    before its weights are read, so that these go straight to their layers.

    fields: of the `quantization_config`. files: of the checkpoint. Raises UserError, naming file
    and tensor, for what does not describe weights of this model.
    """

    def __init__(self, model: Any, fields: Mapping[str, Any], files: Sequence[Path]) -> None:
        folder = files[0].parent
        where = str(folder / "config.json")
        self._model = model
        self._layers = formats.parse_quantization_config(fields, where)
        self._entries = read_headers(files)
        self._parts: dict[str, dict[str, TensorEntry]] = {}
        self._placed: dict[str, str] = {}
        formats.stacks_of(self._layers, where)
        mixtures: dict[str, dict[str, str]] = {}
        for name, layer in self._layers.items():
            self._parts[name] = formats.check_entries(name, layer, self._entries, folder)
            match = EXPERT.match(name + formats.WEIGHT)
            fused = self._find(match["experts"]) if match else None
            if layer.stacked:
                path, place = self._stacked(name)
                mixtures.setdefault(path, {})[place] = name
            elif match and fused and experts.is_fused(fused[1]):
                place = f"{match['expert']}.{match['projection']}"
                mixtures.setdefault(fused[0], {})[place] = name
            else:
                self._place(name)
        listed = {f"{name}.{part}" for name, found in self._parts.items() for part in found}
        others = {name: entry for name, entry in self._entries.items() if name not in listed}
        formats.refuse_unlisted(others, where, partial(has_place_for, model))
        for path, names in mixtures.items():
            self._place_experts(path, names)
        self._tie()
        use_own_kernels(model)  # for the layers that are left dense

    def check(self) -> None:
        """Once weights are there: UserError, naming file and tensor, unless they describe matrices,
        of numbers that the model's dtype holds. Then lets go of files that are hardly used."""
        check_range(self._model, self._entries)
        for name, path in self._placed.items():
            module, layer = self._model.get_submodule(path), self._layers[name]
            owned = getattr(module, "weight_buffers", layer.parts)
            tensors = {part: attrgetter(part)(module) for part in owned}
            where = self._entries[f"{name}.{layer.main}"].file
            formats.check_tensors(name, layer, tensors, str(where))
        check_coded_range(self._model, self._entries)
        leave_files(self._model, tensor_bytes(self._entries))

    def _find(self, name: str) -> tuple[str, nn.Module] | None:
        """The module that the checkpoint calls `name`, after its path in the self._model."""
        for tensor in candidate_names(f"{name}.weight", self._model):
            path = tensor.removesuffix(".weight")
            try:
                return path, self._model.get_submodule(path)
            except AttributeError:
                continue
        return None

    def _place(self, name: str) -> None:
        """An empty module of the stored format in the place of one linear layer or embedding."""
        path, old = self._find(name) or ("", None)
        layer, weight = self._layers[name], None if old is None else weight_of(old)
        if isinstance(old, nn.Embedding) and layer.format in EMBEDDINGS:
            weight = old.weight
        fits = weight is not None and tuple(weight.shape) == layer.shape
        if old is None or not fits or stored_transposed(old) != layer.transposed:
            self._refuse(name, f"a linear layer or embedding {name} of {list(layer.shape)}", old)
        self._model.set_submodule(path, self._empty(name, old))
        # GPT-2 initialises projections from the module around them, by their weight.
        parent = self._model.get_submodule(path.rpartition(".")[0])
        if not (parent._parameters or parent._buffers):
            parent._is_hf_initialized = True
        self._placed[name] = path

    def _tie(self) -> None:
        """Modules that are tied to one of stored rows read their weight from it, and transformers
        is not to tie parameters that they do not have."""
        owners = {
            f"{path}.weight": name
            for name, path in self._placed.items()
            if self._layers[name].format in EMBEDDINGS
        }
        if not owners:
            return
        model = self._model
        for target, source in list(model.all_tied_weights_keys.items()):
            if target not in owners and source not in owners:
                continue
            del model.all_tied_weights_keys[target]
            if target in owners and source in owners:
                continue  # the checkpoint holds both
            name = owners.get(source) or owners[target]
            other = (target if source in owners else source).removesuffix(".weight")
            weight = f"{other}.weight"
            beside = next((t for t in self._entries if weight in candidate_names(t, model)), None)
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

    def _stacked(self, name: str) -> tuple[str, str]:
        """Where the layer `name`, X.<expert>, belongs: the path of the fused experts, and
        `<projection>.<expert>`."""
        tensor, _, number = name.rpartition(".")
        for parameter in candidate_names(tensor, self._model):
            path, _, projection = parameter.rpartition(".")
            try:
                module = self._model.get_submodule(path)
            except AttributeError:
                continue
            if experts.is_fused(module) and projection in experts.projections(module):
                return path, f"{projection}.{number}"
        self._refuse(name, f"experts with a parameter {tensor}", None)

    def _place_experts(self, path: str, names: Mapping[str, str]) -> None:
        """Empty `SparseExperts` in the place of the fused experts module at `path`.

        names: the layers by `<expert>.<projection>` or `<projection>.<expert>`.
        """
        old = self._model.get_submodule(path)
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
        self._model.set_submodule(path, SparseExperts(old, made))

    def _empty(self, name: str, old: nn.Module, tied_to: StoredWeight | None = None) -> nn.Module:
        """What stands for `old`, a linear layer or embedding, with the weight of layer `name`."""
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
