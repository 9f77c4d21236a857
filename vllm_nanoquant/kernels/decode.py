# SPDX-License-Identifier: Apache-2.0
"""Triton product of a few tokens with an int4 weight.

One program takes BLOCK_N rows of W (columns of the packed bytes) and a run of groups along K. Per
group, with integers q, scale s and zero point z, the product is
`s * (sum(x * q) + z * sum(x))`: the sums run over exact small integers on the tensor cores, and
scale and zero point are applied once per group in fp32.

K is split over programs so that layers with few rows fill the GPU too. The partial sums go to a
workspace [SPLIT, M, N], and a second kernel adds them in fixed order, so that results do not
depend on timing. Neither the split nor any block depends on the number of tokens: a row of the
batch gives the same bits alone and in company, and one compiled kernel serves all of them.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.nibbles import load_group
from vllm_nanoquant.quantize.groups import group_count

# Rows of a tensor-core tile, and so the most tokens of one launch.
BLOCK_M = 16
BLOCK_N = 128
REDUCE_BLOCK_N = 512
NUM_WARPS = 4
NUM_STAGES = 1
# Programs wanted per multiprocessor, and the most parts that K is cut into.
PROGRAMS_PER_SM = 16
MAX_SPLIT = 32


@triton.jit
def nibbles_as_float(nibbles: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Integers 0 to 15 as bf16 or fp16, plus `magic_bias(dtype)`.

    The integer is put into the low mantissa bits of 128 (bf16) or 1024 (fp16), where one step is
    1. That is exact and costs one logic operation; an integer conversion costs several.
    """
    magic: tl.constexpr = 0x4300 if dtype == tl.bfloat16 else 0x6400
    return (nibbles.to(tl.int16) | magic).to(dtype, bitcast=True)


@triton.jit
def magic_bias(dtype: tl.constexpr) -> float:
    """What `nibbles_as_float` adds to each integer."""
    return 128.0 if dtype == tl.bfloat16 else 1024.0


@triton.jit(do_not_specialize=["tokens", "groups", "groups_per_split"])
def decode_kernel(
    x_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    tokens: int,
    n: int,
    k: int,
    groups: int,
    groups_per_split: int,
    group_offset: int,
    GROUP_SIZE: tl.constexpr,
    OFFSET_IS_ODD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write y [M, N] in x's dtype or, if IS_PARTIAL, fp32 sums [SPLIT, M, N] without the bias.

    x is [M, K], packed uint8 [ceil(K / 2), N], scale and zero_point bf16 [G, N], bias [N]; all
    contiguous.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pairs: tl.constexpr = GROUP_SIZE // 2
    split = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_g = tl.arange(0, GROUP_SIZE)
    in_n = offs_n < n
    in_m = offs_m < tokens
    y = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = split * groups_per_split
    for group in range(first, tl.minimum(first + groups_per_split, groups)):
        # The group's first column; before 0 in a first group that the offset cuts.
        start = group * GROUP_SIZE - group_offset
        offs_k = start + offs_g
        in_k = (offs_k >= 0) & (offs_k < k)
        x = tl.load(
            x_ptr + offs_m[:, None] * k + offs_k[None, :],
            mask=in_m[:, None] & in_k[None, :],
            other=0.0,
        )
        x_first, x_second = tl.split(tl.reshape(x, (BLOCK_M, pairs, 2)))
        first_half, second_half = load_group(
            packed_ptr, start, offs_n, in_n, n, k, GROUP_SIZE, OFFSET_IS_ODD
        )
        offs_s = group * n + offs_n
        scale = tl.load(scale_ptr + offs_s, mask=in_n, other=0.0).to(tl.float32)
        zero = tl.load(zero_point_ptr + offs_s, mask=in_n, other=0.0).to(tl.float32)
        zero -= magic_bias(dtype)
        dot = tl.dot(x_first, nibbles_as_float(first_half, dtype))
        dot = tl.dot(x_second, nibbles_as_float(second_half, dtype), dot)
        x_sum = tl.sum(x.to(tl.float32), axis=1)
        y += scale[None, :] * (dot + zero[None, :] * x_sum[:, None])
    offs_y = offs_m[:, None] * n + offs_n[None, :]
    in_y = in_m[:, None] & in_n[None, :]
    if IS_PARTIAL:
        tl.store(y_ptr + split.to(tl.int64) * tokens * n + offs_y, y, mask=in_y)
    else:
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)[None, :]
        tl.store(y_ptr + offs_y, y.to(dtype), mask=in_y)


@triton.jit(do_not_specialize=["tokens"])
def reduce_kernel(
    partial_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    tokens: int,
    n: int,
    SPLIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Write y [M, N]: partial [SPLIT, M, N] summed over its first axis in order, plus bias [N]."""
    row = tl.program_id(1)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < n
    y = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for split in tl.static_range(SPLIT):
        offset = (split * tokens + row).to(tl.int64) * n
        y += tl.load(partial_ptr + offset + offs_n, mask=in_n, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64) * n + offs_n, y.to(y_ptr.dtype.element_ty), mask=in_n)


def split_of(out_features: int, groups: int, multiprocessors: int) -> tuple[int, int]:
    """(parts that K is cut into, groups per part) for a layer; no part is empty.

    The number of tokens is left out on purpose: it must not change the order of any sum.
    """
    blocks = triton.cdiv(out_features, BLOCK_N)
    wanted = triton.cdiv(multiprocessors * PROGRAMS_PER_SM, blocks)
    per_split = triton.cdiv(groups, min(wanted, MAX_SPLIT, groups))
    return triton.cdiv(groups, per_split), per_split


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def decode(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    group_offset: int,
) -> torch.Tensor:
    """Multiply x [M, K] by a transposed int4 weight [N, K], add bias [N]: [M, N] in x.dtype.

    M is 1 to BLOCK_M. x is contiguous, starts at a multiple of 16 bytes (a kernel compiled for
    aligned rows is used for every batch) and is bf16 or fp16; `packed` is uint8 [ceil(K / 2), N],
    `scale` and `zero_point` are bf16 [G, N]. Nothing is checked here: the op does that.
    """
    tokens, in_features = x.shape
    out_features = packed.shape[1]
    groups = group_count(in_features, group_size, group_offset)
    split, per_split = split_of(out_features, groups, multiprocessors(x.device))
    y = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    target = y
    if split > 1:
        target = torch.empty((split, tokens, out_features), dtype=torch.float32, device=x.device)
    decode_kernel[(triton.cdiv(out_features, BLOCK_N), split)](
        x,
        packed,
        scale,
        zero_point,
        bias,
        target,
        tokens,
        out_features,
        in_features,
        groups,
        per_split,
        group_offset,
        GROUP_SIZE=group_size,
        OFFSET_IS_ODD=group_offset % 2 == 1,
        HAS_BIAS=bias is not None,
        IS_PARTIAL=split > 1,
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )
    if split > 1:
        reduce_kernel[(triton.cdiv(out_features, REDUCE_BLOCK_N), tokens)](
            target,
            bias,
            y,
            tokens,
            out_features,
            SPLIT=split,
            HAS_BIAS=bias is not None,
            BLOCK_N=REDUCE_BLOCK_N,
            num_warps=4,
        )
    return y
