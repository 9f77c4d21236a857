# SPDX-License-Identifier: Apache-2.0
"""Product of many tokens with an int4 weight: dequantize into a scratch buffer, then cuBLAS."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.nibbles import load_group
from vllm_nanoquant.quantize.groups import group_count

# One Mamba in_proj of Nemotron-Nano-9B-v2 (22656 x 4480) fits whole; the lm_head goes in parts.
SCRATCH_BYTES = 256 << 20
BLOCK_N = 64
NUM_WARPS = 4


@triton.jit
def dequantize_kernel(
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    w_ptr: tl.tensor,
    n: int,
    k: int,
    first_n: int,
    block_columns: int,
    group_offset: int,
    GROUP_SIZE: tl.constexpr,
    OFFSET_IS_ODD: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write w [K, block_columns]: the transposed weight [K, N] from column first_n, rounded once.

    packed is uint8 [ceil(K / 2), N], scale and zero_point are bf16 [G, N]; all contiguous.
    """
    group = tl.program_id(1)
    # The group's first column; before 0 in a first group that the offset cuts.
    start = group * GROUP_SIZE - group_offset
    offs_w = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = first_n + offs_w
    in_n = offs_w < block_columns
    first, second = load_group(packed_ptr, start, offs_n, in_n, n, k, GROUP_SIZE, OFFSET_IS_ODD)
    scale = tl.load(scale_ptr + group * n + offs_n, mask=in_n, other=0.0).to(tl.float32)
    zero = tl.load(zero_point_ptr + group * n + offs_n, mask=in_n, other=0.0).to(tl.float32)
    for half in tl.static_range(2):
        nibbles = first if half == 0 else second
        w = (nibbles.to(tl.float32) + zero[None, :]) * scale[None, :]
        offs_k = start + 2 * tl.arange(0, GROUP_SIZE // 2) + half
        tl.store(
            w_ptr + offs_k.to(tl.int64)[:, None] * block_columns + offs_w[None, :],
            w.to(w_ptr.dtype.element_ty),
            mask=((offs_k >= 0) & (offs_k < k))[:, None] & in_n[None, :],
        )


def dequantize_columns(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    out: torch.Tensor,
    first: int,
    group_size: int,
    group_offset: int,
) -> None:
    """Write columns `first` onwards of the transposed weight [K, N] into out [K, columns].

    `out` is contiguous, bf16 or fp16, and lies within the weight: first + columns <= N.
    """
    in_features, columns = out.shape
    grid = (triton.cdiv(columns, BLOCK_N), group_count(in_features, group_size, group_offset))
    dequantize_kernel[grid](
        packed,
        scale,
        zero_point,
        out,
        packed.shape[1],
        in_features,
        first,
        columns,
        group_offset,
        GROUP_SIZE=group_size,
        OFFSET_IS_ODD=group_offset % 2 == 1,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
    )


def prefill(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    """Multiply x [M, K] by a transposed int4 weight [N, K], add bias [N]: [M, N] in x.dtype.

    Tensors as in `decode`, for any M >= 1. The scratch buffer takes at most SCRATCH_BYTES (or
    BLOCK_N columns, if those need more); a larger weight goes through it in several parts.
    """
    tokens, in_features = x.shape
    out_features = packed.shape[1]
    per_column = in_features * x.element_size()
    block = min(out_features, max(BLOCK_N, SCRATCH_BYTES // per_column // BLOCK_N * BLOCK_N))
    scratch = torch.empty(in_features * block, dtype=x.dtype, device=x.device)
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    for first in range(0, out_features, block):
        columns = slice(first, min(first + block, out_features))
        width = columns.stop - first
        weight = scratch[: in_features * width].view(in_features, width)
        dequantize_columns(packed, scale, zero_point, weight, first, group_size, group_offset)
        if bias is None:
            torch.mm(x, weight, out=y[:, columns])
        else:
            torch.addmm(bias[columns], x, weight, out=y[:, columns])
    return y
