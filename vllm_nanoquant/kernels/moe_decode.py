# SPDX-License-Identifier: Apache-2.0
"""Triton: few tokens through a mixture of int4 experts; each chosen expert is read once.

A pair is a token and one of its experts. There are programs for every pair and some rows of its
expert's weight; `moe_plan.py` says which of them work, and for which pairs.

`up_kernel` writes h [pairs, N], for squared ReLU with the activation in it. `down_kernel` leaves
weight * (h @ W2.T) per pair, and the last program to arrive at a tile of rows adds up each token's
experts, in the order in which the router named them, and sets the counter back to 0. So the bits of
a token do not depend on timing, nor on the other tokens. How a product is made: `decode.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.decode import add_run, scaled, token_operands
from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.fragments import (
    FIRST_AXIS,
    load_chunk,
    scale_offsets,
    scales_of_group,
    word_offsets,
)
from vllm_nanoquant.kernels.layout import ceil_div
from vllm_nanoquant.kernels.moe_gate import gated
from vllm_nanoquant.kernels.moe_plan import PAIR_SIZES, local_experts, plan_pairs, read_plan
from vllm_nanoquant.kernels.moe_reference import ACTIVATIONS
from vllm_nanoquant.kernels.overlap import wait_for_kernel_before
from vllm_nanoquant.kernels.settings import launch_options

# Warps of a program, which take turns along K: this decides the order of sums, whatever the number
# of tokens. Chunks that each loads ahead.
WARPS = 4
PREFETCH = 1

# Tiles of 16 rows of a program: one token alone needs more programs, more tokens less of everything
# that a program does but once. Bits do not depend on it.
TILES_OF_ONE_TOKEN = 2
TILES = 4


@triton.jit
def load_rows(
    x_ptr: tl.tensor,
    row: tl.tensor,
    exists: tl.tensor,
    column: tl.tensor,
    k: int,
    GROUP_OFFSET: tl.constexpr,
) -> tl.tensor:
    """32 columns from column [W] on of rows [8] of x: [1, W, 8, 32].

    Rows and columns that do not exist are 0. A lane reads 16 bytes.
    """
    if FIRST_AXIS:
        offset, exists = (row * k)[:, None, None, None], exists[:, None, None, None]
    else:
        offset, exists = (row * k)[None, None, :, None], exists[None, None, :, None]
    column = (column[:, None] + tl.arange(0, 32)[None, :])[None, :, None, :]
    inside = exists & (column < k)
    if GROUP_OFFSET > 0:
        inside = inside & (column >= 0)
    x = tl.load(x_ptr + offset + column, mask=inside, other=0.0, eviction_policy="evict_last")
    return tl.permute(x, (2, 1, 0, 3)) if FIRST_AXIS else x


@triton.jit
def expert_product(
    x_ptr: tl.tensor,
    row: tl.tensor,
    exists: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    first_tile: tl.tensor,
    k: int,
    chunks: int,
    scale_stride: int,
    GROUP_OFFSET: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    W: tl.constexpr,
    PREFETCH: tl.constexpr,
    WAIT: tl.constexpr,
) -> tl.tensor:
    """Product of rows [8] of x with TILES tiles of one expert's weight: fp32 [16 * TILES, 8].

    With WAIT, the first weights are loaded before the kernel waits for the one before it.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    T: tl.constexpr = TILES * W
    unit = tl.arange(0, T)
    in_run = unit % W
    tile = first_tile + unit // W
    words_ptr += word_offsets(tile, chunks) + in_run[:, None] * 1024
    own = in_run * scale_stride
    scales_ptr += scale_offsets(tile, PER_CHUNK)
    scales_ptr += own[None, None, :, None] if FIRST_AXIS else own[:, None, None, None]
    # Every warp takes part in every step; beyond its last chunk it multiplies zeros.
    left = chunks - in_run
    next_0, next_1, next_s = load_chunk(words_ptr, scales_ptr, 0, left > 0, scale_stride)
    if PREFETCH == 2:
        after_0, after_1, after_s = load_chunk(words_ptr, scales_ptr, W, left > W, scale_stride)
    if WAIT:
        wait_for_kernel_before()
    one = tl.full((W, 16, 8), 1.0, dtype)
    ones = tl.reshape(tl.join(one, one), (W, 16, 16))
    warp_column = tl.arange(0, W) * 128 - GROUP_OFFSET
    y = tl.zeros((T, 16, 8), tl.float32)
    for chunk in range(0, chunks, W):
        words_0, words_1, scales = next_0, next_1, next_s
        ahead = chunk + W * PREFETCH
        if PREFETCH == 2:
            next_0, next_1, next_s = after_0, after_1, after_s
            after_0, after_1, after_s = load_chunk(
                words_ptr, scales_ptr, ahead, left > ahead, scale_stride
            )
        else:
            next_0, next_1, next_s = load_chunk(
                words_ptr, scales_ptr, ahead, left > ahead, scale_stride
            )
        dot = tl.zeros((T, 16, 8), tl.float32)
        x_sum = tl.zeros((W, 16, 8), tl.float32)
        for run in tl.static_range(4):
            column = chunk * 128 + run * 32 + warp_column
            x_0, x_1 = token_operands(load_rows(x_ptr, row, exists, column, k, GROUP_OFFSET), W, 8)
            words = words_0 if run < 2 else words_1
            dot = add_run(dot, words, x_0, x_1, run % 2, TILES, W, 8, SUBNORMAL=False)
            x_sum = tl.dot(ones, x_0, x_sum)
            x_sum = tl.dot(ones, x_1, x_sum)
            if (run + 1) * PER_CHUNK % 4 == 0:
                group = scales_of_group(scales, run * PER_CHUNK // 4, T, PER_CHUNK)
                y += scaled(group, dot, x_sum, TILES, W, 8, dtype, SUBNORMAL=False)
                dot = tl.zeros((T, 16, 8), tl.float32)
                x_sum = tl.zeros((W, 16, 8), tl.float32)
    # tile, warp, row, pair
    y = tl.sum(tl.reshape(y, (TILES, W, 16, 8)), axis=1)
    return tl.reshape(y, (TILES * 16, 8))


@triton.jit(do_not_specialize=["chunks"])
def up_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    map_ptr: tl.tensor,
    plan_ptr: tl.tensor,
    h_ptr: tl.tensor,
    n: int,
    k: int,
    chunks: int,
    scale_stride: int,
    expert_words: int,
    expert_scales: int,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    SQUARED_RELU: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    W: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Write h [pairs, N] = x [pairs / TOP_K, K] @ W_e.T, e the expert of the pair.

    Words and scales as in `ExpertWeights`; pairs of other ranks' experts are not written.
    """
    if PDL:
        # The router may be the kernel before this one.
        wait_for_kernel_before()
    expert, members, exists = read_plan(
        ids_ptr, map_ptr, plan_ptr, tl.program_id(1), HAS_MAP, ONE_TOKEN
    )
    if expert >= 0:
        which = expert.to(tl.int64)
        first_tile = tl.program_id(0) * TILES
        y = expert_product(
            x_ptr,
            members // TOP_K,
            exists,
            words_ptr + which * expert_words,
            scales_ptr + which * expert_scales,
            first_tile,
            k,
            chunks,
            scale_stride,
            0,
            PER_CHUNK,
            TILES,
            W,
            PREFETCH,
            False,
        )
        if SQUARED_RELU:
            y = tl.maximum(y, 0.0)
            y = y * y
        row = (first_tile * 16 + tl.arange(0, TILES * 16))[:, None]
        h = h_ptr + members[None, :] * n + row
        tl.store(h, y.to(h_ptr.dtype.element_ty), mask=(row < n) & exists[None, :])


@triton.jit(do_not_specialize=["pairs", "chunks"])
def down_kernel(
    h_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    map_ptr: tl.tensor,
    plan_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    y_ptr: tl.tensor,
    pairs: int,
    n: int,
    k: int,
    chunks: int,
    scale_stride: int,
    expert_words: int,
    expert_scales: int,
    TOP_K: tl.constexpr,
    HAS_MAP: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    GROUP_OFFSET: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    TILES: tl.constexpr,
    W: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Write y [tokens, N]: each token's sum of weight * (h @ W_e.T) over its pairs.

    Words and scales as in `ExpertWeights`; partial is fp32 [pairs, N], arrivals int32 zeros.
    """
    ROWS: tl.constexpr = TILES * 16
    # The router has ended before the kernel before this one began to load, so this may be read.
    expert, members, exists = read_plan(
        ids_ptr, map_ptr, plan_ptr, tl.program_id(1), HAS_MAP, ONE_TOKEN
    )
    first_tile = tl.program_id(0) * TILES
    row = first_tile * 16 + tl.arange(0, ROWS)
    if expert >= 0:
        which = expert.to(tl.int64)
        y = expert_product(
            h_ptr,
            members,
            exists,
            words_ptr + which * expert_words,
            scales_ptr + which * expert_scales,
            first_tile,
            k,
            chunks,
            scale_stride,
            GROUP_OFFSET,
            PER_CHUNK,
            TILES,
            W,
            PREFETCH,
            PDL,
        )
        y *= tl.load(weights_ptr + members, mask=exists, other=0.0)[None, :]
        partial = partial_ptr + members[None, :] * n + row[:, None]
        tl.store(partial, y, mask=(row < n)[:, None] & exists[None, :])
        tl.debug_barrier()
    elif PDL:
        # Whoever arrives last writes y, whose memory the kernel before this one may still read.
        wait_for_kernel_before()
    arrived = tl.atomic_add(arrivals_ptr + tl.program_id(0), 1, sem="acq_rel")
    if arrived == pairs - 1:
        tl.store(arrivals_ptr + tl.program_id(0), 0)
        for first in range(0, pairs // TOP_K, 4):
            token = first + tl.arange(0, 4)
            total = tl.zeros((4, ROWS), tl.float32)
            for slot in tl.static_range(TOP_K):
                pair = token * TOP_K + slot
                wanted = local_experts(ids_ptr, map_ptr, pair, pairs, HAS_MAP) >= 0
                total += tl.load(
                    partial_ptr + pair[:, None] * n + row[None, :],
                    mask=wanted[:, None] & (row < n)[None, :],
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(
                y_ptr + token[:, None] * n + row[None, :],
                total.to(y_ptr.dtype.element_ty),
                mask=(token < pairs // TOP_K)[:, None] & (row < n)[None, :],
            )


def decode_buckets(top_k: int) -> tuple[int, ...]:
    """One number of tokens for each kernel that `moe_decode` compiles."""
    return tuple(sorted({1, 2, *(max(1, size // top_k) for size in PAIR_SIZES)}))


def moe_decode(
    x: torch.Tensor,
    w13: ExpertWeights,
    w2: ExpertWeights,
    arrivals: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """See `moe.moe_w4a16`; at most PAIR_SIZES[-1] pairs, nothing is checked here.

    x [M, H] is contiguous, starts at a multiple of 16 bytes and is bf16 or fp16; topk_weights is
    fp32, topk_ids int32, both contiguous.
    """
    tokens, top_k = topk_ids.shape
    pairs = tokens * top_k
    n = w2.out_features
    device = x.device
    tiles = TILES_OF_ONE_TOKEN if tokens == 1 else TILES
    shared = {
        "TOP_K": top_k,
        "HAS_MAP": expert_map is not None,
        "ONE_TOKEN": tokens == 1,
        "TILES": tiles,
        "W": WARPS,
        "PREFETCH": PREFETCH,
        **launch_options(device, WARPS, num_stages=1),
    }
    plan = None if tokens == 1 else plan_pairs(topk_ids, expert_map)
    h = torch.empty((pairs, w13.out_features), dtype=x.dtype, device=device)
    up_kernel[(ceil_div(w13.out_features, 16 * tiles), pairs)](
        x,
        w13.words,
        w13.scales,
        topk_ids,
        expert_map,
        plan,
        h,
        *w13.shape,
        w13.chunks,
        w13.scale_stride,
        w13.words.stride(0),
        w13.scales.stride(0),
        SQUARED_RELU=activation == "relu2_no_mul",
        PER_CHUNK=w13.groups_per_chunk,
        **shared,
    )
    if ACTIVATIONS[activation]:
        h = gated(h, activation)
    partial = torch.empty((pairs, n), dtype=torch.float32, device=device)
    y = torch.empty((tokens, n), dtype=x.dtype, device=device)
    down_kernel[(ceil_div(n, 16 * tiles), pairs)](
        h,
        w2.words,
        w2.scales,
        topk_ids,
        expert_map,
        plan,
        topk_weights,
        partial,
        arrivals,
        y,
        pairs,
        *w2.shape,
        w2.chunks,
        w2.scale_stride,
        w2.words.stride(0),
        w2.scales.stride(0),
        GROUP_OFFSET=w2.group_offset,
        PER_CHUNK=w2.groups_per_chunk,
        **shared,
    )
    return y
