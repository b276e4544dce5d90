"""Where a pruned checkpoint goes: all of it or nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from pyprune.checkpoint.files import nearest_folder
from pyprune.checkpoint.originals import Originals
from pyprune.checkpoint.source import INDEX, Checkpoint, read_json
from pyprune.errors import UserError
from pyprune.packaged import RECEIPT

REPORT = "pyprune.json"
CARD = "README.md"
MAX_SHARD_SIZE = "5GB"
# What a checkpoint consists of besides its weights. Anything else (pickles, other formats,
# training states, logs) is left behind.
AUXILIARY_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".md")
AUXILIARY_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
TEMPLATES = "additional_chat_templates"  # a directory of .jinja files
# Of another checkpoint's weights: its report and card, and the packaged model's sizes of its files.
NOT_AUXILIARY = (REPORT, CARD, RECEIPT)
_DIGITS = re.compile("[0-9a-f]{16}")  # at the end of a temporary directory's name
# Room for configuration, tokenizer and the report, when free space is checked in advance.
AUXILIARY_BYTES = 64 << 20


@contextmanager
def output_directory(path: str | Path, *, needed: int = 0) -> Iterator[Path]:
    """Yields a new directory beside `path` that becomes `path` when the block ends well.

    After an exception or an interrupt it is removed, and `path` is as it was. needed: bytes that
    will be written, checked against the free space first.

    Raises UserError if `path` exists (now or at the end) and is anything but an empty directory, if
    it cannot be created, if the disk is or becomes full (with the bytes needed and free), or if a
    file grows beyond what is allowed.
    """
    final = Path(path).expanduser().absolute()
    check_output(final)
    # Named before it exists: whenever an interrupt comes, it is known what to remove.
    temporary = final.parent / f"{_prefix(final)}{secrets.token_hex(8)}"
    missing = [folder for folder in final.parents if not folder.exists()]
    try:
        _make_parents(final.parent)
        check_space(final.parent, needed)
        temporary.mkdir()
        yield temporary
        _share(temporary)
        _sync_tree(temporary)
        check_output(final)  # somebody else may have been quicker
        temporary.rename(final)
        _sync(final.parent)
    except BaseException as error:
        refused = _refused(error, final.parent, needed, temporary)
        _remove(temporary, missing)
        if refused is not None:
            raise refused from error
        raise


def _share(folder: Path) -> None:
    """Gives every file the permissions of one that was just created: safetensors lets nobody but
    the owner read what it writes, and another user may be the one who serves the model."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode | mode)


def _remove(temporary: Path, parents: list[Path]) -> None:
    """Removes what was written, and those of `parents` (innermost first) that nobody else has put
    something into. A second Ctrl-C does not stop it halfway: the first is on its way already."""
    while True:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in parents:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()
            return
        except KeyboardInterrupt:
            continue


def _prefix(final: Path) -> str:
    """What the names of the temporary directories of `final` begin with, short enough to have 16
    digits behind it in any name's 255 bytes."""
    return f".{os.fsdecode(os.fsencode(final.name)[:200])}."


def unfinished(path: str | Path) -> list[Path]:
    """What runs that were killed left of the output directory `path`, or are writing just now."""
    final = Path(path).expanduser().absolute()
    prefix = _prefix(final)
    there = final.parent.iterdir() if final.parent.is_dir() else ()
    return sorted(
        folder for folder in there
        if folder.name.startswith(prefix) and _DIGITS.fullmatch(folder.name[len(prefix) :])
    )  # fmt: skip


def check_output(path: str | Path) -> None:
    """Raises UserError unless `path` can become an output directory: absent, or empty and such that
    another directory can take its place, in a directory that can be written to."""
    final = Path(path).expanduser().absolute()  # of "." is_mount would say that it is one
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise UserError(f"{path}: expected a new or an empty directory, got a file or a link")
    if final.is_dir() and any(final.iterdir()):
        raise UserError(f"{path}: expected a new or an empty directory, it is not empty")
    if final.is_dir() and (final.is_mount() or final.samefile(".")):
        what = "a mount point" if final.is_mount() else "the current directory"
        raise UserError(f"{path}: expected a new directory, got {what}; name one inside it")
    try:  # not os.access, which knows of permissions alone
        tempfile.TemporaryFile(dir=nearest_folder(final.parent)).close()
    except OSError as error:
        raise _uncreatable(final.parent, error) from error


