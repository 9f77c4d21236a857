# SPDX-License-Identifier: Apache-2.0
"""A vLLM server as a child process: start, wait until healthy, explain a death, always stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from _console import Failure, Heartbeat, say, shown, tail

_POLL = 0.25
_STOP_SECONDS = 20.0
_SHOWN_LINES = 8
_SHOWN_WIDTH = 500

_STAGES = (
    ("Application startup complete", "answering"),
    ("Starting vLLM server", "opening the port"),
    ("init engine", "nearly ready"),
    ("Dynamo bytecode transform", "compiling the model"),
    ("torch.compile took", "compiling the model"),
    ("Capturing CUDA graph", "capturing CUDA graphs"),
    ("KV cache size", "warming up"),
    ("Warming up done", "warming up"),
    ("Warming up model for the compilation", "compiling the model"),
    ("quantized", "quantized"),
    ("Starting to load model", "loading the weights"),
    ("Initializing a V1 LLM engine", "starting the engine"),
    ("Resolved architecture", "reading the model's configuration"),
)
_PREFIX = re.compile(r"^\s*(\([^)]*pid=\d+\)\s*)?((?P<level>[A-Z]+) [\d-]+ [\d:]+ \[[^]]*\]\s*)?")
_PYDANTIC_TAIL = re.compile(r"\s*\[type=\w+, input_value=.*")
_TELLING = re.compile(r"(^|[\s.])\w*(Error|Exception|Interrupt)\b\s*:|\berror:|nanoquant|Killed")
_POINTLESS = (
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "validation error for",
)


def stage(lines: Sequence[str]) -> str:
    """Return what the server is doing, judging by the last lines of its log."""
    for line in reversed(lines):
        for sign, name in _STAGES:
            if sign in line:
                return name
    return "importing vLLM"


def telling_lines(lines: Sequence[str], count: int = _SHOWN_LINES) -> list[str]:
    """Return the lines of a dead server's log that say why: its errors, else its last lines.

    Prefixes with process and time are removed, and what they leave equal is shown once. Errors
    that only say that another process died come last in vLLM's log and are left out.
    """
    plain, errors = [], []
    for line in lines:
        prefix = _PREFIX.match(line)
        text = _PYDANTIC_TAIL.sub("", line[prefix.end() if prefix else 0 :]).strip()
        plain.append(text)
        calm = prefix is not None and prefix["level"] in {"INFO", "DEBUG"}
        if not calm and _TELLING.search(text) and not any(p in text for p in _POINTLESS):
            errors.append(text)
    chosen = list(dict.fromkeys(errors)) or [line for line in plain if line]
    return [line[:_SHOWN_WIDTH] for line in chosen[-count:]]


class Server:
    """A server in its own process group; leaving the ``with`` block ends the whole group.

    Args:
        command: program and arguments.
        log: file for its output; written anew.
        health: address that answers 200 when the server is ready.
        env: environment.
    """

    def __init__(
        self, command: Sequence[str], log: Path, health: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.command = list(command)
        self.log = log
        self.health = health
        self.env = dict(os.environ if env is None else env)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        """Start the process."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.env,
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the process group."""
        self.stop()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, once started."""
        assert self._process is not None, "the server was not started"
        return self._process

    def wait(self, label: str, seconds: float) -> float:
        """Wait until the server is healthy.

        Returns:
            Seconds that it took.

        Raises:
            Failure: it died, or the time is over.
        """
        pulse = Heartbeat(label)
        while not self._healthy():
            status = self.process.poll()
            if status is not None:
                pulse.end("failed")
                self._explain()
                raise Failure(
                    f"vLLM stopped while starting ({_status(status)}): its own words are above, "
                    f"its whole log is {shown(self.log)}"
                )
            if pulse.elapsed > seconds:
                pulse.end("gave up")
                self._explain()
                raise Failure(
                    f"vLLM was not ready after {seconds:.0f} s: see {shown(self.log)}, and give "
                    "a slow machine more with --timeout"
                )
            pulse.beat(stage(tail(self.log, 60)))
            time.sleep(_POLL)
        pulse.end("ready")
        return pulse.elapsed

    def _healthy(self) -> bool:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.health, timeout=2) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def _explain(self) -> None:
        for line in telling_lines(tail(self.log, 400)):
            say(f"    {line}")

    def stop(self) -> None:
        """End the process group: politely first, by force after a while; harmless to repeat."""
        if self._process is None:
            return
        group = self._process.pid
        deadline = time.monotonic() + _STOP_SECONDS
        alive = _signal_group(group, signal.SIGTERM)
        while alive and time.monotonic() < deadline:
            self._process.poll()
            time.sleep(0.1)
            alive = _signal_group(group, 0)
        if alive:
            _signal_group(group, signal.SIGKILL)
        self._process.wait()


def _signal_group(group: int, number: int) -> bool:
    """Send a signal to every process of the group; whether there was one."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _status(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
