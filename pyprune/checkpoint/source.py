"""A Hugging Face checkpoint: found, checked, and turned into an empty or a filled model."""

from __future__ import annotations

import json
import logging
import textwrap
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pyprune.checkpoint.names import NameMap, map_names
from pyprune.checkpoint.shards import TensorEntry, read_header, read_headers, unique
from pyprune.devices import find_dtype
from pyprune.errors import UserError
from pyprune.models.adapter import has_encoder

logger = logging.getLogger("pyprune")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUFFIX = ".safetensors"
GGUF_SUFFIX = ".gguf"
GGUF_HINT = "GGUF is not read: give the Hugging Face directory that it was made from"
ADAPTER = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.spm")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
UNKNOWN = "unknown architecture"
DECI = "nemotron-nas"  # the model_type of DeciLM, see pyprune.deci
# What transformers raises for a configuration that it does not know or that contradicts itself.
CANNOT_BUILD = (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
# Fetched from the hub: never pickles, and nothing from the sub-folders that some repositories use
# for other formats of the same weights.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm")
HUB_IGNORED = ("*/*", "consolidated*", "*.bin.index.json")
CODE_PATTERN = "*.py"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A directory with config.json and safetensors whose headers have all been checked.

    tensors: by checkpoint name. dtype: the floating dtype that holds most of the bytes.
    """

    path: Path
    config: PretrainedConfig
    dtype: torch.dtype
    tensors: dict[str, TensorEntry]
    trust_remote_code: bool = False

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Checkpoint:
        """Opens a local directory, or else downloads the hub repository of that id.

        Raises UserError for a missing directory or repository, pickled, missing, truncated or
        corrupt weights, a config.json that does not parse, a quantized checkpoint, and an
        architecture that transformers has no causal language model for.
        """
        path = locate(source, revision, code=trust_remote_code)
        raw = read_json(path / "config.json")
        quantization = raw.get("quantization_config")
        if quantization is not None:
            described = isinstance(quantization, dict)
            method = quantization.get("quant_method", "unknown") if described else "unknown"
            raise UserError(
                f"{path}: expected floating point weights, got a checkpoint quantized by {method}"
                + ("; `pyprune decompress` makes it dense" if method == "pyprune" else "")
            )
        tensors = read_tensors(path)
        config = read_config(path, raw, trust_remote_code)
        return cls(path, config, main_dtype(path, tensors), tensors, trust_remote_code)

    @cached_property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({entry.file for entry in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def build_model(
        self, device: str | torch.device = "meta", dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """The model without its weights: parameters on the meta device, the buffers that are not
        part of a checkpoint (rotary frequencies, embedding scales) computed, on the CPU.

        With another `device` than meta this is `load_model`. dtype: of the parameters; the
        checkpoint's own by default.
        """
        if torch.device(device).type != "meta":
            return self.load_model(device=device, dtype=dtype)
        try:
            # A copy: from_config writes the dtype into the config it is given.
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    deepcopy(self.config),
                    dtype=dtype or self.dtype,
                    trust_remote_code=self.trust_remote_code,
                )
            model.tie_weights()
            _compute_buffers(model)
        # A configuration that contradicts itself, or meta tensors that are asked for their values.
        except CANNOT_BUILD as error:
            raise UserError(
                f"{self.path}: {type(self.config).__name__} cannot be built: {_line(error)}"
            ) from error
        model.requires_grad_(False)
        return model.eval()

    def load_model(
        self, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
    ) -> PreTrainedModel:
        """The whole model in memory, through transformers' own loading.

        Raises UserError if the checkpoint lacks a parameter (transformers would fill it with
        random numbers), or `dtype` is not a floating point one or the name of one.
        """
        compute = find_dtype(dtype)
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                self.path,
                config=deepcopy(self.config),
                dtype=compute or self.dtype,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
            )
        except CANNOT_BUILD as error:  # shapes that differ, for one
            # Of shapes transformers says no more than that they are listed "above", in its log.
            reason = self.streaming_obstacle() if "mismatched" in str(error) else ""
            raise UserError(f"{self.path}: cannot be loaded: {reason or _line(error)}") from error
        if info["missing_keys"]:
            names = sorted(info["missing_keys"])
            raise UserError(f"{self.path}: {len(names)} tensors are missing, among them {names[0]}")
        return model.to(device).eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer; UserError if it has none that loads."""
        return load_tokenizer(self.path, self.trust_remote_code)

    @cached_property
    def names(self) -> NameMap:
        """Which tensors make up each parameter of the model."""
        return map_names(self.tensors, self.build_model())

    def streaming_obstacle(self) -> str:
        """Why the checkpoint cannot be pruned block by block from its files; empty if it can.

        Such a checkpoint is loaded and saved whole, by transformers.
        """
        try:
            return self.names.problem
        except UserError as error:
            return str(error)


def load_tokenizer(path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a directory; UserError if it has none that loads.

    Where no file of one is there, transformers may make one of nothing but the special tokens of
    the model's family, for which every text is empty: that is none either.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, ImportError, LookupError, TypeError, AttributeError) as error:
        # transformers asks for packages that read other formats even where there is no file at all.
        there = any(f.is_file() for pattern in TOKENIZER_FILES for f in Path(path).glob(pattern))
        reason = _line(error) if there else "its files are missing (tokenizer.json, for one)"
        raise UserError(f"{path}: its tokenizer does not load: {reason}") from error
    if not tokenizer.get_vocab().keys() - tokenizer.all_special_tokens:
        raise UserError(
            f"{path}: its tokenizer does not load: its files are missing, without them "
            f"{type(tokenizer).__name__} has special tokens alone"
        )
    return tokenizer


def _line(error: Exception) -> str:
    """What an exception of another library says, on one line of bearable length."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 300)


def locate(source: str | Path, revision: str | None = None, *, code: bool = False) -> Path:
    """The local directory, or the one that the hub repository of this id is downloaded to.

    code: whether the model code that comes with it too. Raises UserError if there is neither.
    """
    text = str(source)
    if not text:  # as a path it would be the current directory
        raise UserError("model: expected a directory or a hub id, got ''")
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{text}: expected a directory or a hub id, got a file{_of_file(path)}")
    if "://" in text:
        raise UserError(f"{text}: expected a directory or a hub id such as org/model, got a URL")
    if isinstance(source, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise UserError(f"{text}: no such directory")
    return _download(text, revision, code)


def _of_file(path: Path) -> str:
    """What to do with a file of weights that was given in place of its directory."""
    if path.suffix == SUFFIX:
        return "; give the directory in which it and config.json are"
    if path.suffix == GGUF_SUFFIX:
        return f"; {GGUF_HINT}"
    return ""


def _download(repository: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[*HUB_PATTERNS, *([CODE_PATTERN] if code else [])],
                ignore_patterns=list(HUB_IGNORED),
            )
        )
    except HFValidationError as error:
        raise UserError(f"{repository}: no such directory, and no valid hub id") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{repository}: no such directory, and the hub did not give it: {_line(error)}"
        ) from error
    if not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        raise UserError(
            f"{repository}: expected {WEIGHTS} or {INDEX}, the hub's repository has neither; "
            "pickled weights, which can run code when read, are never fetched"
        )
    return path


def read_json(file: Path, *, once: bool = False) -> dict[str, Any]:
    """The object in a file. once: no name may be twice in one object. Raises UserError."""
    if not file.is_file():
        folder = file.parent
        hint = ""
        if (folder / ADAPTER).is_file():
            hint = "; an adapter of peft: merge it into its model (merge_and_unload) and save that"
        elif folder.is_dir() and any(f.suffix == GGUF_SUFFIX for f in folder.iterdir()):
            hint = f"; {GGUF_HINT}"
        raise UserError(
            f"{folder}: expected a Hugging Face checkpoint, it has no {file.name}{hint}"
        )
    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=unique if once else None)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: expected JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(value).__name__}")
    return value


def read_tensors(path: Path) -> dict[str, TensorEntry]:
    """The headers of every weight file, checked against the index if there is one."""
    index = path / INDEX
    if not index.is_file():
        weights = path / WEIGHTS
        if not weights.is_file():
            raise UserError(_no_weights(path))
        return read_header(weights)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected a weight_map from tensor to file")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise UserError(f"{index}: {name!r} is no file name")
        if not name.endswith(SUFFIX):  # transformers takes any other file for a pickle
            raise UserError(f"{index}: {name!r} is no name of a {SUFFIX} file")
    names = sorted(set(weight_map.values()))
    if WEIGHTS not in names and (path / WEIGHTS).is_file():
        raise UserError(
            f"{path}: expected {WEIGHTS} or {INDEX}, got both, and transformers reads the first"
        )
    for name in names:
        if not (path / name).is_file():
            raise UserError(f"{path}: {name} is missing; the index says that it holds weights")
    tensors = read_headers(path / name for name in names)
    for tensor, name in weight_map.items():
        if tensor not in tensors or tensors[tensor].file.name != name:
            raise UserError(f"{path / name}: tensor {tensor} is missing; the index has it there")
    return tensors


def _no_weights(path: Path) -> str:
    pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLE_SUFFIXES)
    if pickles:
        return (
            f"{path}: only pickled weights ({pickles[0]}), which can run code when read; "
            f"expected {WEIGHTS}. Convert them with save_pretrained on a machine you can spare"
        )
    return f"{path}: no weights: expected {WEIGHTS} or {INDEX}"


def read_config(path: Path, raw: dict[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    kind = raw.get("model_type")
    if kind == DECI and not trust_remote_code:
        raise UserError(
            f"{path}: a DeciLM checkpoint, which transformers has no model for: `pyprune "
            "decompress` makes it a stock one"
        )
    if "auto_map" in raw and not trust_remote_code:
        logger.info("%s brings its own model code, which is not run", path)
    try:
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    # An AttributeError: torch has no dtype of that name.
    except (StrictDataclassError, *CANNOT_BUILD, AttributeError, OSError) as error:
        known = isinstance(kind, str) and kind in CONFIG_MAPPING
        what = "a configuration that cannot be used" if known else UNKNOWN
        raise UserError(f"{path}: {what}: model_type {kind!r} ({_line(error)})") from error
    remote = trust_remote_code and "AutoModelForCausalLM" in raw.get("auto_map", {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise UserError(
            f"{path}: {UNKNOWN}: transformers has no causal language model for model_type {kind!r}"
        )
    if not remote and has_encoder(config):
        named = ", ".join(map(str, raw.get("architectures") or [kind]))
        raise UserError(f"{path}: expected a decoder-only language model, got an encoder ({named})")
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:  # transformers builds a model of no layers
        raise UserError(
            f"{path / 'config.json'}: num_hidden_layers: expected 1 or more, got {layers}"
        )
    return config


def main_dtype(path: Path, tensors: dict[str, TensorEntry]) -> torch.dtype:
    """The floating dtype that holds most of the bytes. UserError if there is none of 16 bits or
    more, or a matrix of weights is of another kind: its numbers want scales that nobody reads."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in tensors.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.nbytes
    if not sizes:
        raise UserError(f"{path}: expected floating point weights, its tensors are all integers")
    dtype = sizes.most_common(1)[0][0]
    if dtype.itemsize < 2:
        raise UserError(f"{path}: expected 16, 32 or 64 bit weights, got {dtype}")
    for name, entry in tensors.items():
        wide = entry.dtype.is_floating_point and entry.dtype.itemsize >= 2
        if name.endswith(".weight") and len(entry.shape) > 1 and not wide:
            raise UserError(f"{path}: {name}: expected 16, 32 or 64 bit weights, got {entry.dtype}")
    return dtype


def _compute_buffers(model: PreTrainedModel) -> None:
    """Gives the non-persistent buffers of a meta model their values.

    transformers itself builds every model on the meta device and then has each module initialise
    what no checkpoint holds; the same is done here, on parameters that stay meta (where
    initialising costs nothing) and buffers that are real.
    """
    for module in model.modules():
        module._is_hf_initialized = False
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _uncomputed(buffer)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    model.initialize_weights()
    for name, buffer in _non_persistent(model):
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UserError(f"{type(model).__name__}: cannot compute its buffer {name}")


def _uncomputed(buffer: torch.Tensor) -> torch.Tensor:
    """NaN where the dtype has it, so that a buffer that nothing fills is noticed."""
    value = torch.zeros_like(buffer, device="cpu")
    return value.fill_(float("nan")) if value.is_floating_point() else value


def _non_persistent(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = []
    for prefix, module in model.named_modules():
        for name in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[name]
            if buffer is not None:
                found.append((f"{prefix}.{name}".lstrip("."), buffer))
    return found
