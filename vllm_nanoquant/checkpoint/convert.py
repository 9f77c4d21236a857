# SPDX-License-Identifier: Apache-2.0
"""From another tool's quantized checkpoint to ours, and from ours to `pack-quantized`.

Integers are taken over as they are. FP8 and NVFP4 weights are read as dense ones and quantized
again, which puts a second error on top of the first; the report says how large the second one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.convert_plan import (
    ConvertPlan,
    ConvertStep,
    plan_export,
    plan_import,
)
from vllm_nanoquant.checkpoint.convert_work import Work
from vllm_nanoquant.checkpoint.errors import UsageError, printable
from vllm_nanoquant.checkpoint.formats import Format, detect
from vllm_nanoquant.checkpoint.job import MAX_SHARD_BYTES, Job, Produce, check_target
from vllm_nanoquant.checkpoint.journal import Journal
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.report import read_report
from vllm_nanoquant.checkpoint.source import kinds_of, open_source, rewritten_config
from vllm_nanoquant.checkpoint.structure import stored_recipe
from vllm_nanoquant.checkpoint.writer import PlannedShard, cut_into_shards

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
    algorithm: str = "mse"
    max_shard_bytes: int = MAX_SHARD_BYTES
    device: str = "cpu"


@dataclass(frozen=True)
class ConvertJob(Job[ConvertStep]):
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
        return [step.key for step in self.plan.steps if step.module and not step.is_int4]

    @property
    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config`` of the result."""
        return self.plan.quantization

    @property
    def config(self) -> str:
        """config.json of the result."""
        plain = _plain_config(self.source.config)
        return rewritten_config(plain, self.quantization, kinds_of(self.source.config))

    @property
    def settings(self) -> dict[str, str]:
        """What of the request the bytes of the result depend on."""
        request = self.request
        return {
            "target format": request.to,
            "group size": str(request.group_size),
            "algorithm": request.algorithm,
        }

    @property
    def origin(self) -> dict[str, Any]:
        """What the report says of the source, besides its files."""
        return super().origin | {"format": OURS if self.fmt is None else self.fmt.name}

    @contextmanager
    def producer(self, journal: Journal) -> Iterator[Produce[ConvertStep]]:
        """What converts or copies a tensor."""
        request = self.request
        device = torch.device(request.device)
        yield Work(self.source, self.fmt, request.algorithm, device).produce


def prepare(request: Request) -> ConvertJob:
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
    return ConvertJob(
        request, source, fmt, plan, cut_into_shards(plan.steps, request.max_shard_bytes)
    )


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
