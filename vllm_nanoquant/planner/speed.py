# SPDX-License-Identifier: Apache-2.0
"""Predicted decode speed: bytes over bandwidth, and the time of everything else.

**A prediction, not a measurement.** A step takes as long as reading what it must read, at a share
of the bandwidth of the data sheet, and a constant time for each layer: launches, latencies, small
kernels, all-reduces. Shares and times are fitted to what this project measured on H200s
(`benchmarks/end_to_end/results`); docs/planning.md says how far off they are there. Other GPUs get
the same shares and times, and the bandwidth of their data sheets; how right that is has not been
measured. Contexts are short: keys and values are not counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_nanoquant.checkpoint.errors import UsageError, printable
from vllm_nanoquant.planner.memory import served_bytes
from vllm_nanoquant.planner.numbers import MIB
from vllm_nanoquant.planner.weights import Part, Weight
from vllm_nanoquant.recipe import Scheme

MEASURED_SHARE = 0.91
"""Share of the data sheet's bandwidth at which an H200 reads weights and states."""
OTHER_SHARE = 0.775
"""The same for GPUs that were not measured: what the model of the decode kernel allows
(`benchmarks/kernels/predict.py`)."""
LAYER_US = 26.5
"""Microseconds of a layer besides, at batch 1."""
SEQUENCE_US = 0.9
"""Microseconds more for each further sequence, per layer."""
ALL_REDUCE_US = 2.0
"""Microseconds of a layer's all-reduce over NVLink; over PCIe it takes longer."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as its data sheet and ``nvidia-smi`` describe it.

    Attributes:
        name: of the GPU.
        memory: bytes, as ``nvidia-smi`` tells them.
        bandwidth: of the memory, bytes per second.
        share: of it that a decode step gets.
    """

    name: str
    memory: int
    bandwidth: float
    share: float = OTHER_SHARE


GPUS = (
    Gpu("RTX 3090", 24576 * MIB, 936e9),
    Gpu("RTX 4090", 24564 * MIB, 1008e9),
    Gpu("A10G", 23028 * MIB, 600e9),
    Gpu("L4", 23034 * MIB, 300e9),
    Gpu("L40S", 46068 * MIB, 864e9),
    Gpu("A100 80GB", 81920 * MIB, 2039e9),
    Gpu("H100", 81559 * MIB, 3350e9),
    Gpu("H200", 143771 * MIB, 4800e9, MEASURED_SHARE),
)


def known_gpu(name: str) -> Gpu:
    """A GPU by its name, with or without NVIDIA's in front of it.

    Raises:
        UsageError: it is not known.
    """
    wanted = re.sub(r"nvidia|geforce|[^a-z0-9]", "", name.lower())
    for gpu in GPUS:
        if re.sub("[^a-z0-9]", "", gpu.name.lower()) == wanted:
            return gpu
    known = ", ".join(gpu.name for gpu in GPUS)
    raise UsageError(f"--gpu {printable(name)!r} is not known; known: {known}; use --gpu-memory")


@dataclass(frozen=True)
class Traffic:
    """What a decode step reads and writes on one rank.

    Attributes:
        weights: bytes of weights outside of routed experts.
        experts: bytes of all routed experts.
        state: bytes of one sequence's Mamba states.
        layers: of the model.
        choice: share of the experts that a token chooses; 0 without any.
    """

    weights: int
    experts: int
    state: int
    layers: int
    choice: float

    def expert_share(self, batch: int) -> float:
        """Share of the experts that a batch chooses, each token by itself."""
        return 1 - (1 - self.choice) ** batch

    def token_bytes(self) -> int:
        """Bytes of a step of one sequence: weights, and states read and written."""
        return self.weights + round(self.choice * self.experts) + 2 * self.state

    def step_us(self, gpu: Gpu, batch: int, ranks: int = 1) -> float:
        """Microseconds of a decode step of so many sequences."""
        experts = self.expert_share(batch) * self.experts
        moved = self.weights + experts + 2 * self.state * batch
        layer = LAYER_US + SEQUENCE_US * (batch - 1) + (ALL_REDUCE_US if ranks > 1 else 0)
        return 1e6 * moved / (gpu.bandwidth * gpu.share) + layer * self.layers

    def tokens_per_second(self, gpu: Gpu, batch: int, ranks: int = 1) -> float:
        """Tokens per second of all sequences of a batch together."""
        return 1e6 * batch / self.step_us(gpu, batch, ranks)


def traffic_of(
    weights: Sequence[Weight],
    schemes: Mapping[str, Scheme],
    state: int,
    layers: int,
    choice: float,
) -> Traffic:
    """What a decode step reads, of weights as they are served.

    Args:
        weights: of one rank.
        schemes: of the modules that are int4.
        state: bytes of one sequence's Mamba states.
        layers: of the model.
        choice: share of the experts that a token chooses.
    """
    plain = experts = 0
    tied = all(weight.part is not Part.LM_HEAD for weight in weights)
    for weight in weights:
        nbytes = served_bytes(weight, schemes.get(weight.module))
        if weight.part is Part.EMBEDDING and not tied:
            continue  # a row for each token
        if weight.part is Part.EXPERTS:
            experts += nbytes
        else:
            plain += nbytes
    return Traffic(plain, experts, state, layers, choice)
