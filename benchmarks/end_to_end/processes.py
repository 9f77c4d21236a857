# SPDX-License-Identifier: Apache-2.0
"""Engines of vLLM in processes of their own: starting and ending them, and reading their logs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# What vLLM logs of any engine; after "GiB" its two model runners differ. The peak is logged at
# DEBUG level only, which `logging_environment` asks for.
MODEL_GIB = r"Model loading took ([\d.]+) GiB"
PEAK_GIB = r"Peak GPU memory after loading weights: ([\d.]+) GiB"
_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "handlers": {"out": {"class": "logging.StreamHandler", "stream": "ext://sys.stdout"}},
    "loggers": {
        "vllm": {"handlers": ["out"], "level": "INFO", "propagate": False},
        "vllm.model_executor.model_loader.base_loader": {"level": "DEBUG"},
    },
}


def logging_environment(folder: Path) -> dict[str, str]:
    """Variables with which vLLM logs to standard output; a file that they name is written."""
    settings = folder / "logging.json"
    settings.write_text(json.dumps(_LOGGING))
    return {"VLLM_LOGGING_CONFIG_PATH": str(settings)}


def logged(text: str, patterns: Mapping[str, str]) -> dict[str, float]:
    """The figures in a log, by name: the first group of each pattern that is found."""
    hits = {name: re.search(pattern, text) for name, pattern in patterns.items()}
    return {name: float(hit[1].replace(",", "")) for name, hit in hits.items() if hit}


def start_engine(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own: a signal reaches vLLM's processes, and no others."""
    return subprocess.Popen(command, start_new_session=True, **options)


def signal_engine(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to an engine, and to all the processes that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def end_engine(process: subprocess.Popen[bytes]) -> None:
    """End what is left of an engine, and so give the GPU's memory back."""
    signal_engine(process, signal.SIGKILL)
    process.communicate()


def end_engines_when_terminated() -> None:
    """Have SIGTERM end this program as Ctrl-C does, so that it ends the engines it has started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
