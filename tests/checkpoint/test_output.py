"""An output directory appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tiny_models import tiny_model

from pyprune.checkpoint import (
    Checkpoint,
    check_apart,
    check_output,
    copy_auxiliary,
    output_directory,
    unfinished,
    write_report,
)
from pyprune.errors import UserError


class Full(OSError):
    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "No space left on device")


def test_success(tmp_path):
    with output_directory(tmp_path / "new" / "out") as folder:
        assert not (tmp_path / "new" / "out").exists()
        assert folder.parent == tmp_path / "new"
        (folder / "a").write_text("x")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new" / "out" / "a").read_text() == "x"
    (tmp_path / "plain").mkdir()
    mode = stat.S_IMODE((tmp_path / "new" / "out").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_files_are_for_whoever_may_read_new_ones(tmp_path, umask):
    before = os.umask(umask)
    try:
        with output_directory(tmp_path / "out") as folder:
            save_file({"w": torch.zeros(2)}, folder / "model.safetensors")
            (folder / "code.py").touch(0o755)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    assert modes == {"model.safetensors": 0o666 & ~umask, "code.py": 0o755 & ~umask}


def test_an_empty_directory_is_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with output_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "out" / "a").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, UserError])
def test_nothing_stays_after_a_failure(tmp_path, error):
    with (
        pytest.raises(error),
        output_directory(tmp_path / "new" / "deep" / "out") as folder,
    ):
        (folder / "a").write_text("x")
        raise error("x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "link", "full"])
def test_refuses_what_is_there(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("precious")
    elif kind == "link":
        out.symlink_to(tmp_path / "elsewhere")
    else:
        out.mkdir()
        (out / "precious").write_text("precious")
    with pytest.raises(UserError, match="expected a new or an empty directory"):
        output_directory(out).__enter__()
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert kind != "full" or (out / "precious").read_text() == "precious"


def test_refuses_what_no_directory_can_replace(tmp_path, monkeypatch):
    """Renaming onto a mount point fails, after all the work; the shell that sits in the current
    directory would go on seeing the empty one."""
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    for same in (".", "", tmp_path / "out"):
        with pytest.raises(UserError, match="got the current directory; name one inside it"):
            check_output(same)
    monkeypatch.chdir(tmp_path)
    check_output("out")
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "out")
    with pytest.raises(UserError, match="out: expected a new directory, got a mount point"):
        check_output("out")


def test_parent_is_a_file(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(UserError, match="cannot create the output there"):
        output_directory(tmp_path / "a" / "out").__enter__()


def test_a_directory_that_cannot_be_made_is_found_in_advance():
    """Methods that remove structure write only after their search."""
    for path in ("/proc/out", "/proc/new/out"):
        with pytest.raises(UserError, match="cannot create the output there"):
            check_output(path)


def test_too_little_space_is_found_in_advance(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match=r"disk full: [\d,]+ bytes needed, [\d,]+ bytes free"):
        output_directory(tmp_path / "new" / "out", needed=2 * free).__enter__()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [Full(), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_disk_full_while_writing(tmp_path, error):
    with (
        pytest.raises(UserError, match=r"disk full: 1,000 bytes needed, .*but no more files"),
        output_directory(tmp_path / "out", needed=1000) as folder,
    ):
        (folder / "a").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_file_too_large(tmp_path):
    with (
        pytest.raises(UserError, match="larger than the file system or `ulimit -f` allows"),
        output_directory(tmp_path / "new" / "out"),
    ):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    assert list(tmp_path.iterdir()) == []


def test_what_appeared_meanwhile_stays(tmp_path):
    out = tmp_path / "new" / "out"
    with (
        pytest.raises(UserError, match="expected a new or an empty directory, it is not empty"),
        output_directory(out) as folder,
    ):
        (folder / "a").write_text("mine")
        out.mkdir()
        (out / "a").write_text("theirs")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["out"]
    assert (out / "a").read_text() == "theirs"


def test_a_second_interrupt_does_not_stop_the_cleaning_up(tmp_path, monkeypatch):
    remove, interrupts = shutil.rmtree, []

    def interrupted(folder, **options):
        if not interrupts:
            interrupts.append(folder)
            raise KeyboardInterrupt
        remove(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with (
        pytest.raises(KeyboardInterrupt, match="first"),
        output_directory(tmp_path / "new" / "out") as folder,
    ):
        (folder / "a").write_text("x")
        raise KeyboardInterrupt("first")
    assert len(interrupts) == 1 and list(tmp_path.iterdir()) == []


def test_other_write_errors_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="Input/output"), output_directory(tmp_path / "out"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert list(tmp_path.iterdir()) == []


def test_a_name_as_long_as_names_may_be(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        with output_directory(tmp_path / name) as folder:
            (folder / "a").write_text("x")
            assert unfinished(tmp_path / name) == [folder]
        assert (tmp_path / name / "a").read_text() == "x"


def test_what_a_killed_run_left_is_found(tmp_path):
    assert unfinished(tmp_path / "new" / "out") == unfinished(tmp_path / "out") == []
    context = output_directory(tmp_path / "out")
    killed = context.__enter__()
    for name in (".out", ".out.txt", ".other.0123456789abcdef", ".out.2.0123456789abcdef"):
        (tmp_path / name).mkdir()
    assert unfinished(tmp_path / "out") == [killed]
    with output_directory(tmp_path / "out") as folder:
        (folder / "a").write_text("x")
    assert (tmp_path / "out" / "a").exists() and killed.exists()  # it may not be dead


@pytest.mark.parametrize("state", ["out", "out/state", "./new/../out/state", "link/state"])
def test_a_state_inside_the_output_is_refused(tmp_path, monkeypatch, state):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("out")
    with pytest.raises(UserError, match="state: expected a place outside of the output out, got"):
        check_apart("out", state)
    for apart in ("state", "out2", "outer/out", "."):
        check_apart("out", apart)


def source(folder: Path) -> Path:
    tiny_model("llama").save_pretrained(folder, max_shard_size="20KB")
    for name in (
        "tokenizer.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "LICENSE",
        "LICENSE.txt",
        "code.py",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "optimizer.pt",
        "model.gguf",
        "README.md",
        "pyprune.json",
        "pyprune-source.json",
        ".hidden.json",
    ):
        (folder / name).write_text(name)
    for sub in ("additional_chat_templates/tool.jinja", "onnx/config.json", ".git/x.json"):
        (folder / sub).parent.mkdir()
        (folder / sub).write_text(sub)
    return folder


@pytest.mark.parametrize("trusted", [False, True])
def test_auxiliary_files(tmp_path, trusted):
    checkpoint = Checkpoint.open(source(tmp_path / "in"), trust_remote_code=trusted)
    (tmp_path / "out").mkdir()
    copy_auxiliary(checkpoint, tmp_path / "out")
    files = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*")}
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
        "chat_template.jinja",
        "LICENSE.txt",
        "additional_chat_templates/tool.jinja",
    }
    assert files == expected | ({"code.py"} if trusted else set())
    assert (tmp_path / "out" / "LICENSE").is_file()


def test_a_directory_that_may_not_be_listed_is_an_error(tmp_path, monkeypatch):
    """Its weights can be opened by their names: what else belongs to them must not go missing."""
    checkpoint = Checkpoint.open(source(tmp_path / "in"))
    (tmp_path / "out").mkdir()

    def refused(path="."):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, refused)
    with pytest.raises(PermissionError):
        copy_auxiliary(checkpoint, tmp_path / "out")


def test_bytes_that_are_no_text_are_escaped(tmp_path):
    name = os.fsdecode(b"m-\xff")
    write_report(tmp_path, {"model": name}, f"# {name}\n")
    assert json.loads((tmp_path / "pyprune.json").read_text(encoding="utf-8")) == {"model": name}
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# m-\\udcff\n"


def test_a_report_has_null_for_what_json_cannot_say(tmp_path):
    report = {"method": "wanda", "layers": [{"error": float("nan"), "sparsity": 0.5}]}
    write_report(tmp_path, report, "# Card\n")
    assert json.loads((tmp_path / "pyprune.json").read_text()) == {
        "method": "wanda",
        "layers": [{"error": None, "sparsity": 0.5}],
    }
    assert (tmp_path / "README.md").read_text() == "# Card\n"
