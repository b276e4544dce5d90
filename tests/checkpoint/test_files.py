"""Files are the old ones or the new ones, and what the file system refuses is one line."""

import errno
import os

import pytest
import torch
from limited_files import limited_files
from safetensors import SafetensorError
from safetensors.torch import save_file

from pyprune.checkpoint import replace_file, writing
from pyprune.errors import UserError


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    file = tmp_path / "a.json"
    replace_file(file, lambda path: path.write_text("old"))
    assert file.read_text() == "old"

    def half(path):
        path.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace_file(file, half)
    assert file.read_text() == "old"
    replace_file(file, lambda path: path.write_text("new"))
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("write", [
    lambda path: path.write_text("x" * 5000),
    lambda path: save_file({"x": torch.zeros(5000)}, path),
], ids=["text", "safetensors"])  # fmt: skip
def test_what_the_file_system_refuses_is_the_users(tmp_path, write):
    with (
        pytest.raises(UserError, match=f"state: cannot write into {tmp_path}: File too large$"),
        limited_files(1000),
        writing("state", tmp_path),
    ):
        replace_file(tmp_path / "a", write)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(SafetensorError, match="no such tensor"), writing("state", tmp_path):
        raise SafetensorError("no such tensor")
    with pytest.raises(UserError, match="No space left on device"), writing("state", tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
