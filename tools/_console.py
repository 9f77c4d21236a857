# SPDX-License-Identifier: Apache-2.0
"""What set-up and demo share: one-sentence failures, visible progress, logged commands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

_BEAT_TERMINAL = 0.5
_BEAT_PIPE = 15.0
_CLEAR_LINE = "\r\033[K"


class Failure(Exception):
    """Something a person can put right; the text is one sentence that says how."""


def say(text: str = "") -> None:
    """Print a line at once."""
    print(text, flush=True)


def shown(path: Path) -> str:
    """Return the path as a person in the checkout would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


class Heartbeat:
    """Shows that something is still going on: rewrites a line on a terminal, else adds a few.

    Args:
        label: what is going on, such as ``[2/5] installing PyTorch``.
    """

    def __init__(self, label: str) -> None:
        self.label = label
        self.started = time.monotonic()
        self._terminal = sys.stdout.isatty()
        self._last = self.started
        if self._terminal:
            print(label, end="", flush=True)
        else:
            say(label)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def beat(self, detail: str = "") -> None:
        """Show the time that has passed, and the detail, if the last beat is long enough ago."""
        now = time.monotonic()
        if now - self._last < (_BEAT_TERMINAL if self._terminal else _BEAT_PIPE):
            return
        self._last = now
        text = f"{self.label}: {self.elapsed:.0f} s{', ' if detail else ''}{detail}"
        if self._terminal:
            width = _terminal_width()
            print(_CLEAR_LINE + text[: width - 1], end="", flush=True)
        else:
            say(text)

    def end(self, outcome: str = "done") -> None:
        """Close the line."""
        start = _CLEAR_LINE if self._terminal else ""
        say(f"{start}{self.label}: {outcome} ({self.elapsed:.0f} s)")


def _terminal_width() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except OSError:
        return 80


def tail(path: Path, lines: int, *, size: int = 65536) -> list[str]:
    """Return the last non-empty lines of a text file that may still be growing."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]


def run_logged(
    command: Sequence[str],
    label: str,
    log: Path,
    env: Mapping[str, str] | None = None,
    interesting: Callable[[str], str | None] = lambda line: line.strip(),
) -> tuple[int, int]:
    """Run a command with its output in a log and a heartbeat on the screen.

    Args:
        command: program and arguments.
        label: what the command does.
        log: file that the output is added to.
        env: environment; None takes this process's.
        interesting: what to show of a line of output, or None when it is not worth showing.

    Returns:
        Exit status, and the size that the log had before.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    pulse = Heartbeat(label)
    with log.open("a", encoding="utf-8") as output:
        output.write(f"\n$ {' '.join(command)}\n")
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                pulse.beat(_last_interesting(log, interesting))
        except BaseException:
            process.terminate()
            process.wait()
            raise
    pulse.end("done" if process.returncode == 0 else "failed")
    return process.returncode, start


def _last_interesting(log: Path, interesting: Callable[[str], str | None]) -> str:
    for line in reversed(tail(log, 30, size=8192)):
        text = interesting(line)
        if text:
            return text
    return ""


def guarded(main: Callable[[], None]) -> int:
    """Run a tool's main function and turn what stops it into an exit status.

    A Failure becomes one sentence on standard error and status 1, without a traceback.
    """
    try:
        main()
    except Failure as failure:
        sys.stdout.flush()
        print(f"error: {failure}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    return 0
