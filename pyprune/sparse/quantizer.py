"""What transformers calls while it loads a compressed checkpoint.

Imported while transformers itself is being imported: everything else of pyprune comes in later,
with `pyprune.sparse.placement`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from functools import wraps
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pyprune.errors import UserError

if TYPE_CHECKING:
    from pyprune.sparse.placement import Placement

METHOD = "pyprune"


class PyPruneConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of config.json; see docs/format.md."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.quant_method = METHOD


class PyPruneQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty modules of the stored formats into the model before its weights are read, and
    checks them afterwards (`Placement`)."""

    requires_calibration = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._placement: Placement | None = None
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
        from pyprune.sparse.placement import Placement

        if not checkpoint_files:
            raise UserError("expected the safetensors files of a compressed checkpoint, got none")
        fields = self.quantization_config.to_dict()
        self._placement = Placement(model, fields, [Path(file) for file in checkpoint_files])
        self._dtypes = {name: t.dtype for name, t in _tensors(model) if t.is_floating_point()}
        self._shapes = {name: t.shape for name, t in _tensors(model)}

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._check_shapes(model)
        self._cast_as_planned(model)
        # It holds the model, which holds this.
        placement, self._placement = self._placement, None
        assert placement is not None
        placement.check()
        return model

    def _check_shapes(self, model: nn.Module) -> None:
        """transformers 5.6 compares no shapes where there is a quantizer, later versions do."""
        for name, tensor in _tensors(model):
            planned = self._shapes.get(name, tensor.shape)
            if tensor.shape != planned:
                raise RuntimeError(
                    f"mismatched: {name} has shape {list(tensor.shape)}, expected {list(planned)}"
                )

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
