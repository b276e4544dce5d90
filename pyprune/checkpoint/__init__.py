"""Checkpoints: opened and checked, read and written one block at a time, saved all or nothing."""

from pyprune.checkpoint.originals import Originals
from pyprune.checkpoint.output import (
    check_output,
    check_writable,
    copy_auxiliary,
    output_directory,
    save_model,
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
    "check_output",
    "check_writable",
    "copy_auxiliary",
    "output_directory",
    "read_header",
    "read_tensor",
    "save_model",
    "write_parameters",
    "write_report",
    "write_tensor",
]
