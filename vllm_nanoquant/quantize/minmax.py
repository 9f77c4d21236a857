# SPDX-License-Identifier: Apache-2.0
"""Asymmetric min-max quantization to int4: round to nearest, no calibration data."""

from __future__ import annotations

import torch

from vllm_nanoquant.quantize.groups import (
    WHOLE_ROW,
    QuantizedWeight,
    group_count,
    pack_nibbles,
)
from vllm_nanoquant.quantize.ranges import require_finite, scale_and_zero_point, validate_weight

# Weights quantized at a time. Temporaries take about 6.5 bytes per weight: 27 MB.
CHUNK_WEIGHTS = 1 << 22


def quantize_minmax(
    weight: torch.Tensor, group_size: int, device: torch.device | None = None
) -> QuantizedWeight:
    """Quantize W [N, K] (bf16, fp16 or fp32) on `device`, by default the one it is on.

    A weight on another device is sent over a chunk of rows at a time, never whole.

    Per row and group of `group_size` columns, the last one ragged when the size does not divide K:
    `scale = (max - min) / 15` and `zero_point = min / scale` with min <= 0 <= max, both rounded to
    bf16, and `q = clamp(round(w / scale - zero_point), 0, 15)` with the rounded values, ties to
    even. The arithmetic is fp32 and gives the same bytes on every device. A group whose scale
    rounds to 0 gets q = 0, zero point 0 and scale 1: it comes back as exact zeros.

    Temporaries stay under 64 MB (one row's worth if a row alone needs more); the device is waited
    for once. Raises ValueError for another dtype, an empty weight, an unknown group size, or
    weights that are not finite (how many, and the first row).
    """
    validate_weight(weight, group_size)
    rows, columns = weight.shape
    device = device or weight.device
    groups = group_count(columns, group_size)
    width = columns if group_size == WHOLE_ROW else group_size
    packed = torch.empty(((columns + 1) // 2, rows), dtype=torch.uint8, device=device)
    scale = torch.empty((groups, rows), dtype=torch.bfloat16, device=device)
    zero_point = torch.empty_like(scale)
    chunk = min(rows, max(1, CHUNK_WEIGHTS // (groups * width)))
    # Zero columns pad the ragged group; they change neither min(0, ...) nor max(0, ...).
    work = torch.zeros((chunk, groups * width), dtype=torch.float32, device=device)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        values = work[: part.stop - start]
        values[:, :columns] = weight[part]
        part_scale, part_zero = _quantize_chunk(values.view(-1, groups, width))
        scale[:, part] = part_scale.t()
        zero_point[:, part] = part_zero.t()
        packed[:, part] = pack_nibbles(values[:, :columns].to(torch.uint8))
        values[:, columns:] = 0.0
    require_finite(weight, scale)
    return QuantizedWeight(packed, scale, zero_point, group_size, columns)


def _quantize_chunk(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace fp32 values [rows, G, g] by their integers; return scale and zero point [rows, G]."""
    low = values.amin(dim=-1).clamp_(max=0.0)
    high = values.amax(dim=-1).clamp_(min=0.0)
    scale, zero_point = scale_and_zero_point(low, high)
    values.div_(scale.float().unsqueeze(-1))
    values.sub_(zero_point.float().unsqueeze(-1)).round_().clamp_(0.0, 15.0)
    return scale, zero_point