def check_apart(path: str | Path, state: str | Path) -> None:
    """Raises UserError if `state`, where a run is saved, is the output directory `path` or inside
    it: that would not be empty when it is to be written."""
    final, saved = (Path(p).expanduser().resolve() for p in (path, state))
    if saved.is_relative_to(final):
        raise UserError(f"state: expected a place outside of the output {path}, got {state}")


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError if fewer than `needed` bytes are free in the file system of `folder`."""
    if shutil.disk_usage(folder).free < needed:
        raise _disk_full(folder, needed, None)


def _disk_full(folder: Path, needed: int, temporary: Path | None) -> UserError:
    free = shutil.disk_usage(folder).free
    if temporary is not None:  # what was written so far will be given back
        free += sum(file.stat().st_blocks * 512 for file in temporary.rglob("*") if file.is_file())
    words = f"{needed:,} bytes needed, {free:,} bytes free"
    if free >= needed:
        words += ", but no more files allowed (inodes), or a quota used up"
    return UserError(f"{folder}: disk full: {words}")


def _refused(error: BaseException, folder: Path, needed: int, temporary: Path) -> UserError | None:
    """What the file system said no to, in words for the user; None for other errors."""
    if not isinstance(error, (OSError, SafetensorError)):
        return None
    if _is_errno(error, errno.EFBIG):
        return UserError(
            f"{folder}: a file of the output is larger than the file system or `ulimit -f` allows"
        )
    if _is_errno(error, errno.ENOSPC) or _is_errno(error, errno.EDQUOT):
        return _disk_full(folder, needed, temporary)
    return None


def _is_errno(error: OSError | SafetensorError, number: int) -> bool:
    if isinstance(error, OSError):
        return error.errno == number
    return f"os error {number})" in str(error)


def _make_parents(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if _is_errno(error, errno.ENOSPC) or _is_errno(error, errno.EDQUOT):
            raise
        raise _uncreatable(folder, error) from error


def _uncreatable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot create the output there: {error.strerror}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(folder: Path) -> None:
    for file in sorted(folder.rglob("*")):
        _sync(file)
    _sync(folder)


def copy_auxiliary(checkpoint: Checkpoint, out_dir: Path, *, index: bool = True) -> None:
    """Copies what loading needs besides the weights: configuration, tokenizer, templates, and the
    model's own code if the checkpoint was opened with `trust_remote_code`.

    index: whether the index of sharded weights too, that is, whether the shards stay the same.
    """
    # Not rglob, which passes over directories that it may not list.
    files = [*checkpoint.path.iterdir()]
    templates = checkpoint.path / TEMPLATES
    files += templates.iterdir() if templates.is_dir() else []
    for file in sorted(files):
        relative = file.relative_to(checkpoint.path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or not file.is_file() or not _is_auxiliary(relative, checkpoint):
            continue
        if relative.name.endswith(".index.json") and not (index and relative == Path(INDEX)):
            continue
        target = out_dir / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _is_auxiliary(relative: Path, checkpoint: Checkpoint) -> bool:
    if len(relative.parts) > 1:
        return relative.suffix == ".jinja"
    if relative.name in NOT_AUXILIARY:
        return False
    if relative.suffix == ".py":
        return checkpoint.trust_remote_code
    return relative.suffix in AUXILIARY_SUFFIXES or relative.stem in AUXILIARY_NAMES


def write_report(out_dir: Path, report: Mapping[str, Any], card: str) -> None:
    """Writes pyprune.json and the model card. JSON has no NaN or infinity: they become null. Bytes
    of a path that are no text are escaped, in JSON's own way."""
    text = json.dumps(_finite(report), indent=2, ensure_ascii=False, allow_nan=False)
    for name, content in ((REPORT, text + "\n"), (CARD, card)):
        (out_dir / name).write_text(content, encoding="utf-8", errors="backslashreplace")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def save_stock(model: PreTrainedModel, folder: Path) -> None:
    """Writes weights and configuration as transformers does, which would have the configuration
    say the dtype of the first parameter instead of the model's."""
    dtype = model.config.dtype
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    if dtype is not None and model.config.dtype != dtype:
        model.config.dtype = dtype
        model.config.save_pretrained(folder)


@contextmanager
def changed_model(
    checkpoint: Checkpoint,
    originals: Originals,
    model: PreTrainedModel,
    path: str | Path,
    save: Callable[[PreTrainedModel, Path], None] = save_stock,
) -> Iterator[Path]:
    """Saves `model`, loaded from `checkpoint` and changed since `originals` were noted, in the
    dtypes of the checkpoint and with what else it consists of; yields the directory, to which the
    report still has to be added, before it becomes `path` (all or nothing). save: writes weights
    and configuration into it. UserError: see `Originals.restore`."""
    originals.restore(model)
    with output_directory(path, needed=_bytes(model) + AUXILIARY_BYTES) as out_dir:
        copy_auxiliary(checkpoint, out_dir, index=False)
        save(model, out_dir)
        yield out_dir


def earlier_report(checkpoint: Checkpoint) -> dict[str, Any]:
    """What an earlier pruning or healing left in the checkpoint; {} if there was none."""
    file = checkpoint.path / REPORT
    return read_json(file) if file.exists() else {}


def _bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
