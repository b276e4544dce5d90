"""LoRA, and other adapters of peft, beside compressed layers.

    from pyprune.integrations.peft import beside_compressed

    config = beside_compressed(LoraConfig(target_modules=["q_proj", "v_proj"]))
    model = get_peft_model(pyprune.load(DIR), config)

The adapter stays beside the compressed weight, which gets no gradient. It cannot be merged into it:
W + B A has no zeros. What should be one sparse matrix again is healed dense: `pyprune decompress`,
`pyprune heal` (whose low-rank change leaves the zeros alone), `pyprune compress`.
"""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import Linear

from pyprune.errors import UserError
from pyprune.sparse.factored import FactoredLinear
from pyprune.sparse.linear import SparseLinear


class CompressedLora(Linear):  # type: ignore[misc]
    """`y = layer(x) + scale * B A x`, the layer a `SparseLinear` or `FactoredLinear`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():  # of a class that peft does not know, which is this one's
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            super().__init__(*args, **kwargs)

    def merge(self, *_args: Any, **_kwargs: Any) -> None:
        kind = type(self.get_base_layer()).__name__
        raise UserError(
            f"merge: a {kind} has no dense weight to merge into; expected the adapter to stay "
            "beside it, or a model healed dense (`pyprune decompress`, heal, compress)"
        )


def beside_compressed(config: LoraConfig) -> LoraConfig:
    """`config`, which from now on takes compressed layers as targets too. Saved adapters do not
    know of it: `PeftModel.from_pretrained(model, dir, config=beside_compressed(
    LoraConfig.from_pretrained(dir)))`."""
    config._register_custom_module(dict.fromkeys((SparseLinear, FactoredLinear), CompressedLora))
    return config
