"""What a run needs to go on after its last shot: a directory of weights and a manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyprune.calibration.tokens import TokenSet
from pyprune.checkpoint import replace_file, writing
from pyprune.config import ConfigFile
from pyprune.errors import UserError
from pyprune.models.fingerprint import fingerprint

SCHEMA = 1
MANIFEST = "state.json"
# What a run that is killed in its first `save` leaves before there is a manifest.
_OWN = re.compile(r"shot-1\.safetensors|\.shot-1\.safetensors\.tmp|\.state\.json\.tmp")


@dataclass
class Record:
    """Of one matrix, over the shots so far.

    loss: rise of the loss that the curvature predicts, nats per token, summed over the shots.
    damping, gradient_damping (of A and G), tokens, dead_inputs, iterations, gap (see
    `methods.Solution`), notes: of the last shot. kept: why it keeps what it has, if it does.
    """

    loss: float = 0.0
    damping: float | None = None
    gradient_damping: float | None = None
    tokens: float = 0.0
    dead_inputs: int = 0
    iterations: int | None = None
    gap: float | None = None
    notes: list[str] = field(default_factory=list)
    kept: str = ""


@dataclass
class ShotsDone:
    """shots: done. records: by matrix. notes: of the run so far."""

    shots: int = 0
    records: dict[str, Record] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class State:
    """A directory that holds the weights (and other tensors of the run) after the last shot and
    says whose they are.

    The manifest is replaced last and in one step: whenever a run is interrupted, it names weights
    that are complete.
    """

    def __init__(
        self, folder: str | Path, model: nn.Module, config: ConfigFile, tokens: TokenSet
    ) -> None:
        self.folder = Path(folder)
        # As JSON gives it back, so that it can be compared.
        self._identity: dict[str, Any] = json.loads(
            json.dumps(
                {
                    "schema": SCHEMA,
                    "model": fingerprint(model),
                    "calibration": tokens.sha256,
                    "config": config.to_dict(),
                }
            )
        )

    def load(self, parameters: Mapping[str, Tensor]) -> ShotsDone:
        """What is done; `parameters` get the weights they had then.

        Raises UserError if the directory holds something else, or the state of another model, text
        or configuration.
        """
        if not self.folder.exists():
            return ShotsDone()
        manifest = self.folder / MANIFEST
        if not self.folder.is_dir() or (not manifest.exists() and self._foreign()):
            raise UserError(
                f"state: expected an empty directory or that of an interrupted run, "
                f"got {self.folder}"
            )
        if not manifest.exists():
            return ShotsDone()
        try:
            values = json.loads(manifest.read_text(encoding="utf-8"))
            self._check(values)
            records = {name: Record(**record) for name, record in values["records"].items()}
            file = self.folder / values["weights"]
            progress = ShotsDone(values["shots"], records, values["notes"])
        except (ValueError, KeyError, TypeError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"state: {manifest} cannot be read: {error!r}") from error
        try:
            weights = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"state: {file} cannot be read: {error!r}") from error
        if weights.keys() != parameters.keys():
            raise UserError(f"state: {self.folder} holds other matrices than the model's")
        for name, value in parameters.items():
            value.copy_(weights[name])
        return progress

    def _foreign(self) -> bool:
        return any(not _OWN.fullmatch(path.name) for path in self.folder.iterdir())

    def _check(self, values: Mapping[str, Any]) -> None:
        words = {"schema": "version of pyprune", "model": "model", "calibration": "text"}
        for key, word in words.items():
            if values[key] != self._identity[key]:
                raise UserError(
                    f"state: {self.folder} belongs to another {word}: expected {key} "
                    f"{self._identity[key]}, got {values[key]}"
                )
        mine, others = self._identity["config"], values["config"]
        if mine != others:
            changed = [key for key in mine if others.get(key) != mine[key]]
            raise UserError(
                f"state: {self.folder} belongs to another configuration: "
                + ", ".join(f"{k} is {mine[k]} here and {others.get(k)} there" for k in changed)
            )

    def save(self, progress: ShotsDone, parameters: Mapping[str, Tensor]) -> None:
        """Raises UserError for what the file system refuses; what was saved before stays then."""
        with writing("state", self.folder):
            self._save(progress, parameters)

    def _save(self, progress: ShotsDone, parameters: Mapping[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"shot-{progress.shots}.safetensors"
        weights = {key: value.cpu().contiguous() for key, value in parameters.items()}
        replace_file(self.folder / name, lambda path: save_file(weights, path))
        manifest = {
            **self._identity,
            "shots": progress.shots,
            "weights": name,
            "records": {key: asdict(record) for key, record in progress.records.items()},
            "notes": progress.notes,
        }
        text = json.dumps(manifest, indent=1) + "\n"
        replace_file(self.folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))
        for old in self.folder.glob("shot-*.safetensors"):
            if old.name != name:
                old.unlink()
