# SPDX-License-Identifier: Apache-2.0
"""Other processes with a time limit: what crashes or hangs there does not do so here."""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_nanoquant.doctor import probes
from vllm_nanoquant.doctor.finding import Answer

IMPORT_SECONDS = 180.0
"""Time for all imports together; a cold disk takes a minute for those of vLLM."""
COMMAND_SECONDS = 30.0
"""Time for a command, or for a look at all folders."""


def run_limited(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Run a command for at most some seconds.

    Nothing waits for a process that was killed and does not end, as one stuck in a driver.

    Returns:
        The exit status, None when the time was over, and what it wrote to either output.

    Raises:
        OSError: it cannot be started.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
        output.seek(0)
        return status, output.read().decode(errors="replace")


def ask_command(command: Sequence[str], seconds: float = COMMAND_SECONDS) -> Answer:
    """The lines that a command prints."""
    try:
        status, output = run_limited(command, seconds)
    except OSError as error:
        return Answer(error=f"{command[0]}: {error.strerror}")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if status is None:
        return Answer(error=f"no answer in {seconds:.0f} s")
    if status:
        return Answer(error=lines[0] if lines else f"exit status {status}")
    return Answer({"lines": lines})


def ask_probes(names: Sequence[str], seconds: float = IMPORT_SECONDS) -> dict[str, Answer]:
    """What the probes find out, all in one process, and a new one after one that died."""
    deadline = time.monotonic() + seconds
    answers: dict[str, Answer] = {}
    remaining = list(names)
    while remaining:
        left = deadline - time.monotonic()
        if left <= 0:
            return answers | dict.fromkeys(remaining, Answer(error="no time was left to try it"))
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results"
            results.touch()
            command = [sys.executable, "-P", str(probes.__file__), str(results), *remaining]
            status, _ = run_limited(command, left)
            done = _read(results)
        answers |= done
        remaining = remaining[len(done) :]
        if remaining:
            answers[remaining.pop(0)] = Answer(error=_death(status, left))
    return answers


def _read(results: Path) -> dict[str, Answer]:
    """The answers of the probes that have ended."""
    done: dict[str, Answer] = {}
    for line in results.read_text(encoding="utf-8").splitlines():
        # A process may die in the middle of a line.
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            done[entry["probe"]] = Answer(entry.get("value"), entry.get("error", ""))
    return done


def _death(status: int | None, seconds: float) -> str:
    if status is None:
        return f"no answer in {seconds:.0f} s"
    if status >= 0:
        return f"the process ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"the process crashed ({signal.Signals(-status).name})"
    return f"the process crashed (signal {-status})"
