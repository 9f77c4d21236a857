# SPDX-License-Identifier: Apache-2.0
"""JSON and file names from a checkpoint that somebody else wrote.

Everything is bounded before it is read, and refused with a `CheckpointError` that names the place.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint.errors import CheckpointError, at, printable

MIB = 1 << 20
MAX_HEADER = 32 * MIB
"""Bytes of one safetensors header, enough for 250,000 tensors; parsed, they take ten times that."""
MAX_INDEX = 64 * MIB
MAX_REPORT = 64 * MIB
MAX_CONFIG = 8 * MIB

# Printable ASCII without separators, and no longer than a file system takes.
_SHARD_NAME = re.compile(r"(?![.])[!-.0-\[\]-~]{1,200}\.safetensors")


def parse_object(data: bytes, place: str) -> dict[str, Any]:
    """Parse a JSON object: UTF-8, no key twice.

    Args:
        data: the text; the caller has bounded its length.
        place: what errors call it.

    Raises:
        CheckpointError: anything else, deep nesting and numbers of thousands of digits included.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{place}: byte {error.start} is not UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _no_key_twice(pairs, place))
    except RecursionError:
        raise CheckpointError(f"{place}: the JSON is nested too deeply") from None
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{place}: not JSON: {printable(str(error))}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{place}: a JSON {type(value).__name__} where an object is needed")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]], place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise CheckpointError(f"{place}: the key {printable(key)} is there twice")
        found[key] = value
    return found


def open_regular(path: Path) -> Any:
    """Open a regular file for reading, unbuffered.

    Raises:
        CheckpointError: it is missing, unreadable, or a pipe, device or folder.
    """
    try:
        # Opening a pipe would wait for its writer.
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", 0)
    except IsADirectoryError:
        raise CheckpointError(f"{at(path)}: is a folder, not a file") from None
    except OSError as error:
        raise CheckpointError(f"{at(path)}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise CheckpointError(f"{at(path)}: is not a regular file")
    return file


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a small file whole.

    Raises:
        CheckpointError: it cannot be read, or has more than `limit` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise CheckpointError(f"{at(path)}: {size} bytes; the limit is {limit}")
        # One byte more: the file may grow meanwhile.
        data = bytearray()
        while len(data) <= limit and (part := file.read(limit + 1 - len(data))):
            data += part
    if len(data) > limit:
        raise CheckpointError(f"{at(path)}: more than {limit} bytes")
    return bytes(data)


def read_object(path: Path, limit: int) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes.

    Raises:
        CheckpointError: as `read_bounded` and `parse_object`.
    """
    return parse_object(read_bounded(path, limit), at(path))


def check_shard_name(name: Any, place: str) -> str:
    """Return the name of a shard if it is one: of a safetensors file, without any folder.

    Raises:
        CheckpointError: it has a separator, begins with a dot, or ends otherwise.
    """
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        shown = repr(printable(name)) if isinstance(name, str) else f"a JSON {type(name).__name__}"
        raise CheckpointError(
            f"{place}: {shown} is not the name of a .safetensors file in the "
            "checkpoint's own folder"
        )
    return name


def check_inside(path: Path) -> None:
    """Check that a file lies in its folder, and not elsewhere by way of a symbolic link.

    The Hugging Face cache keeps files as links from ``models--X/snapshots/REVISION`` to
    ``models--X/blobs``, and those are allowed, but only from a folder of that form.

    Raises:
        CheckpointError: the link leads out, or nowhere.
    """
    if not path.is_symlink():
        return
    folder = path.parent.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):
        raise CheckpointError(f"{at(path)}: a symbolic link that leads nowhere") from None
    cached = folder.parent.name == "snapshots"
    if real.parent != folder and not (cached and real.parent == folder.parent.parent / "blobs"):
        raise CheckpointError(f"{at(path)}: a symbolic link that leads out of the checkpoint")
