# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a checkpoint, or with what was asked for. The text is for people."""

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that is damaged or cannot be used; the text names file, tensor and way out."""


class UsageError(CheckpointError):
    """A request that cannot be carried out, whatever the state of the checkpoint's bytes."""


def at(path: Path | str, tensor: str | None = None) -> str:
    """Return the place of a problem: the file, and the tensor in it.

    Both come from untrusted input, so control characters are shown as escapes.
    """
    file = printable(path.name if isinstance(path, Path) else path)
    return file if tensor is None else f"{file}: {printable(tensor)}"


def printable(text: str) -> str:
    """Return `text`, at most 200 characters of it, with what is not printable escaped."""
    short = text if len(text) <= 200 else text[:197] + "..."
    escaped = short.encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped)
