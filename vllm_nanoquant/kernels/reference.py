# SPDX-License-Identifier: Apache-2.0
"""The W4A16 product in plain torch: the oracle for every kernel, and what a CPU runs."""

from __future__ import annotations

from dataclasses import replace

import torch

from vllm_nanoquant.kernels.layout import (
    ARRIVALS_PER_BLOCK,
    BLOCK,
    RuntimeWeight,
    group_parameters,
    integers,
)
from vllm_nanoquant.quantize.groups import WHOLE_ROW, QuantizedWeight, unpack_nibbles

# Weights dequantized at a time: 64 MB in fp32.
CHUNK_WEIGHTS = 1 << 24


def group_of_columns(
    in_features: int, group_size: int, group_offset: int, device: torch.device
) -> torch.Tensor:
    """Group of each column: int64 [K]; column k is in group (k + group_offset) // group_size."""
    columns = torch.arange(in_features, device=device)
    if group_size == WHOLE_ROW:
        return torch.zeros_like(columns)
    return (columns + group_offset) // group_size


def dequantize(weight: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """W [N, K] = (q + zero_point) * scale, computed in fp32 (fp64 for that dtype), then rounded."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    group = group_of_columns(
        weight.in_features, weight.group_size, weight.group_offset, weight.packed.device
    )
    values = unpack_nibbles(weight.packed, weight.in_features).to(compute)
    values += weight.zero_point.to(compute).t()[:, group]
    values *= weight.scale.to(compute).t()[:, group]
    return values.to(dtype)


def dequantize_transposed(weight: RuntimeWeight) -> torch.Tensor:
    """The transposed weight in fp32 [K, N], as `dequantize` gives it."""
    group = group_of_columns(
        weight.in_features, weight.group_size, weight.group_offset, weight.words.device
    )
    scale, zero_point = group_parameters(weight)
    values = integers(weight).float()
    values += zero_point.float()[group]
    values *= scale.float()[group]
    return values


def block_rows(weight: RuntimeWeight, first: int, count: int) -> RuntimeWeight:
    """Blocks `first` to first + count - 1 (of 64 rows) of a weight, as a weight of their own."""
    blocks = slice(first, first + count)
    tiles = slice(first * BLOCK // 16, (first + count) * BLOCK // 16)
    arrivals = slice(first * ARRIVALS_PER_BLOCK, (first + count) * ARRIVALS_PER_BLOCK)
    return replace(
        weight,
        words=weight.words[blocks],
        scales=weight.scales[:, tiles].contiguous(),
        arrivals=weight.arrivals[arrivals],
        out_features=min(count * BLOCK, weight.out_features - first * BLOCK),
    )


def w4a16_reference(
    x: torch.Tensor, weight: RuntimeWeight, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply x [..., K] by a transposed int4 weight [N, K], add bias [N]: [..., N].

    Computed in fp32 and rounded once to x.dtype. Any strides, any leading dimensions, 0 tokens
    included. The weight is dequantized some rows at a time, never whole if it is large.
    """
    n, k = weight.shape
    tokens = x.reshape(-1, k).float()
    y = tokens.new_empty((tokens.shape[0], n))
    blocks = weight.words.shape[0]
    step = max(1, CHUNK_WEIGHTS // (k * BLOCK))
    for first in range(0, blocks, step):
        part = block_rows(weight, first, min(step, blocks - first))
        rows = slice(first * BLOCK, first * BLOCK + part.out_features)
        y[:, rows] = tokens @ dequantize_transposed(part)
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], n)
