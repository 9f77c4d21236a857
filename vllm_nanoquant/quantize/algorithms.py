# SPDX-License-Identifier: Apache-2.0
"""The quantizers by name, as a recipe names them."""

from __future__ import annotations

import torch

from vllm_nanoquant.quantize.gptq import quantize_gptq
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax
from vllm_nanoquant.quantize.mse import quantize_mse

ALGORITHMS = ("minmax", "mse", "gptq")
"""`recipe.Algorithm` has the same names; a test compares them."""


def quantize(
    weight: torch.Tensor,
    group_size: int,
    algorithm: str,
    device: torch.device | None = None,
    hessian: torch.Tensor | None = None,
) -> QuantizedWeight:
    """Quantize W [N, K] (bf16, fp16 or fp32) with the named algorithm.

    Args:
        weight: W [N, K].
        group_size: columns per group, the last one ragged where the size does not divide K.
        algorithm: ``minmax``, ``mse`` or ``gptq``.
        device: where to compute, and where the result lies; by default where the weight is.
        hessian: X^T X [K, K] in fp32 of the inputs seen in calibration; ``gptq`` needs it, and the
            other two are done without.

    Raises:
        ValueError: an unknown algorithm, ``gptq`` without a Hessian, or a weight that the
            algorithm refuses.
    """
    if algorithm == "minmax":
        return quantize_minmax(weight, group_size, device)
    if algorithm == "mse":
        return quantize_mse(weight, group_size, device)
    if algorithm == "gptq":
        if hessian is None:
            raise ValueError(
                "algorithm 'gptq' needs calibration text, which only an offline quantization has; "
                "quantize the checkpoint beforehand, or use 'mse'"
            )
        return quantize_gptq(weight, hessian, group_size, device)
    raise ValueError(f"algorithm is {algorithm!r}; it must be one of {', '.join(ALGORITHMS)}")
