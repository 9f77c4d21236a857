# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint is what it says: every file, header and byte, with neither GPU nor vLLM.

Nothing is believed that the folder says of itself, and no part of it can make this take more memory
than one chunk, a header and, with a source to compare with, one tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.header import ShardHeader, TensorEntry
from vllm_nanoquant.checkpoint.reader import (
    TORCH_DTYPES,
    Checkpoint,
    ShardList,
    disagreements,
    list_shards,
    read_range,
    read_shard,
)
from vllm_nanoquant.checkpoint.report import file_entry, read_report
from vllm_nanoquant.checkpoint.structure import check_structure, stored_recipe
from vllm_nanoquant.checkpoint.untrusted import (
    MAX_CONFIG,
    check_inside,
    open_regular,
    read_object,
)

_FLOATS = ("BF16", "F16", "F32", "F64")
_MAX_FEATURES = 1 << 24


@dataclass
class Findings:
    """What was found.

    Attributes:
        problems: one line each: the file, the tensor, and what is wrong with it.
        notes: what could not be checked, and why.
        tensors: number of tensors whose bytes were read.
        nbytes: their bytes.
        errors: relative error of each weight, where it was compared with a source.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0
    errors: dict[str, float] = field(default_factory=dict)


def verify(
    folder: Path, against: Path | None = None, progress: Callable[[int], None] = lambda _: None
) -> Findings:
    """Check a checkpoint, quantized or stock.

    Args:
        folder: where it lies.
        against: the stock checkpoint that it was made from.
        progress: told of bytes that were read.

    Raises:
        UsageError: one of the two is not a folder.
    """
    for each in (folder, against):
        if each is not None and not each.is_dir():
            raise UsageError(f"{printable(str(each))} is not a folder")
    findings = Findings()
    if (folder / naming.JOURNAL).exists():
        findings.problems.append(
            f"{naming.JOURNAL}: the checkpoint is not complete; run `nanoquant quantize` again as "
            "before to finish it"
        )
    config = _attempt(findings, lambda: _read_config(folder))
    report = _attempt(findings, lambda: read_report(folder))
    listed = _attempt(findings, lambda: list_shards(folder))
    if listed is None:
        return findings
    shards = [
        shard for name in listed.names if (shard := _attempt(findings, _reader(folder, name)))
    ]
    findings.problems += _strays(listed)
    findings.problems += disagreements(listed, shards)
    if config is not None and len(shards) == len(listed.names) and not findings.problems:
        findings.problems += check_structure(Checkpoint(folder, config, shards), report)
    digests = {shard.path.name: _check_bytes(findings, shard, progress) for shard in shards}
    if report is not None:
        findings.problems += _check_digests(folder, report, digests)
    elif config is not None and stored_recipe(config) is not None:
        findings.notes.append(f"there is no {naming.REPORT}: digests were not checked")
    if against is not None:
        _check_against(findings, folder, against, report)
    return findings


def _attempt(findings: Findings, read: Callable[[], Any]) -> Any:
    """The result of `read`, or None and a problem."""
    try:
        return read()
    except CheckpointError as error:
        findings.problems.append(str(error))
        return None


def _reader(folder: Path, name: str) -> Callable[[], ShardHeader]:
    return lambda: read_shard(folder, name)


def _read_config(folder: Path) -> dict[str, Any]:
    check_inside(folder / naming.CONFIG)
    return read_object(folder / naming.CONFIG, MAX_CONFIG)


def _strays(listed: ShardList) -> Iterator[str]:
    """Safetensors files that the index does not name: an engine may load them all the same."""
    for path in sorted(listed.folder.glob("[!.]*.safetensors")):
        if path.name not in listed.names:
            yield f"{at(path)}: is not in {naming.INDEX}"


def _check_bytes(
    findings: Findings, shard: ShardHeader, progress: Callable[[int], None]
) -> dict[str, Any] | None:
    """Read a file once: digest it, and look at the values of every tensor.

    Returns:
        Bytes and SHA-256 of the file; None where it could not be read.
    """
    digest = hashlib.sha256()
    first = min((entry.start for entry in shard.tensors.values()), default=shard.size)
    try:
        with open_regular(shard.path) as file:
            for part in read_range(file, 0, first, at(shard.path)):
                digest.update(part)
            for entry in shard.tensors.values():
                look = _Look(entry)
                place = at(shard.path, entry.name)
                for part in read_range(file, entry.start, entry.nbytes, place):
                    digest.update(part)
                    look.at_part(part)
                    progress(len(part))
                findings.problems += [f"{place}: {problem}" for problem in look.problems()]
                findings.tensors += 1
                findings.nbytes += entry.nbytes
    except CheckpointError as error:
        findings.problems.append(str(error))
        return None
    return {"bytes": shard.size, "sha256": digest.hexdigest()}


class _Look:
    """What a tensor's values must be, checked part by part."""

    def __init__(self, entry: TensorEntry) -> None:
        self._entry = entry
        self._rest = b""
        self._nan = self._infinite = 0
        is_order = entry.name.endswith(naming.ORDER) and entry.dtype == "I32"
        fits = len(entry.shape) == 1 and entry.numel <= _MAX_FEATURES
        self._seen = torch.zeros(entry.numel, dtype=torch.bool) if is_order and fits else None

    def at_part(self, part: bytes) -> None:
        """Take in the next bytes, which may end within an element."""
        if self._entry.dtype not in _FLOATS and self._seen is None:
            return
        dtype = TORCH_DTYPES[self._entry.dtype]
        data = self._rest + part
        whole = len(data) // dtype.itemsize * dtype.itemsize
        self._rest = data[whole:]
        if not whole:
            return
        values = torch.frombuffer(bytearray(data[:whole]), dtype=dtype)
        if self._seen is not None:
            inside = (values >= 0) & (values < len(self._seen))
            self._seen[values[inside].long()] = True
        elif not bool(torch.isfinite(values).all()):
            self._nan += int(torch.isnan(values).sum())
            self._infinite += int(torch.isinf(values).sum())

    def problems(self) -> Iterator[str]:
        """What is wrong with the tensor, now that all of it has been seen."""
        if self._nan:
            yield f"{self._nan} of {self._entry.numel} values are NaN"
        if self._infinite and self._entry.name.endswith((naming.SCALE, naming.ZERO_POINT)):
            yield f"{self._infinite} of {self._entry.numel} values are infinite"
        # As many values as columns: if each column was seen, none is twice there or out of range.
        if self._seen is not None and not bool(self._seen.all()):
            yield "is not a permutation: a column is missing, twice there or out of range"


