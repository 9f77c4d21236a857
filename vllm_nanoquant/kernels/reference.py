# SPDX-License-Identifier: Apache-2.0
"""The W4A16 product in plain torch: the oracle for every kernel, and what a CPU runs."""

from __future__ import annotations

import torch

from vllm_nanoquant.quantize.groups import unpack_nibbles

# Weights dequantized at a time: 64 MB in fp32.
CHUNK_WEIGHTS = 1 << 24


def dequantize(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    group_size: int,
    group_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """W [N, K] = (q + zero_point) * scale, computed in fp32 (fp64 for that dtype) and then rounded.

    `packed` is uint8 [ceil(K / 2), N], `scale` and `zero_point` are bf16 [G, N], K is
    `in_features`; column k is in group (k + group_offset) // group_size.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    weight = unpack_nibbles(packed, in_features).to(compute)
    columns = torch.arange(in_features, device=packed.device)
    group = (columns + group_offset) // group_size
    weight += zero_point.to(compute).t()[:, group]
    weight *= scale.to(compute).t()[:, group]
    return weight.to(dtype)


def w4a16_reference(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    """Multiply x [..., K] by a transposed int4 weight [N, K], add bias [N]: [..., N].

    Computed in fp32 and rounded once to x.dtype. Any strides, any leading dimensions, 0 tokens
    included. The weight is dequantized a block of rows at a time, never whole if it is large.
    """
    in_features = x.shape[-1]
    out_features = packed.shape[1]
    tokens = x.reshape(-1, in_features).float()
    y = tokens.new_empty((tokens.shape[0], out_features))
    block = max(1, CHUNK_WEIGHTS // in_features)
    for start in range(0, out_features, block):
        rows = slice(start, start + block)
        weight = dequantize(
            packed[:, rows],
            scale[:, rows],
            zero_point[:, rows],
            in_features,
            group_size,
            group_offset,
        )
        y[:, rows] = tokens @ weight.t()
    if bias is not None:
        y += bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], out_features)
