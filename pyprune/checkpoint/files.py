"""Files of a run's own (states, pictures, what waits on disk): written whole, and what the file
system says to it in words for the user."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pyprune.errors import UserError

# safetensors has no errno, only words.
_IO_ERROR = re.compile(r"I/O error: (.*) \(os error \d+\)")


def check_writable(folder: Path, option: str) -> None:
    """Raises UserError, before any work is done, unless files can be made in the directory `folder`
    that `option` needs."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{option}: cannot write into {folder}: {error.strerror}") from error


def nearest_folder(path: Path) -> Path:
    """`path` if something is there, else the innermost of its parents that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


@contextmanager
def writing(option: str, folder: str | Path) -> Iterator[None]:
    """Raises UserError, naming `option`, for what the file system refuses while the block writes
    into `folder`: no space left, for one."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: cannot write into {folder}: {error.strerror}") from error
    except SafetensorError as error:
        refused = _IO_ERROR.search(str(error))
        if refused is None:
            raise
        raise UserError(f"{option}: cannot write into {folder}: {refused[1]}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Makes the file `path` by `write`, which is given another name in the same directory: whatever
    happens, it is the one before or the new one, whole. After an exception nothing else is left."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
