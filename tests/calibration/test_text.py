"""Text sources: what a document is, and what is said of files that cannot be read."""

import gzip
import json
import sys
import types

import pytest

from pyprune.calibration import text as text_module
from pyprune.calibration.text import documents
from pyprune.errors import UserError


def read(source) -> list[str]:
    return list(documents(source, "calibration"))


def test_txt_documents_are_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n\n  \nthrée\n\n", encoding="utf-8")
    assert read(path) == ["one\ntwo", "thrée"]


def test_txt_without_empty_lines_is_cut_into_bounded_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "PIECE", 8)
    path = tmp_path / "a.txt"
    path.write_text("abcdefghijkl" + "mno\n" * 3)
    parts = read(path)
    assert max(map(len, parts)) <= 2 * 8
    assert "".join(parts).replace("\n", "") == "abcdefghijklmnomnomno"


def test_jsonl_plain_and_gzip(tmp_path):
    lines = '{"text": "a\\nb", "id": 1}\n\n{"text": ""}\n'
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.jsonl.gz") == ["a\nb", ""]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8-sig")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress('\ufeff{"text": "three"}\n'.encode()))
    (tmp_path / "c.txt").write_text("\ufefffour \ufeff", encoding="utf-8")
    assert read(tmp_path) == ["one", "two", "three", "four \ufeff"]


@pytest.mark.parametrize(
    "bad",
    [
        '{"text": "a"', '{"txt": "a"}', '"text"', '{"text": 5}', "nan",
        r'{"text": "a \ud800 b"}', '{"text": 1' + "0" * 5000 + "}", "[" * 100_000,
    ],
    ids=range(8),
)  # fmt: skip
def test_malformed_jsonl_names_file_and_line(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + bad + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: expected"):
        read(path)


def test_directory_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "first"}))
    (tmp_path / "sub" / "c.txt").write_text("third")
    (tmp_path / "readme.md").write_text("not text")
    assert read(tmp_path) == ["first", "second", "third"]


def test_unreadable_sources(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-12])
    garbled = gzip.compress(b"a" * 999, mtime=0)[:10] + b"\xff" * 99  # no such kind of block
    (tmp_path / "garbled.txt.gz").write_bytes(garbled)
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("latin.txt", "expected UTF-8"),
        ("cut.jsonl.gz", "cannot be read"),
        ("table.csv", "expected a file named"),
        ("empty", "holds no"),
        ("missing.txt", "does not exist"),
        ("garbled.txt.gz", "cannot be read"),
        ("/dev/null", "which is neither"),
    ]:
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    with pytest.raises(UserError, match="expected a name or a path"):
        read("")


def hub(monkeypatch, load_dataset):
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_streams_the_named_column(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"body": "a"}, {"body": "b"}])

    hub(monkeypatch, load_dataset)
    assert read("hub:org/name:en:validation:body") == ["a", "b"]
    assert calls == [(("org/name", "en"), {"split": "validation", "streaming": True})]
    with pytest.raises(UserError, match="expected a string column 'text', got columns body"):
        read("hub:org/name")
    hub(monkeypatch, lambda *_args, **_kwargs: iter([{"text": "\ud800"}]))
    with pytest.raises(UserError, match="hub:x: expected text, got half of a character"):
        read("hub:x")
    assert calls[-1] == (("org/name", None), {"split": "train", "streaming": True})


@pytest.mark.parametrize("error", [ConnectionError("no route\nmore"), ValueError("no route")])
def test_hub_out_of_reach(monkeypatch, error):
    def load_dataset(*_args, **_kwargs):
        raise error

    hub(monkeypatch, load_dataset)
    with pytest.raises(UserError, match=r"hub:x: the data set cannot be read .*no route\)"):
        read("hub:x")


def test_hub_without_the_library_or_a_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'pyprune\[datasets\]'"):
        read("hub:x")
    with pytest.raises(UserError, match="expected hub:ID"):
        read("hub:")
