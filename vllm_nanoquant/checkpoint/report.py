# SPDX-License-Identifier: Apache-2.0
"""``nanoquant_report.json``: what was done to each tensor, and the digests of every file."""

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_nanoquant import __version__
from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError
from vllm_nanoquant.checkpoint.reader import CHUNK_BYTES
from vllm_nanoquant.checkpoint.untrusted import MAX_REPORT, check_inside, open_regular, read_object

REPORT_VERSION = 1
_PACKAGES = ("torch", "safetensors", "numpy")


def producer() -> dict[str, str]:
    """Who wrote a checkpoint, for its config.json."""
    return {"name": "vllm-nanoquant", "version": __version__}


def versions() -> dict[str, str]:
    """Versions of what took part, for the report."""
    found = {"python": platform.python_version(), "vllm-nanoquant": __version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def file_entry(path: Path) -> dict[str, Any]:
    """Bytes and SHA-256 of a file, read a part at a time.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with open_regular(path) as file:
        while part := file.read(CHUNK_BYTES):
            digest.update(part)
            size += len(part)
    return {"bytes": size, "sha256": digest.hexdigest()}


def text_entry(text: str) -> dict[str, Any]:
    """Bytes and SHA-256 of a text that is going to be written."""
    data = text.encode()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def make_report(
    quantization: dict[str, Any],
    source: dict[str, Any],
    tensors: dict[str, dict[str, Any]],
    files: dict[str, dict[str, Any]],
    begun_with: dict[str, str],
) -> dict[str, Any]:
    """Put a report together; `canonical_json` of it goes into the file.

    Nothing in it depends on when or how often the run was interrupted.

    Args:
        quantization: the ``quantization_config`` written.
        source: what is known of it, with ``files`` and their digests.
        tensors: for each quantized weight its record: shape, settings, error, bytes.
        files: bytes and SHA-256 of every file of the result but this one.
        begun_with: what the result depends on; a later run tells by it that there is nothing to do.
    """
    return {
        "report_version": REPORT_VERSION,
        "begun_with": begun_with,
        "versions": versions(),
        "quantization_config": quantization,
        "source": source,
        "bytes": {
            "before": sum(entry["bytes"] for entry in source["files"].values()),
            "after": sum(
                entry["bytes"] for name, entry in files.items() if name.endswith(".safetensors")
            ),
        },
        "tensors": tensors,
        "files": files,
    }


def read_report(folder: Path) -> dict[str, Any] | None:
    """Read a checkpoint's report; None where it has none.

    Raises:
        CheckpointError: it is not a report of this version.
    """
    path = folder / naming.REPORT
    if not path.is_symlink() and not path.exists():
        return None
    check_inside(path)
    report = read_object(path, MAX_REPORT)
    if report.get("report_version") != REPORT_VERSION:
        raise CheckpointError(
            f"{naming.REPORT}: report_version is not {REPORT_VERSION}, the one this release reads"
        )
    for part in ("tensors", "files"):
        entries = report.get(part)
        if not isinstance(entries, dict) or not _are_objects(entries.values()):
            raise CheckpointError(f"{naming.REPORT}: {part} is not an object of objects")
    return report


def _are_objects(values: Iterable[Any]) -> bool:
    return all(isinstance(value, dict) for value in values)
