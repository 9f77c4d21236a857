# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""Ending of the temporary name of a file that a killed process may leave behind."""


def write_whole(path: Path, text: str) -> None:
    """Write `text` as UTF-8. Meanwhile, and after a failure, `path` is the file that it was.

    Raises OSError where the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def partial_name(path: Path) -> Path:
    """Name under which `path` is written until it is whole.

    The same in every process, so that a later run takes up or overwrites what a killed one left.
    """
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def durable(path: Path) -> Iterator[Path]:
    """Give the temporary name of `path`; rename to `path` when the block ends without an error.

    The bytes are on the disk before the name is, so neither a killed process nor a power cut leaves
    half a file under it. What an error or a kill leaves under the temporary name stays. One writer
    at a time: two would share the temporary name.
    """
    temporary = partial_name(path)
    yield temporary
    _flush_to_disk(temporary)
    temporary.replace(path)
    _flush_to_disk(path.parent)


def write_durable(path: Path, data: bytes) -> None:
    """Write `data` to `path` as `durable` does. Raises OSError where that fails."""
    with durable(path) as temporary:
        temporary.write_bytes(data)


def _flush_to_disk(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
