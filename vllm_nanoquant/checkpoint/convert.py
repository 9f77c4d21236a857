# SPDX-License-Identifier: Apache-2.0
"""From another tool's quantized checkpoint to ours, and from ours to `pack-quantized`.

Integers are taken over as they are. FP8 and NVFP4 weights are read as dense ones and quantized
again, which puts a second error on top of the first; the report says how large the second one is.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_nanoquant import __version__
from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint import source as source_files
from vllm_nanoquant.checkpoint.convert_plan import (
    ConvertPlan,
    ConvertStep,
    plan_export,
    plan_import,
)
from vllm_nanoquant.checkpoint.convert_work import Work
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at, printable
from vllm_nanoquant.checkpoint.formats import (
    Format,
    detect,
    with_side_configs,
)
from vllm_nanoquant.checkpoint.formats.redhelix import WEIGHTS_FILE
from vllm_nanoquant.checkpoint.journal import Journal, open_target
from vllm_nanoquant.checkpoint.quantize import MAX_SHARD_BYTES, check_target, free_bytes
from vllm_nanoquant.checkpoint.reader import Checkpoint, canonical_json, read_shard
from vllm_nanoquant.checkpoint.report import file_entry, make_report, read_report, text_entry
from vllm_nanoquant.checkpoint.structure import stored_recipe
from vllm_nanoquant.checkpoint.untrusted import MAX_CONFIG, check_inside, read_object
from vllm_nanoquant.checkpoint.writer import (
    PlannedShard,
    cut_into_shards,
    weight_map,
    write_shard,
)
from vllm_nanoquant.files import durable, write_durable

OURS = "nanoquant"
PACK_QUANTIZED = "pack-quantized"
TARGETS = (OURS, PACK_QUANTIZED)
"""What a checkpoint can be converted to."""


@dataclass(frozen=True)
class Request:
    """What to convert into what.

    Attributes:
        name: what the user calls the source: a folder or a model of the Hub.
        folder: where it lies.
        target: folder to make.
        to: one of `TARGETS`.
        group_size: for weights that are quantized again.
        algorithm: for weights that are quantized again: "minmax" or "mse".
        max_shard_bytes: largest file of the result.
        device: where the arithmetic is done.
    """

    name: str
    folder: Path
    target: Path
    to: str = OURS
    group_size: int = 128
    algorithm: str = "minmax"
    max_shard_bytes: int = MAX_SHARD_BYTES
    device: str = "cpu"


@dataclass(frozen=True)
class Job:
    """A request that can be carried out.

    Attributes:
        request: what was asked for.
        source: the checkpoint, with every file that holds weights.
        fmt: its format; None where it is ours.
        plan: what will be written.
        shards: the plan, cut into files.
    """

    request: Request
    source: Checkpoint
    fmt: Format | None
    plan: ConvertPlan
    shards: tuple[PlannedShard[ConvertStep], ...]

    @property
    def requantized(self) -> list[str]:
        """Modules that are read as dense weights and quantized again."""
        return [step.key for step in self.plan.steps if _is_requantized(self.fmt, step)]

    @property
    def made_dense(self) -> list[str]:
        """Modules that are quantized in the source, and that our method does not serve in int4."""
        return [step.key for step in self.plan.steps if step.module and step.group_size is None]

    @property
    def source_bytes(self) -> int:
        """Bytes of the tensors that are read."""
        return sum(step.nbytes for step in self.plan.steps)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the result."""
        return sum(shard.nbytes for shard in self.shards)

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
        request = self.request
        return {
            "source": hashlib.sha256(content.encode()).hexdigest(),
            "target format": request.to,
            "group size": str(request.group_size),
            "algorithm": request.algorithm,
            "shard size": str(request.max_shard_bytes),
            "version of vllm-nanoquant": __version__,
            "version of torch": torch.__version__,
            "kind of device": torch.device(request.device).type,
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

        Killed at any moment, it can be run again and gives the same bytes.

        Args:
            progress: told of the bytes of each step's source tensors once it is dealt with.

        Raises:
            CheckpointError: tensors that do not fit, a source that is damaged or changes.
            UsageError: the target holds something else, or the disk is too small.
            OSError: the target cannot be written.
        """
        target = self.request.target
        _check_space(target, self.nbytes)
        with open_target(target, self.begun_with) as journal:
            request = self.request
            work = Work(
                self.source, self.fmt, journal, request.algorithm, torch.device(request.device)
            )
            files = {}
            for shard in self.shards:
                path = target / shard.name
                digest = write_shard(
                    path, shard, work.produce, journal, lambda s: progress(s.nbytes)
                )
                files[shard.name] = {"bytes": path.stat().st_size, "sha256": digest}
            for path in source_files.files_to_copy(self.source.folder):
                with durable(target / path.name) as temporary:
                    shutil.copyfile(path, temporary)
                files[path.name] = file_entry(target / path.name)
            report = self._finish(files, work, journal)
            journal.remove()
        return report

    def _finish(
        self, files: dict[str, dict[str, Any]], work: Work, journal: Journal
    ) -> dict[str, Any]:
        """Write report, index and config.json, in this order."""
        target = self.request.target
        config = source_files.rewritten_config(
            _plain_config(self.source.config),
            self.plan.quantization,
            source_files.kinds_of(self.source.config),
        )
        files[naming.CONFIG] = text_entry(config)
        index = None
        if len(self.shards) > 1:
            metadata = {"total_size": self.nbytes}
            index = canonical_json({"metadata": metadata, "weight_map": weight_map(self.shards)})
            files[naming.INDEX] = text_entry(index)
        origin = source_files.inherited(self.source, self.request.name)
        origin |= {
            "name": origin.get("base_model", self.source.folder.resolve().name),
            "format": OURS if self.fmt is None else self.fmt.name,
            "files": {shard.path.name: work.digest(shard.path) for shard in self.source.shards},
        }
        # What is kept or becomes dense is not in the report.
        records = {
            step.key: entry["record"]
            for step in self.plan.steps
            if step.group_size is not None and (entry := journal.get(step.key))
        }
        report = make_report(self.plan.quantization, origin, records, files, self.begun_with)
        write_durable(target / naming.REPORT, canonical_json(report).encode())
        if index is not None:
            write_durable(target / naming.INDEX, index.encode())
        write_durable(target / naming.CONFIG, config.encode())
        return report


def prepare(request: Request) -> Job:
    """Open the source and plan the result. Writes nothing.

    Raises:
        UsageError: the source is not quantized, is ours already, or the target does not suit.
        FormatError: its format cannot be read, or the target format cannot say it.
        CheckpointError: it is damaged.
    """
    if request.to not in TARGETS:
        raise UsageError(f"{request.to!r} is no format to convert to; {' and '.join(TARGETS)} are")
    check_target(request.folder, request.target)
    source = open_source(request.folder)
    if stored_recipe(source.config) is not None:
        fmt = None
        plan = _plan_of_ours(source, request)
    else:
        fmt = detect(source.config, source.tensors)
        if fmt is None:
            raise UsageError(
                f"{printable(str(request.folder))} is not quantized; `nanoquant quantize` makes an "
                "int4 checkpoint of it"
            )
        if request.to != OURS:
            raise UsageError(
                f"the source is a checkpoint of {fmt.name}; only ours can be converted to "
                f"{request.to}: convert it to ours first"
            )
        if request.algorithm == "gptq":
            raise UsageError("algorithm gptq needs calibration; choose minmax or mse to convert")
        plan = plan_import(source, fmt, request.group_size, request.algorithm)
    return Job(request, source, fmt, plan, cut_into_shards(plan.steps, request.max_shard_bytes))


def open_source(folder: Path) -> Checkpoint:
    """Open a quantized checkpoint with all that its tool wrote beside the usual files.

    Raises:
        CheckpointError, UsageError: as `Checkpoint.open`; a tensor is there twice.
    """
    source = Checkpoint.open(folder)

    def read(name: str) -> dict[str, Any] | None:
        path = folder / name
        if not path.is_symlink() and not path.exists():
            return None
        check_inside(path)
        return read_object(path, MAX_CONFIG)

    shards = list(source.shards)
    if (folder / WEIGHTS_FILE).exists() and all(s.path.name != WEIGHTS_FILE for s in shards):
        extra = read_shard(folder, WEIGHTS_FILE)
        for name in extra.tensors:
            if name in source.tensors:
                raise CheckpointError(f"{at(extra.path, name)}: is in another file as well")
        shards.append(extra)
    return Checkpoint(folder, with_side_configs(source.config, read), shards)


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a conversion did, in numbers, from its report."""
    records: Iterable[Mapping[str, Any]] = report["tensors"].values()
    errors = [record["relative_error"] for record in records if "relative_error" in record]
    return {
        "int4": len(report["tensors"]),
        "requantized": len(errors),
        "mean_second_error": sum(errors) / len(errors) if errors else None,
        "rounded_scales": sum(record.get("rounded_scales", 0) for record in records),
        "largest_rounding": max(
            (record.get("largest_rounding", 0.0) for record in records), default=0.0
        ),
        "bytes": report["bytes"],
    }


def _plan_of_ours(source: Checkpoint, request: Request) -> ConvertPlan:
    if request.to == OURS:
        raise UsageError(
            f"{printable(str(request.folder))} is in our format already; vllm serves it as it is"
        )
    report = read_report(source.folder) or {"tensors": {}}
    shapes = {}
    for name, record in report["tensors"].items():
        shape = record.get("shape")
        if isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape):
            shapes[name.removesuffix(naming.WEIGHT)] = (shape[0], shape[1])
    return plan_export(source, shapes)


def _is_requantized(fmt: Format | None, step: ConvertStep) -> bool:
    if fmt is None or step.module is None or step.group_size is None:
        return False
    return fmt.modules[step.module].group_size is None


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without what an older quantization left in it.

    FP16 becomes BF16: our method computes in it, and vLLM takes the dtype from here.
    """
    result = {key: value for key, value in config.items() if key != "compression_config"}
    inner = result.get("text_config")
    if isinstance(inner, dict):
        left = ("quantization_config", "compression_config")
        result["text_config"] = {k: v for k, v in inner.items() if k not in left}
    for part in (result, result.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and part.get(key) == "float16":
                part[key] = "bfloat16"
    return result


def _check_space(target: Path, needed: int) -> None:
    there = sum(path.stat().st_size for path in target.iterdir()) if target.is_dir() else 0
    if needed - there > free_bytes(target):
        raise UsageError(
            f"{printable(str(target))} needs {(needed - there) / 1e9:.2f} GB, and its disk has "
            f"{free_bytes(target) / 1e9:.2f} GB left"
        )
