# SPDX-License-Identifier: Apache-2.0
"""Triton: many tokens through a mixture of int4 experts, sorted by expert.

A pair is a token and one of its experts. The pairs are sorted by expert, and those of one expert
cut into blocks of TOKENS:

    expert     0 0 0 0 0 0 0 1 1 2 2 2 2 2 4 4 ...
    block     |   0   |  1  | 2 |   3   |4| 5 ...       TOKENS = 4

A program multiplies ROWS rows of the expert's weight with the tokens of one block, gathering their
activations. How weights become an operand: `fused.py`. A last step adds up each token's experts,
in the order in which the router named them: results do not depend on timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.fragments import load_scales, scale_offsets, word_offsets
from vllm_nanoquant.kernels.fused import after_tensor_cores, arrange, is_wide, left_operand
from vllm_nanoquant.kernels.layout import ceil_div
from vllm_nanoquant.kernels.moe import GROUPED_TOKENS, decode_limit
from vllm_nanoquant.kernels.moe_gate import gated
from vllm_nanoquant.kernels.moe_reference import ACTIVATIONS, local_experts
from vllm_nanoquant.kernels.overlap import wait_for_kernel_before
from vllm_nanoquant.kernels.settings import is_hopper, launch_options
from vllm_nanoquant.kernels.weights import half_weights


@dataclass(frozen=True)
class GroupedSettings:
    """How `grouped_kernel` cuts its work."""

    tokens: int
    """Pairs per block."""
    rows: int
    """Rows of W per program."""
    warps: int
    stages: int
    """Tiles of x and W in flight."""
    halves: bool = False
    """Two products per chunk, not one: half is unpacked while the other half is multiplied."""


_SETTINGS = (
    GroupedSettings(tokens=16, rows=64, warps=4, stages=3),
    GroupedSettings(tokens=32, rows=64, warps=4, stages=3),
    GroupedSettings(tokens=64, rows=128, warps=8, stages=3, halves=True),
    GroupedSettings(tokens=128, rows=128, warps=8, stages=3, halves=True),
)
# Shared memory of SM86 holds two stages; one warp multiplies 16 rows.
_AMPERE_SETTINGS = (
    GroupedSettings(tokens=16, rows=64, warps=4, stages=2),
    GroupedSettings(tokens=32, rows=128, warps=4, stages=2),
)


def grouped_choices(device: torch.device) -> tuple[GroupedSettings, ...]:
    """All settings for a GPU, for ever more pairs per expert."""
    return _SETTINGS if is_hopper(device) else _AMPERE_SETTINGS


def grouped_settings(
    tokens: int, top_k: int, experts: int, device: torch.device
) -> GroupedSettings:
    """Settings by the pairs that an expert has on average."""
    choices = grouped_choices(device)
    average = tokens * top_k / experts
    return next((each for each in choices if average <= each.tokens), choices[-1])


def grouped_buckets(experts: int, top_k: int, device: torch.device) -> tuple[int, ...]:
    """One number of tokens for each of the settings of `moe_grouped`, to compile them all."""
    least = decode_limit(top_k) + 1
    averages = [0, *(each.tokens + 1 for each in grouped_choices(device)[:-1])]
    return tuple(
        min(max(least, average * experts // top_k), GROUPED_TOKENS) for average in averages
    )


@triton.jit
def whole_left_operand(
    words_0: tl.tensor,
    words_1: tl.tensor,
    scales: tl.tensor,
    T: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Weights [16 * T, 128] of a chunk, columns in the order of `arrange_kernel`."""
    first = half_weights(words_0, scales, 0, T, PER_CHUNK, dtype)
    second = half_weights(words_1, scales, 1, T, PER_CHUNK, dtype)
    # tile, row % 8, lane's c, i / 2 % 2, row / 8, i % 2, i / 4, plane / 2, half
    weights = tl.reshape(tl.join(first, second), (T, 8, 4, 2, 2, 2, 2, 2, 2))
    wide = tl.permute(weights, (0, 4, 1, 8, 7, 6, 2, 3, 5))
    narrow = tl.permute(weights, (0, 4, 1, 8, 7, 6, 3, 2, 5))
    return tl.reshape(wide if WIDE else narrow, (T * 16, 128))


