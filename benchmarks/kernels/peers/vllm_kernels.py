# SPDX-License-Identifier: Apache-2.0
"""Asking vLLM whether one of its kernels takes a weight, and importing what it is called by."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from benchmarks.kernels.peers.base import Refused, importable, require_whole_groups

KERNELS = "vllm.model_executor.kernels.linear.mixed_precision"


def custom_ops() -> ModuleType:
    """The module of vLLM that calls its compiled kernels."""
    return importable("vllm._custom_ops")


def uint4b8() -> Any:
    """Symmetric int4 as vLLM names it: an unsigned integer less 8."""
    return importable("vllm.scalar_type").scalar_types.uint4b8


def ask(kernel: str, dense: torch.Tensor, group_size: int) -> None:
    """Raise Refused, with vLLM's own reason, unless its kernel takes the weight and this GPU.

    Args:
        kernel: a class of vLLM's `kernels.linear.mixed_precision`, such as MarlinLinearKernel.
        dense: bf16 [N, K] on a GPU.
        group_size: columns per scale.

    Raises:
        GroupRefused: the groups do not divide K.
        Refused: anything else.
    """
    n, k = dense.shape
    require_whole_groups(k, group_size)
    module = importable(KERNELS)
    if not hasattr(module, kernel):
        raise Refused(f"this vLLM has no {kernel}")
    found = getattr(module, kernel)
    major, minor = torch.cuda.get_device_capability(dense.device)
    if 10 * major + minor < found.get_min_capability():
        raise Refused(f"{kernel} needs SM{found.get_min_capability()}, this is SM{major}{minor}")
    possible, reason = found.can_implement(
        module.MPLinearLayerConfig(
            full_weight_shape=(k, n),
            partition_weight_shape=(k, n),
            weight_type=uint4b8(),
            act_type=torch.bfloat16,
            group_size=group_size,
            zero_points=False,
            has_g_idx=False,
        )
    )
    if not possible:
        raise Refused(f"{kernel}: {reason}")
