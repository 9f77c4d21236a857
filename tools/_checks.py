# SPDX-License-Identifier: Apache-2.0
"""What a machine must have, checked before anything slow."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

from _console import Failure

PYTHONS = ((3, 11), (3, 13))
_COMPILERS = ("g++", "clang++", "c++")


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> None:
    """Fail unless this Python is one that vLLM and the plugin support."""
    low, high = PYTHONS
    if not low <= version[:2] <= high:
        raise Failure(
            f"Python {low[0]}.{low[1]} to {high[0]}.{high[1]} is needed, and {sys.executable} is "
            f"{'.'.join(map(str, version))}: install one and name it, as in: "
            "make demo PYTHON=python3.12"
        )
    if not sys.platform.startswith("linux"):
        raise Failure(f"vLLM runs on Linux (WSL included), and this is {sys.platform}")


def check_compiler() -> None:
    """Fail unless there is a C++ compiler: torch.compile and Triton call one while serving."""
    named = os.environ.get("CXX")
    if any(shutil.which(name) for name in ([named] if named else _COMPILERS)):
        return
    what = f"CXX names {named!r}, which is not there" if named else "there is no C++ compiler"
    raise Failure(
        f"{what}, and torch.compile and the tests need one: install it, for example with "
        "'apt-get install g++' or 'dnf install gcc-c++', or name yours with CXX=..."
    )


def has_python_headers() -> bool:
    """Whether what torch.compile and Triton build can be built against this Python."""
    return (Path(sysconfig.get_path("include")) / "Python.h").exists()


def check_headers(device: str) -> None:
    """Fail on a GPU machine without Python's C headers, which Triton needs for every kernel."""
    if device == "cuda" and not has_python_headers():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise Failure(
            "Python's C headers (Python.h) are missing and Triton needs them: install them, for "
            f"example with 'apt-get install python{version}-dev'"
        )


def find_device() -> str:
    """Return ``cuda`` where nvidia-smi lists a GPU, else ``cpu``."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "cpu"
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listed.returncode == 0 and "GPU " in listed.stdout else "cpu"


def check_port(host: str, port: int) -> None:
    """Fail if something listens on the port already."""
    if not 0 < port < 65536:
        raise Failure(f"{port} is no port: choose one from 1 to 65535, as in: make demo PORT=8001")
    if _free(host, port):
        return
    other = next((p for p in range(port + 1, min(port + 100, 65536)) if _free(host, p)), None)
    choose = f"choose another, as in: make demo PORT={other}" if other else "choose another"
    raise Failure(f"port {port} on {host} is in use: stop what listens there, or {choose}")


def _free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def check_model(folder: Path) -> None:
    """Fail unless the folder holds a checkpoint."""
    if not folder.is_dir():
        raise Failure(
            f"there is no model in {folder}: restore the folder with 'git checkout -- models', "
            "or name another with --model"
        )
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise Failure(
            f"{folder} holds no complete checkpoint (config.json and *.safetensors): restore it "
            "with 'git checkout -- models', or name another with --model"
        )