def _check_digests(
    folder: Path, report: dict[str, Any], digests: dict[str, dict[str, Any] | None]
) -> Iterator[str]:
    """Compare files with the report's digests."""
    for name, expected in report["files"].items():
        if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
            yield f"{naming.REPORT}: {printable(name)!r} is not the name of a file in the folder"
            continue
        path = folder / name
        try:
            check_inside(path)
            found = digests[name] if name in digests else file_entry(path)
        except (CheckpointError, OSError, ValueError) as error:
            yield str(error) if isinstance(error, CheckpointError) else f"{at(path)}: unreadable"
            continue
        if found is not None and found != expected:
            yield f"{at(path)}: its SHA-256 is not the one in {naming.REPORT}; it has been changed"
    for name in digests:
        if name not in report["files"]:
            yield f"{at(name)}: is not in {naming.REPORT}"


def _check_against(
    findings: Findings, folder: Path, against: Path, report: dict[str, Any] | None
) -> None:
    """Compare every tensor with the source's."""
    # Not at the top: only needed here, and comparing needs the other parts of this module's work.
    from vllm_nanoquant.checkpoint.compare import compare

    if findings.problems:
        findings.notes.append("not compared with the source, because of the problems found")
        return
    try:
        result, source = Checkpoint.open(folder), Checkpoint.open(against)
        for name, error, problem in compare(result, source, report):
            if error is not None:
                findings.errors[name] = error
            if problem is not None:
                findings.problems.append(problem)
    except CheckpointError as error:
        findings.problems.append(str(error))