@triton.jit
def block_of_pairs(
    starts_ptr: tl.tensor,
    block: tl.tensor,
    experts: int,
    EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> tl.tensor:
    """(expert, first, end): the sorted pairs of a block; expert = `experts` beyond the last."""
    each = tl.arange(0, EXPERTS)
    start = tl.load(starts_ptr + each, mask=each < experts, other=0)
    end = tl.load(starts_ptr + each + 1, mask=each < experts, other=0)
    blocks = tl.cdiv(end - start, TOKENS)
    total = tl.cumsum(blocks)
    expert = tl.sum(((total <= block) & (each < experts)).to(tl.int32))
    own = each == expert
    first = tl.sum(tl.where(own, start + (block - total + blocks) * TOKENS, 0))
    return expert, first, tl.sum(tl.where(own, end, 0))


@triton.jit(do_not_specialize=["rows", "chunks", "experts"])
def grouped_kernel(
    arranged_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    order_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    y_ptr: tl.tensor,
    n: int,
    chunks: int,
    rows: int,
    scale_stride: int,
    expert_words: int,
    expert_scales: int,
    experts: int,
    SHARED_BY: tl.constexpr,
    EXPERTS: tl.constexpr,
    SQUARED_RELU: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    HALVES: tl.constexpr,
    WIDE: tl.constexpr,
    HOPPER: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Write y [pairs, N], row p the product of x's row p // SHARED_BY with the pair's expert.

    x as `arrange_kernel` leaves it; words and scales as in `ExpertWeights`; order: the pairs sorted
    by expert, starts: where each expert's begin among them. With weights, rows are multiplied by
    them.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    T: tl.constexpr = ROWS // 16
    COLUMNS: tl.constexpr = 64 if HALVES else 128
    if PDL:
        wait_for_kernel_before()
    expert, first, end = block_of_pairs(starts_ptr, tl.program_id(1), experts, EXPERTS, TOKENS)
    if expert < experts:
        position = first + tl.arange(0, TOKENS)
        exists = (position < end)[:, None]
        pair = tl.load(order_ptr + position, mask=position < end, other=0)
        tile = tl.program_id(0) * T + tl.arange(0, T)
        if T > 4:
            # N is padded to 4 tiles; the last program may have more.
            tile = tl.minimum(tile, tl.cdiv(n, 64) * 4 - 1)
        which = expert.to(tl.int64)
        words_at = words_ptr + which * expert_words + word_offsets(tile, chunks)
        scales_at = scales_ptr + which * expert_scales + scale_offsets(tile, PER_CHUNK)
        x_at = arranged_ptr + (pair // SHARED_BY)[:, None] * 128 + tl.arange(0, COLUMNS)[None, :]
        y = tl.zeros((ROWS, TOKENS), tl.float32)
        for chunk in range(0, chunks):
            words_0 = tl.load(words_at + chunk * 1024)
            words_1 = tl.load(words_at + chunk * 1024 + 128)
            scales = load_scales(scales_at + chunk * scale_stride, tile >= 0)
            x_0 = tl.load(x_at + chunk * rows * 128, mask=exists, other=0.0)
            if HALVES:
                x_1 = tl.load(x_at + chunk * rows * 128 + 64, mask=exists, other=0.0)
            if HOPPER:
                words_0 = after_tensor_cores(words_0)
                words_1 = after_tensor_cores(words_1)
            if HALVES:
                weights = left_operand(words_0, scales, 0, T, PER_CHUNK, WIDE, dtype)
                y = tl.dot(weights, tl.trans(x_0), y)
                weights = left_operand(words_1, scales, 1, T, PER_CHUNK, WIDE, dtype)
                y = tl.dot(weights, tl.trans(x_1), y)
            else:
                weights = whole_left_operand(words_0, words_1, scales, T, PER_CHUNK, WIDE, dtype)
                y = tl.dot(weights, tl.trans(x_0), y)
        if SQUARED_RELU:
            y = tl.maximum(y, 0.0)
            y = y * y
        if HAS_WEIGHTS:
            y *= tl.load(weights_ptr + pair)[None, :]
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        tl.store(
            y_ptr + pair.to(tl.int64)[None, :] * n + row[:, None],
            y.to(dtype),
            mask=(row < n)[:, None] & (position < end)[None, :],
        )


def _product(
    x: torch.Tensor,
    weight: ExpertWeights,
    order: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    pair_weights: torch.Tensor | None,
    squared_relu: bool,
    chosen: GroupedSettings,
) -> None:
    """Fill out [pairs, N]: x [rows, K] with the experts of `weight`, pairs // rows pairs a row."""
    rows = len(x)
    pairs = len(out)
    device = x.device
    arranged = arrange(x, weight.chunks, rows, weight.group_offset)
    # Each expert has at most one block that is not full.
    blocks = pairs // chosen.tokens + min(weight.experts, pairs)
    grouped_kernel[(ceil_div(weight.out_features, chosen.rows), blocks)](
        arranged,
        weight.words,
        weight.scales,
        order,
        starts,
        pair_weights,
        out,
        weight.out_features,
        weight.chunks,
        rows,
        weight.scale_stride,
        weight.words.stride(0),
        weight.scales.stride(0),
        weight.experts,
        SHARED_BY=pairs // rows,
        EXPERTS=triton.next_power_of_2(weight.experts),
        SQUARED_RELU=squared_relu,
        HAS_WEIGHTS=pair_weights is not None,
        PER_CHUNK=weight.groups_per_chunk,
        ROWS=chosen.rows,
        TOKENS=chosen.tokens,
        HALVES=chosen.halves,
        WIDE=is_wide(device),
        HOPPER=is_hopper(device),
        **launch_options(device, num_warps=chosen.warps, num_stages=chosen.stages),
    )


def sort_pairs(
    topk_ids: torch.Tensor, expert_map: torch.Tensor | None, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort pairs by this rank's experts.

    Returns:
        order: int32 [pairs], the pairs of expert 0, of expert 1, ..., of other ranks' experts.
        starts: int32 [experts + 1], where each expert's begin; the last: where they end.
    """
    local = local_experts(topk_ids, expert_map).flatten().int()
    local = torch.where(local < 0, experts, local)
    sorted_ids, order = local.sort(stable=True)
    bounds = torch.arange(experts + 1, dtype=torch.int32, device=local.device)
    return order.int(), torch.searchsorted(sorted_ids, bounds, out_int32=True)


def moe_grouped(
    x: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    settings: GroupedSettings | None = None,
) -> torch.Tensor:
    """See `moe.moe_w4a16`; any number of tokens. Tensors as in `moe_decode`."""
    tokens, top_k = topk_ids.shape
    pairs = tokens * top_k
    chosen = settings or grouped_settings(tokens, top_k, w2.experts, x.device)
    order, starts = sort_pairs(topk_ids, expert_map, w2.experts)
    h = torch.empty((pairs, w13.out_features), dtype=x.dtype, device=x.device)
    squared_relu = activation == "relu2_no_mul"
    _product(x, w13, order, starts, h, None, squared_relu, chosen)
    if ACTIVATIONS[activation]:
        h = gated(h, activation)
    # Rows of other ranks' experts, and of none, are not written.
    out = torch.zeros((pairs, w2.out_features), dtype=x.dtype, device=x.device)
    _product(h, w2, order, starts, out, topk_weights, False, chosen)
    return out.view(tokens, top_k, -1).sum(dim=1)
