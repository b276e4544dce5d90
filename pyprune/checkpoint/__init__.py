"""Checkpoints: opened and checked, read and written one block at a time, saved all or nothing."""

from pyprune.checkpoint.files import check_writable, replace_file, writing
from pyprune.checkpoint.originals import Originals
from pyprune.checkpoint.output import (
    check_apart,
    check_output,
    copy_auxiliary,
    output_directory,
    unfinished,
    write_report,
)
from pyprune.checkpoint.shards import TensorEntry, read_header, read_tensor, write_tensor
from pyprune.checkpoint.source import Checkpoint
from pyprune.checkpoint.store import StreamingStore, write_parameters

__all__ = [
    "Checkpoint",
    "Originals",
    "StreamingStore",
    "TensorEntry",
    "check_apart",
    "check_output",
    "check_writable",
    "copy_auxiliary",
    "output_directory",
    "read_header",
    "read_tensor",
    "replace_file",
    "unfinished",
    "write_parameters",
    "write_report",
    "write_tensor",
    "writing",
]
