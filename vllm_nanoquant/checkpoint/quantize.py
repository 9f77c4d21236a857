# SPDX-License-Identifier: Apache-2.0
"""From a stock checkpoint to an int4 one that vLLM serves as it is, tensor by tensor.

`prepare` reads headers and refuses what cannot work; `Job.run` writes. The order of writing is
shards, tokenizer and the like, report, index, config.json: without config.json nothing loads it.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_nanoquant import __version__
from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint import source as source_files
from vllm_nanoquant.checkpoint.calibrate import CalibratedWeights, Calibration
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.fidelity import relative_error
from vllm_nanoquant.checkpoint.journal import Journal, open_target
from vllm_nanoquant.checkpoint.plan import Plan, Step, make_plan
from vllm_nanoquant.checkpoint.reader import Checkpoint, canonical_json
from vllm_nanoquant.checkpoint.report import (
    file_entry,
    make_report,
    producer,
    read_report,
    text_entry,
)
from vllm_nanoquant.checkpoint.rows import RowQuantizer
from vllm_nanoquant.checkpoint.writer import Produced, tensor_bytes, weight_map, write_shard
from vllm_nanoquant.files import durable, write_durable
from vllm_nanoquant.recipe import METHOD, Recipe, Scheme

MAX_SHARD_BYTES = 4_500_000_000
_SAMPLE_SHAPE = (1024, 4096)
_SOURCE = "source file "


@dataclass(frozen=True)
class Request:
    """What to quantize into what, and how.

    Attributes:
        name: what the user calls the source: a folder or a model of the Hub.
        folder: where it lies.
        target: folder to make.
        recipe: which modules become int4, and how.
        max_shard_bytes: largest file of the result.
        device: where the arithmetic is done.
        calibration: text for GPTQ; None for the other algorithms.
    """

    name: str
    folder: Path
    target: Path
    recipe: Recipe
    max_shard_bytes: int = MAX_SHARD_BYTES
    device: str = "cpu"
    calibration: Calibration | None = None


@dataclass(frozen=True)
class Job:
    """A request that can be carried out, with its plan."""

    request: Request
    source: Checkpoint
    plan: Plan

    @property
    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config`` of the result."""
        recipe = self.plan.recipe.model_dump(mode="json")
        version = {"format_version": naming.FORMAT_VERSION}
        return {"quant_method": METHOD, **version, **recipe, "producer": producer()}

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
        calibration = self.request.calibration
        return {
            "source": hashlib.sha256(content.encode()).hexdigest(),
            "calibration text": calibration.digest if calibration else "none",
            "recipe": self.plan.recipe.fingerprint,
            "shard size": str(self.request.max_shard_bytes),
            "version of vllm-nanoquant": __version__,
            "version of torch": torch.__version__,
            "kind of device": torch.device(self.request.device).type,
        }

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(step.source.nbytes for step in self.plan.steps)

    @property
    def peak_bytes(self) -> int:
        """Estimate of the memory that it takes beyond torch itself, on the CPU."""
        return 3 * max(step.source.nbytes for step in self.plan.steps) // 2 + (128 << 20)

    def estimate_seconds(self) -> float | None:
        """Time that it will take, by a sample of the arithmetic on this machine, disks aside.

        None for GPTQ, which depends on the model and the text far more than on the weights.
        """
        if self.request.calibration is not None:
            return None
        weight = torch.randn(_SAMPLE_SHAPE, dtype=torch.bfloat16)
        scheme = Scheme(self.plan.recipe.group_size, self.plan.recipe.algorithm)
        rates = []
        with RowQuantizer(torch.device(self.request.device)) as quantizer:
            for _ in range(2):  # the first one warms up
                start = time.perf_counter()
                quantizer(weight, scheme)
                hashlib.sha256(tensor_bytes(weight))
                rates.append((time.perf_counter() - start) / weight.numel())
        weights = sum(step.source.numel for step in self.plan.steps if step.scheme)
        return rates[-1] * weights

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

        Killed at any moment, it can be run again and gives the same bytes.

        Args:
            progress: told of the bytes of each source tensor once it is dealt with.

        Raises:
            CheckpointError: a weight that is not finite, a source that is damaged or changes.
            UsageError: the target holds something else, or the disk is too small.
            OSError: the target cannot be written.
        """
        target = self.request.target
        _check_space(target, self.plan.nbytes)
        with open_target(target, self.begun_with) as journal:
            files = {}
            calibrated = self._calibrated()
            with RowQuantizer(torch.device(self.request.device)) as quantizer:
                work = _Work(self, journal, quantizer, calibrated)
                for shard in self.plan.shards:
                    path = target / shard.name
                    digest = write_shard(
                        path,
                        shard,
                        work.produce,
                        journal,
                        lambda step: progress(step.source.nbytes),
                    )
                    files[shard.name] = {"bytes": path.stat().st_size, "sha256": digest}
            for path in source_files.files_to_copy(self.source.folder):
                with durable(target / path.name) as temporary:
                    shutil.copyfile(path, temporary)
                files[path.name] = file_entry(target / path.name)
            report = self._finish(files, work)
            if calibrated is not None:
                calibrated.remove()
            journal.remove()
        return report

    def _calibrated(self) -> CalibratedWeights | None:
        request = self.request
        if request.calibration is None:
            return None
        device = torch.device(request.device)
        return CalibratedWeights(
            request.target, self.source, self.plan.recipe, request.calibration, device
        )

    def _finish(self, files: dict[str, dict[str, Any]], work: _Work) -> dict[str, Any]:
        """Write report, index and config.json, in this order."""
        target, shards = self.request.target, self.plan.shards
        config = source_files.rewritten_config(
            self.source.config, self.quantization, self.plan.kinds
        )
        files[naming.CONFIG] = text_entry(config)
        index = None
        if len(shards) > 1:
            metadata = {"total_size": self.plan.nbytes}
            index = canonical_json({"metadata": metadata, "weight_map": weight_map(shards)})
            files[naming.INDEX] = text_entry(index)
        origin = source_files.inherited(self.source, self.request.name)
        origin |= {"name": origin.get("base_model", self.source.folder.resolve().name)}
        origin |= {
            "files": {shard.path.name: work.digest(shard.path) for shard in self.source.shards}
        }
        report = make_report(self.quantization, origin, work.records(), files, self.begun_with)
        write_durable(target / naming.REPORT, canonical_json(report).encode())
        if index is not None:
            write_durable(target / naming.INDEX, index.encode())
        write_durable(target / naming.CONFIG, config.encode())
        return report


class _Work:
    """Makes the bytes of each step, and remembers what the report needs."""

    def __init__(
        self,
        job: Job,
        journal: Journal,
        quantizer: RowQuantizer,
        calibrated: CalibratedWeights | None,
    ) -> None:
        self._job = job
        self._calibrated = calibrated
        self._quantizer = quantizer
        self._journal = journal

    def produce(self, step: Step) -> Produced:
        """Bytes of one step, quantized or copied."""
        source = self._job.source
        path = source.file_of(step.source.name)
        self.digest(path)
        if step.scheme is None:
            return Produced(source.chunks(step.source.name), {})
        module = step.source.name.removesuffix(naming.WEIGHT)
        ready = self._calibrated.get(module) if self._calibrated else None
        scheme = step.scheme
        if self._calibrated and ready is None:
            scheme = scheme._replace(algorithm="mse")  # no layer that calibration runs has it
        weight = source.load(step.source.name)
        try:
            if ready is None:
                quantized, error = self._quantizer(weight, scheme)
            else:
                quantized, error = ready, relative_error(weight, ready)
        except ValueError as problem:
            raise CheckpointError(f"{at(path, step.source.name)}: {problem}") from None
        record = {
            "shape": list(step.source.shape),
            "dtype": step.source.dtype,
            "bits": 4,
            "group_size": scheme.group_size,
            "algorithm": scheme.algorithm,
            "relative_error": error,
            "bytes_before": step.source.nbytes,
            "bytes_after": quantized.nbytes,
        }
        # In the order of `naming.quantized_layout`.
        parts = (quantized.scale, quantized.zero_point, quantized.packed)
        return Produced([tensor_bytes(part) for part in parts], record)

    def digest(self, path: Path) -> dict[str, Any]:
        """Bytes and SHA-256 of a source file, which is read for it once, just before its tensors.

        Raises:
            CheckpointError: the file is not what it was before an interruption.
        """
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        key = _SOURCE + path.name
        known = self._journal.get(key)
        if known is None or known.get("stamp") != stamp:
            entry = file_entry(path)
            if known is not None and known.get("file") != entry:
                raise CheckpointError(
                    f"{at(path)}: the source has changed since this was begun; remove "
                    f"{printable(str(self._job.request.target))} and start again"
                )
            known = {"stamp": stamp, "file": entry}
            self._journal.add(key, known)
        found: dict[str, Any] = known["file"]
        return found

    def records(self) -> dict[str, dict[str, Any]]:
        """Record of each quantized weight, by its name in the source."""
        entries = {
            step.key: self._journal.get(step.key) for step in self._job.plan.steps if step.scheme
        }
        return {key: entry["record"] for key, entry in entries.items() if entry}


def prepare(request: Request) -> Job:
    """Open the source and plan the result. Writes nothing.

    Raises:
        RecipeError, UsageError, CheckpointError: as `check_target`, `Checkpoint.open`,
            `source.refuse_quantized` and `plan.make_plan`.
    """
    check_target(request.folder, request.target)
    if (request.recipe.algorithm == "gptq") != (request.calibration is not None):
        raise UsageError(
            "algorithm 'gptq' and --calibration-text FILE belong together: give both, or neither"
        )
    source = Checkpoint.open(request.folder)
    source_files.refuse_quantized(source)
    return Job(request, source, make_plan(source, request.recipe, request.max_shard_bytes))


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
    if needed - there > free_bytes(target):
        raise UsageError(
            f"{printable(str(target))} needs {(needed - there) / 1e9:.2f} GB, and its disk has "
            f"{free_bytes(target) / 1e9:.2f} GB left"
        )
