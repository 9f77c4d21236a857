# SPDX-License-Identifier: Apache-2.0
"""Run pip in an environment: progress on the screen, output in a log, failures in one sentence."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from _console import Failure, run_logged, say, shown

_PROGRESS = ("Collecting", "Downloading", "Using cached", "Building", "Installing", "Preparing")
_NETWORK = (
    "NameResolution",
    "Temporary failure in name",
    "ConnectTimeout",
    "Read timed out",
    "NewConnectionError",
    "ProxyError",
    "SSLError",
    "Connection broken",
    "Connection refused",
)
_NOISE = ("Looking in ", "WARNING: Location ")
_SHOWN_LINES = 6
_SHOWN_WIDTH = 160


def environment() -> dict[str, str]:
    """Return the environment for pip: the user's configuration, less what breaks in a venv."""
    env = dict(os.environ)
    env.update(
        PIP_DISABLE_PIP_VERSION_CHECK="1",
        PIP_ROOT_USER_ACTION="ignore",
        PIP_NO_INPUT="1",
        PIP_USER="0",
        PYTHONUNBUFFERED="1",
    )
    return env


def progress(line: str) -> str | None:
    """Return what a line of pip's output says about its progress, or None."""
    text = line.strip()
    if not text.startswith(_PROGRESS):
        return None
    return text if len(text) < 70 else text[:67] + "..."


def explain(lines: Sequence[str]) -> str:
    """Return in a few words why pip failed, from its output."""
    text = "\n".join(lines)
    if "No space left" in text:
        return "the disk is full"
    if any(word in text for word in _NETWORK):
        return "a package could not be downloaded; check the network and pip's configuration"
    if "(from versions: none)" in text:
        return "pip found no release of it at all; check the network and pip's configuration"
    errors = [line.strip() for line in lines if line.lstrip().startswith("ERROR: ")]
    return errors[-1][len("ERROR: ") :].rstrip(".") if errors else "pip stopped"


def run(python: Path, label: str, log: Path, *arguments: str) -> None:
    """Run ``python -m pip`` with the arguments.

    Args:
        python: interpreter of the environment.
        label: what is being done, as in ``[2/5] installing PyTorch``.
        log: file that pip's output is added to.
        *arguments: pip's command line.

    Raises:
        Failure: pip failed; the last lines of its output have been printed.
    """
    command = [str(python), "-m", "pip", *arguments]
    status, start = run_logged(command, label, log, environment(), interesting=progress)
    if status == 0:
        return
    output = log.read_bytes()[start:].decode("utf-8", "replace")
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(_NOISE)]
    for line in lines[-_SHOWN_LINES:]:
        say(f"    {line[:_SHOWN_WIDTH]}")
    raise Failure(
        f"{label.rsplit('] ', 1)[-1]} failed: {explain(lines)} (pip's output is in {shown(log)}; "
        "once that is put right, the same command goes on from here)"
    )
