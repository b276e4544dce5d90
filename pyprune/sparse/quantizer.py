"""What transformers calls while it loads a compressed checkpoint.

Imported while transformers itself is being imported: everything else of pyprune comes in later, in
the methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyprune.errors import UserError

if TYPE_CHECKING:
    from pyprune.checkpoint import TensorEntry
    from pyprune.sparse.format import LayerFormat

METHOD = "pyprune"


class PyPruneConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of config.json; see docs/format.md."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = METHOD


class PyPruneQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty `SparseLinear` layers into the model before its weights are read, so that these
    go straight to their layers, and checks them afterwards."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._layers: dict[str, LayerFormat] = {}
        self._entries: dict[str, TensorEntry] = {}
        self._placed: dict[str, str] = {}

    def update_attn_implementation(self, config: Any) -> Any:
        # The advice for those without pyprune stands where a file name could; see docs/format.md.
        if getattr(config, "transformers_weights", None) is not None:
            del config.transformers_weights
        return config

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        from pyprune.checkpoint import read_header
        from pyprune.sparse import format as formats

        if not checkpoint_files:
            raise UserError("expected the safetensors files of a compressed checkpoint, got none")
        folder = Path(checkpoint_files[0]).parent
        fields = self.quantization_config.to_dict()
        self._layers = formats.parse_quantization_config(fields, str(folder / "config.json"))
        self._entries = {}
        for file in checkpoint_files:
            self._entries |= read_header(Path(file))
        for name, layer in self._layers.items():
            parts = formats.check_entries(name, layer, self._entries, folder)
            self._placed[name] = self._place(model, name, layer, parts)

    def _place(
        self, model: Any, name: str, layer: LayerFormat, parts: Mapping[str, TensorEntry]
    ) -> str:
        from pyprune.sparse.linear import SparseLinear

        where = parts["values"].file
        prefix = model.base_model_prefix
        for path in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            try:
                old = model.get_submodule(path)
            except AttributeError:
                continue
            if type(old) is not nn.Linear or tuple(old.weight.shape) != layer.shape:
                raise UserError(
                    f"{where}: tensor {name}.values: expected an nn.Linear of {list(layer.shape)} "
                    f"in the model, got {old}"
                )
            new = SparseLinear(
                old.in_features,
                old.out_features,
                layer.format,
                bias=old.bias is not None,
                nnz=parts["values"].shape[0],
                dtype=old.weight.dtype,
                device="meta",
            )
            model.set_submodule(path, new)
            return path
        raise UserError(f"{where}: tensor {name}.values: the model has no layer {name}")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from pyprune.sparse import format as formats

        for name, path in self._placed.items():
            module = model.get_submodule(path)
            tensors = {part: getattr(module, part) for part in module.weight_buffers}  # type: ignore[union-attr]
            where = self._entries[f"{name}.values"].file
            formats.check_tensors(name, self._layers[name], tensors, str(where))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True
