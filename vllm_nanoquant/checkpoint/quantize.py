# SPDX-License-Identifier: Apache-2.0
"""From a stock checkpoint to an int4 one that vLLM serves as it is, tensor by tensor.

`prepare` reads headers and refuses what cannot work; `QuantizeJob.run` writes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_nanoquant.checkpoint import naming
from vllm_nanoquant.checkpoint.calibrate import (
    CalibratedWeights,
    Calibration,
    calibration_bytes,
    read_sequences,
)
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, at
from vllm_nanoquant.checkpoint.fidelity import relative_error
from vllm_nanoquant.checkpoint.job import MAX_SHARD_BYTES, Job, Produce, check_target
from vllm_nanoquant.checkpoint.journal import Journal
from vllm_nanoquant.checkpoint.plan import Plan, Step, make_plan
from vllm_nanoquant.checkpoint.reader import Checkpoint
from vllm_nanoquant.checkpoint.report import producer
from vllm_nanoquant.checkpoint.rows import RowQuantizer
from vllm_nanoquant.checkpoint.source import refuse_quantized, rewritten_config
from vllm_nanoquant.checkpoint.writer import (
    PlannedShard,
    Produced,
    cut_into_shards,
    tensor_bytes,
)
from vllm_nanoquant.recipe import METHOD, Recipe, Scheme

DEFAULT_RECIPE = Recipe(algorithm="mse")
"""What is done where nothing else is asked for. Offline there is time for a search, so it is not
the recipe's own default, which is for quantizing while vLLM loads."""

_SAMPLE_SHAPE = (1024, 4096)


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
    recipe: Recipe = DEFAULT_RECIPE
    max_shard_bytes: int = MAX_SHARD_BYTES
    device: str = "cpu"
    calibration: Calibration | None = None


@dataclass(frozen=True)
class QuantizeJob(Job[Step]):
    """A request that can be carried out.

    Attributes:
        request: what was asked for.
        source: the stock checkpoint.
        plan: what will be written.
        shards: the plan, cut into files.
        sequences: calibration text as token ids; empty for the other algorithms.
    """

    request: Request
    source: Checkpoint
    plan: Plan
    shards: tuple[PlannedShard[Step], ...]
    sequences: Sequence[torch.Tensor] = ()

    @property
    def quantization(self) -> dict[str, Any]:
        """The ``quantization_config`` of the result: every option, whatever is the default."""
        recipe = self.plan.recipe.model_dump(mode="json")
        version = {"format_version": naming.FORMAT_VERSION}
        return {"quant_method": METHOD, **version, **recipe, "producer": producer()}

    @property
    def config(self) -> str:
        """config.json of the result."""
        return rewritten_config(self.source.config, self.quantization, self.plan.kinds)

    @property
    def settings(self) -> dict[str, str]:
        """What of the request the bytes of the result depend on."""
        calibration = self.request.calibration
        return {
            "calibration text": calibration.digest if calibration else "none",
            "recipe": self.plan.recipe.fingerprint,
        }

    @property
    def peak_bytes(self) -> int:
        """Estimate of the memory that it takes beyond torch itself, on CPU and GPU together."""
        quantizing = 3 * max(step.source.nbytes for step in self.steps) // 2 + (128 << 20)
        return max(quantizing, sum(self.calibration_bytes.values()))

    @property
    def calibration_bytes(self) -> dict[str, int]:
        """Memory that calibration takes, by what it is for; empty where there is none."""
        if not self.sequences:
            return {}
        tokens = sum(len(ids) for ids in self.sequences)
        return calibration_bytes(self.source, self.steps, tokens)

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
        weights = sum(step.source.numel for step in self.steps if step.scheme)
        return rates[-1] * weights

    @contextmanager
    def producer(self, journal: Journal) -> Iterator[Produce[Step]]:
        """What quantizes or copies a tensor; with GPTQ, every weight is looked at first."""
        calibrated = None
        if self.sequences:
            for shard in self.source.shards:
                self.source_digest(shard.path, journal)
            request = self.request
            device = torch.device(request.device)
            calibrated = CalibratedWeights(
                request.target, self.source, request.recipe, self.sequences, device
            )
            calibrated.check_weights(self.steps, journal)
        with RowQuantizer(torch.device(self.request.device)) as quantizer:
            yield _Work(self.source, quantizer, calibrated).produce
        if calibrated is not None:
            calibrated.remove()


class _Work:
    """Makes the bytes of each step."""

    def __init__(
        self, source: Checkpoint, quantizer: RowQuantizer, calibrated: CalibratedWeights | None
    ) -> None:
        self._source = source
        self._quantizer = quantizer
        self._calibrated = calibrated

    def produce(self, step: Step) -> Produced:
        """Bytes of one step, quantized or copied."""
        source = self._source
        if step.scheme is None:
            return Produced(source.chunks(step.source.name), {})
        module = step.source.name.removesuffix(naming.WEIGHT)
        ready = self._calibrated.get(module) if self._calibrated else None
        scheme = step.scheme
        if self._calibrated and ready is None:
            scheme = scheme._replace(algorithm="mse")  # no layer that calibration runs has it
        weight = source.load(step.source.name)
        place = at(source.file_of(step.source.name), step.source.name)
        try:
            if ready is None:
                quantized, error = self._quantizer(weight, scheme)
            else:
                quantized, error = ready, relative_error(weight, ready)
        except ValueError as problem:
            raise CheckpointError(f"{place}: {problem}") from None
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


def prepare(request: Request) -> QuantizeJob:
    """Open the source and plan the result. Writes nothing.

    Raises:
        RecipeError, UsageError, CheckpointError: as `check_target`, `Checkpoint.open`,
            `source.refuse_quantized`, `plan.make_plan` and `calibrate.read_sequences`.
    """
    check_target(request.folder, request.target)
    if (request.recipe.algorithm == "gptq") != (request.calibration is not None):
        raise UsageError(
            "algorithm 'gptq' and --calibration-text FILE belong together: give both, or neither"
        )
    source = Checkpoint.open(request.folder)
    refuse_quantized(source)
    plan = make_plan(source, request.recipe)
    shards = cut_into_shards(plan.steps, request.max_shard_bytes)
    sequences: Sequence[torch.Tensor] = ()
    if request.calibration is not None:
        sequences = read_sequences(source, plan.steps, request.calibration)
    return QuantizeJob(request, source, plan, shards, sequences)
