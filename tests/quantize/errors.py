# SPDX-License-Identifier: Apache-2.0
"""Squared errors of a quantized weight in fp64, from its stored bytes alone, in numpy."""

from __future__ import annotations

import numpy as np
import torch

from vllm_nanoquant.quantize.groups import WHOLE_ROW, QuantizedWeight


def values_of(weight: QuantizedWeight) -> np.ndarray:
    """W [N, K] in fp64."""
    packed = weight.packed.numpy()
    q = np.empty((2 * packed.shape[0], packed.shape[1]))
    q[0::2], q[1::2] = packed & 15, packed >> 4
    size = weight.in_features if weight.group_size == WHOLE_ROW else weight.group_size
    group = np.arange(weight.in_features) // size
    scale = weight.scale.double().numpy()[group]
    return ((q[: weight.in_features] + weight.zero_point.double().numpy()[group]) * scale).T


def group_errors(
    weight: torch.Tensor, result: QuantizedWeight, importance: torch.Tensor | None = None
) -> np.ndarray:
    """Weighted squared error of each row and group, [N, G]."""
    lost = (values_of(result) - weight.double().numpy()) ** 2
    if importance is not None:
        lost = lost * importance.double().numpy()
    size = result.in_features if result.group_size == WHOLE_ROW else result.group_size
    return np.add.reduceat(lost, np.arange(0, result.in_features, size), axis=1)


def row_errors(weight: torch.Tensor, result: QuantizedWeight, hessian: torch.Tensor) -> np.ndarray:
    """(w - w') H (w - w')^T of each row, [N]."""
    lost = values_of(result) - weight.double().numpy()
    return np.einsum("ni,ij,nj->n", lost, hessian.double().numpy(), lost)
