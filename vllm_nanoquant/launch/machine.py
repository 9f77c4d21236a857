# SPDX-License-Identifier: Apache-2.0
"""What the model is going to run on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_nanoquant.doctor.asking import ask_command, ask_probes

_SECONDS = 60.0
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_MIB = 1 << 20
# The driver keeps some hundred MiB for itself.
_MOST_KEPT = 0.05


@dataclass(frozen=True)
class Machine:
    """GPUs, or that there are none.

    Attributes:
        gpus: bytes of each GPU that vLLM will see, in its order, as ``nvidia-smi`` tells them.
        is_cpu: torch is built for the CPU, and so vLLM runs there.
    """

    gpus: tuple[int, ...] = ()
    is_cpu: bool = False

    def memory(self, count: int) -> int | None:
        """Bytes of the smallest of the first GPUs; None where there are fewer than `count`."""
        return min(self.gpus[:count]) if 0 < count <= len(self.gpus) else None


def find_machine() -> Machine:
    """Ask torch, in another process, which GPUs vLLM will see (CUDA_VISIBLE_DEVICES is heeded).

    Where torch cannot say, nothing is known of the machine, and vLLM will say why.
    """
    answer = ask_probes(["torch"], _SECONDS)["torch"].value
    if answer is None:
        return Machine()
    is_cpu = not answer["cuda"] and not answer["hip"]
    seen = [int(device["bytes"]) for device in answer["devices"]]
    if not seen:
        return Machine(is_cpu=is_cpu)
    return Machine(with_drivers_part(seen, _totals()), is_cpu)


def with_drivers_part(seen: Sequence[int], totals: Sequence[int]) -> tuple[int, ...]:
    """Bytes of GPUs with what the driver keeps.

    Args:
        seen: bytes of each GPU as torch tells them, without the driver's part.
        totals: those that nvidia-smi lists, in any order and perhaps of more GPUs.
    """
    return tuple(
        min((total for total in totals if each <= total <= each * (1 + _MOST_KEPT)), default=each)
        for each in seen
    )


def _totals() -> list[int]:
    if not shutil.which(_NVIDIA_SMI[0]):
        return []
    lines = (ask_command(_NVIDIA_SMI).value or {}).get("lines", [])
    return [int(line) * _MIB for line in lines if line.isdecimal()]
