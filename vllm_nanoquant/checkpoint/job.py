# SPDX-License-Identifier: Apache-2.0
"""Writing a checkpoint that is planned to the last byte, whatever its tensors come from.

The order of writing is shards, tokenizer and the like, report, index, config.json: without
config.json nothing loads it. Killed at any moment, a job can be run again and gives the same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from vllm_nanoquant import __version__
from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.header import TensorEntry
from vllm_nanoquant.checkpoint.journal import Journal, open_target
from vllm_nanoquant.checkpoint.reader import Checkpoint, canonical_json
from vllm_nanoquant.checkpoint.report import file_entry, make_report, read_report, text_entry
from vllm_nanoquant.checkpoint.source import files_to_copy, inherited
from vllm_nanoquant.checkpoint.writer import (
    OutputTensor,
    PlannedShard,
    Produced,
    weight_map,
    write_shard,
)
from vllm_nanoquant.files import durable, write_durable

MAX_SHARD_BYTES = 4_500_000_000
"""Largest file of a result, where nothing else is asked for."""

_SOURCE = "source file "


class Request(Protocol):
    """What every request says; see `quantize.Request` and `convert.Request`."""

    @property
    def name(self) -> str:
        """What the user calls the source: a folder or a model of the Hub."""

    @property
    def target(self) -> Path:
        """Folder to make."""

    @property
    def max_shard_bytes(self) -> int:
        """Largest file of the result."""

    @property
    def device(self) -> str:
        """Where the arithmetic is done."""


class Step(Protocol):
    """What is read, made and written in one go."""

    @property
    def key(self) -> str:
        """Name of it in the journal and, if it is int4, in the report."""

    @property
    def sources(self) -> Sequence[TensorEntry]:
        """Its tensors in the source."""

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """What is written for it, in this order."""

    @property
    def is_int4(self) -> bool:
        """Whether the report has a record of it."""


StepT = TypeVar("StepT", bound=Step)
Produce = Callable[[StepT], Produced]
"""Makes the bytes of a step."""


class Job(ABC, Generic[StepT]):
    """A request that can be carried out. Subclasses say what to write and how to make it.

    Attributes:
        request: what was asked for.
        source: what is read.
        shards: the files, in the order in which they are written.
    """

    request: Request
    source: Checkpoint
    shards: tuple[PlannedShard[StepT], ...]

    @property
    @abstractmethod
    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config`` of the result."""

    @property
    @abstractmethod
    def config(self) -> str:
        """config.json of the result."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, str]:
        """What of the request the bytes of the result depend on, by names for people."""

    @abstractmethod
    def producer(self, journal: Journal) -> AbstractContextManager[Produce[StepT]]:
        """What makes the bytes, and its clean-up: without an error, the result is complete."""

    @property
    def steps(self) -> list[StepT]:
        """Every step, in order."""
        return [step for shard in self.shards for step in shard.items]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(map(_source_bytes, self.steps))

    @property
    def origin(self) -> dict[str, Any]:
        """What the report says of the source, besides its files."""
        known = inherited(self.source, self.request.name)
        return known | {"name": known.get("base_model", self.source.folder.resolve().name)}

    @property
    def begun_with(self) -> dict[str, str]:
        """What the bytes of the result depend on; all of it must agree to resume."""
        headers = {
            shard.path.name: [
                [entry.name, entry.dtype, entry.shape, entry.start]
                for entry in shard.tensors.values()
            ]
            for shard in self.source.shards
        }
        content = canonical_json([headers, self.source.config])
        return {
            "source": hashlib.sha256(content.encode()).hexdigest(),
            **self.settings,
            "shard size": str(self.request.max_shard_bytes),
            "version of vllm-nanoquant": __version__,
            "version of torch": torch.__version__,
            "kind of device": torch.device(self.request.device).type,
        }

    def is_done(self) -> bool:
        """Whether the target is the complete result of the same request already."""
        target = self.request.target
        if (target / naming.JOURNAL).exists() or not (target / naming.CONFIG).is_file():
            return False
        try:
            report = read_report(target)
        except CheckpointError:
            return False
        return report is not None and report.get("begun_with") == self.begun_with

    def run(self, progress: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """Write the result and return its report.

        Args:
            progress: told of the bytes of each step's source tensors once it is dealt with.

        Raises:
            CheckpointError: tensors that cannot be used, a source that is damaged or changes.
            UsageError: the target holds something else, or the disk is too small.
            OSError: the target cannot be written.
        """
        target = self.request.target
        _check_space(target, self.nbytes)
        with open_target(target, self.begun_with) as journal:
            with self.producer(journal) as produce:
                files = self._write_shards(journal, produce, progress)
                for path in files_to_copy(self.source.folder):
                    with durable(target / path.name) as temporary:
                        shutil.copyfile(path, temporary)
                    files[path.name] = file_entry(target / path.name)
                report = self._finish(files, journal)
            journal.remove()
        return report

    def _write_shards(
        self, journal: Journal, produce: Produce[StepT], progress: Callable[[int], None]
    ) -> dict[str, dict[str, Any]]:
        """Bytes and SHA-256 of each shard, by name."""

        def from_known_files(step: StepT) -> Produced:
            for path in {self.source.file_of(entry.name) for entry in step.sources}:
                self.source_digest(path, journal)
            return produce(step)

        files = {}
        for shard in self.shards:
            path = self.request.target / shard.name
            digest = write_shard(
                path, shard, from_known_files, journal, lambda step: progress(_source_bytes(step))
            )
            files[shard.name] = {"bytes": path.stat().st_size, "sha256": digest}
        return files

    def source_digest(self, path: Path, journal: Journal) -> dict[str, Any]:
        """Bytes and SHA-256 of a source file, which is read for it once, just before its tensors.

        Raises:
            CheckpointError: the file is not what it was before an interruption.
        """
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        key = _SOURCE + path.name
        known = journal.get(key)
        if known is None or known.get("stamp") != stamp:
            entry = file_entry(path)
            if known is not None and known.get("file") != entry:
                raise CheckpointError(
                    f"{at(path)}: the source has changed since this was begun; remove "
                    f"{printable(str(self.request.target))} and start again"
                )
            known = {"stamp": stamp, "file": entry}
            journal.add(key, known)
        found: dict[str, Any] = known["file"]
        return found

    def _finish(self, files: dict[str, dict[str, Any]], journal: Journal) -> dict[str, Any]:
        """Write report, index and config.json, in this order."""
        target = self.request.target
        texts = {}
        if len(self.shards) > 1:
            metadata = {"total_size": self.nbytes}
            index = {"metadata": metadata, "weight_map": weight_map(self.shards)}
            texts[naming.INDEX] = canonical_json(index)
        texts[naming.CONFIG] = self.config
        files |= {name: text_entry(text) for name, text in texts.items()}
        origin = self.origin | {
            "files": {
                shard.path.name: self.source_digest(shard.path, journal)
                for shard in self.source.shards
            }
        }
        # What is copied or becomes dense is not in the report.
        records = {
            step.key: entry["record"]
            for step in self.steps
            if step.is_int4 and (entry := journal.get(step.key))
        }
        report = make_report(self.quantization, origin, records, files, self.begun_with)
        write_durable(target / naming.REPORT, canonical_json(report).encode())
        for name, text in texts.items():
            write_durable(target / name, text.encode())
        return report


def _source_bytes(step: Step) -> int:
    return sum(entry.nbytes for entry in step.sources)


def check_target(source: Path, target: Path) -> None:
    """Refuse a target that is the source, lies in it, or holds it.

    Raises:
        UsageError: one of these, or the target is a file.
    """
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise UsageError(
            f"the target {printable(str(target))} is the source, in it or around it; choose a "
            "folder elsewhere"
        )
    if target.exists() and not target.is_dir():
        raise UsageError(f"the target {printable(str(target))} is a file; choose a folder")


def free_bytes(target: Path) -> int:
    """Free bytes on the disk that a folder, which may not exist yet, will lie on."""
    folder = target.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _check_space(target: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in target.iterdir()) if target.is_dir() else 0
    missing, free = needed - there, free_bytes(target)
    if missing > free:
        raise UsageError(
            f"{printable(str(target))} needs {missing / 1e6:,.1f} MB, and its disk has "
            f"{free / 1e6:,.1f} MB left; choose a folder on another disk, or make room"
        )
