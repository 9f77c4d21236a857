# SPDX-License-Identifier: Apache-2.0
"""What has been written so far, so that a killed run can be taken up where it stopped.

One line of JSON for each finished tensor, appended when its bytes are in the shard. A line holds
the SHA-256 of those bytes, and a later run believes nothing else: so it does not matter in which
order a kill or a power cut let things reach the disk.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.untrusted import MAX_REPORT, parse_object, read_bounded
from vllm_nanoquant.files import PARTIAL, write_durable

_BEGUN_WITH = "begun_with"


class Journal:
    """The journal of one target folder. `open_target` makes one and holds the folder's lock."""

    def __init__(self, path: Path, entries: dict[str, dict[str, Any]]) -> None:
        """Continue the file at `path`, which holds `entries` and ends with a whole line."""
        self._path = path
        self._entries = entries
        self._file = path.open("a", encoding="ascii")

    def get(self, key: str) -> dict[str, Any] | None:
        """What was noted under `key`."""
        return self._entries.get(key)

    def add(self, key: str, entry: dict[str, Any]) -> None:
        """Note `entry`, once what it tells of has been handed to the system."""
        self._entries[key] = entry
        self._file.write(json.dumps({"key": key, **entry}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; what was noted stays."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file: the result is complete."""
        self.close()
        self._path.unlink()


@contextmanager
def open_target(target: Path, begun_with: Mapping[str, str]) -> Iterator[Journal]:
    """Take a folder to write into, new or left by an interrupted run with the same settings.

    Args:
        target: the folder; it is made where it is missing.
        begun_with: what the bytes to be written depend on, by a name for people.

    Raises:
        UsageError: the folder holds something else, was begun with other settings, or another
            process is writing into it.
    """
    target.mkdir(parents=True, exist_ok=True)
    path = target / naming.JOURNAL
    with _lock(target):
        if not path.exists():
            _refuse_foreign(target)
            write_durable(path, (json.dumps({_BEGUN_WITH: dict(begun_with)}) + "\n").encode())
        journal = Journal(path, _take_up(path, begun_with))
        try:
            yield journal
        finally:
            journal.close()


def _refuse_foreign(target: Path) -> None:
    """Refuse a folder that holds more than a run killed before its first line leaves."""
    foreign = sorted(path.name for path in target.iterdir() if not path.name.endswith(PARTIAL))
    if foreign:
        raise UsageError(
            f"{printable(str(target))} is not empty (it has {printable(foreign[0])}) and was not "
            "begun by an interrupted run; choose another folder, or remove it"
        )


def _take_up(path: Path, begun_with: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Entries of an existing journal; a last line that a kill cut short is cut off the file."""
    data = read_bounded(path, MAX_REPORT)
    whole = data.rfind(b"\n") + 1
    first, *rest = data[:whole].splitlines() or [b"{}"]
    before = parse_object(first, at(path)).get(_BEGUN_WITH)
    if not isinstance(before, dict):
        raise CheckpointError(f"{at(path)}: not the journal of an interrupted run; remove it")
    changed = [name for name, value in begun_with.items() if before.get(name) != value]
    if changed:
        raise UsageError(
            f"{printable(str(path.parent))} was begun with another {' and another '.join(changed)}"
            "; run again as before to finish it, or remove it, or choose another folder"
        )
    if whole < len(data):
        os.truncate(path, whole)
    entries = {}
    for line in rest:
        entry = parse_object(line, at(path))
        key = entry.pop("key", None)
        if not isinstance(key, str):
            raise CheckpointError(f"{at(path)}: a line without a key; remove the folder")
        entries[key] = entry
    return entries


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends."""
    descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is writing into {printable(str(target))}; wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
