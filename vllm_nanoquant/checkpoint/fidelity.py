# SPDX-License-Identifier: Apache-2.0
"""How far an int4 weight is from what it stands for."""

import torch

from vllm_nanoquant.quantize.groups import WHOLE_ROW, QuantizedWeight, unpack_nibbles

# Weights compared at a time: temporaries take some 16 bytes each.
CHUNK_WEIGHTS = 1 << 22


def dequantize_rows(weight: QuantizedWeight, rows: slice) -> torch.Tensor:
    """Rows of W = (q + zero_point) * scale in fp32: [rows, K], on the weight's device."""
    values = unpack_nibbles(weight.packed[:, rows], weight.in_features).float()
    size = weight.in_features if weight.group_size == WHOLE_ROW else weight.group_size
    scale, zero_point = (part[:, rows].t().float() for part in (weight.scale, weight.zero_point))
    whole = weight.in_features // size * size if weight.group_offset == 0 else 0
    if whole:
        groups = values[:, :whole].unflatten(1, (-1, size))
        count = groups.shape[1]
        groups.add_(zero_point[:, :count, None]).mul_(scale[:, :count, None])
    if whole < weight.in_features:
        columns = torch.arange(whole, weight.in_features, device=values.device)
        group = (columns + weight.group_offset) // size
        values[:, whole:] += zero_point[:, group]
        values[:, whole:] *= scale[:, group]
    return values


def squared_norms(
    weight: torch.Tensor, quantized: QuantizedWeight, order: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared Frobenius norms of the difference and of the weight: fp64 [2], on the CPU.

    Sums are in fp64, a chunk of rows at a time.

    Args:
        weight: W [N, K], any floating dtype; its rows are sent to the quantized weight's device.
        quantized: what stands for it.
        order: int64 [K]; column j of `quantized` is column order[j] of W. None: the same order.
    """
    device = quantized.packed.device
    chunk = max(1, CHUNK_WEIGHTS // weight.shape[1])
    total = torch.zeros(2, dtype=torch.float64)
    for start in range(0, weight.shape[0], chunk):
        rows = slice(start, start + chunk)
        wanted = weight[rows].to(device=device, dtype=torch.float32)
        if order is not None:
            wanted = wanted[:, order]
        difference = dequantize_rows(quantized, rows).sub_(wanted)
        parts = [torch.linalg.vector_norm(x, dtype=torch.float64) for x in (difference, wanted)]
        total += torch.stack(parts).cpu() ** 2
    return total


def relative_error(
    weight: torch.Tensor, quantized: QuantizedWeight, order: torch.Tensor | None = None
) -> float:
    """Frobenius norm of the difference over that of the weight; arguments as `squared_norms`."""
    return error_of(squared_norms(weight, quantized, order))


def error_of(norms: torch.Tensor) -> float:
    """Relative error by two squared norms, of the difference and of the weight.

    Rounded to six digits, so that the order of sums does not show. 0.0 where both are zero,
    infinity where only the weight is.
    """
    difference, norm = norms.sqrt().tolist()
    if norm == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(f"{difference / norm:.6g}")
