# SPDX-License-Identifier: Apache-2.0
"""Triton product of up to 16 tokens with an int4 weight: one read of the weight, nothing else.

Weights are the left operand of the matrix instruction (16 rows), tokens the right one (8 columns).
A warp takes a run of chunks of 128 columns for `TILES` tiles of 16 rows:

                  K ->  chunk 0   1   2   3   4   5   6   7  ...
    N  tile 0           warp  0   1   0   1 | 0   1   0   1  ...     WARPS_K = 2, SPLIT = 2:
    |  tile 1           warp  0   1   0   1 | 0   1   0   1  ...     the bar is between programs
    v

It loads the next one or two chunks while it multiplies this one, straight into registers. Per
group, with integers q, scale s and zero point z, `y += s * (sum(x * q) + z * sum(x))`: the sums
run over exact small integers, scale and zero point are applied in fp32. sum(x) is a product with
ones.

Where K is split over programs, each writes its sums, and the last to arrive at a tile adds them up
in the order of K and sets the counter back to 0. So results do not depend on timing. Neither the
split nor the order within it depends on the number of tokens: a token gives the same bits alone
and in company. No floating-point atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_nanoquant.kernels.fragments import (
    FIRST_AXIS,
    FOUR_WIDE,
    high_half,
    load_chunk,
    low_half,
    scale_offsets,
    scales_of_group,
    word_offsets,
)
from vllm_nanoquant.kernels.integers import (
    integer_pairs,
    keeps_subnormals,
    matched,
    values_of_sums,
    zero_points,
)
from vllm_nanoquant.kernels.layout import RuntimeWeight, ceil_div
from vllm_nanoquant.kernels.overlap import wait_for_kernel_before
from vllm_nanoquant.kernels.settings import (
    DecodeSettings,
    decode_settings,
    launch_options,
    limit_registers,
)


@triton.jit
def weight_operand(
    words: tl.tensor,
    plane: tl.constexpr,
    T: tl.constexpr,
    dtype: tl.constexpr,
    SUBNORMAL: tl.constexpr,
) -> tl.tensor:
    """One nibble plane of words [T, 128] as the left operand [T, 16 rows, 16 columns]."""
    pairs = integer_pairs(words, plane, dtype, SUBNORMAL)
    values = tl.join(low_half(pairs, dtype), high_half(pairs, dtype))
    # tile, row % 8, lane's c, i / 2 % 2, row / 8, i % 2
    values = tl.reshape(values, (T, 8, 4, 2, 2, 2))
    wide, narrow = tl.permute(values, (0, 4, 1, 2, 3, 5)), tl.permute(values, (0, 4, 1, 3, 2, 5))
    return tl.reshape(wide if FOUR_WIDE else narrow, (T, 16, 16))


@triton.jit
def load_tokens(
    x_ptr: tl.tensor,
    column: tl.tensor,
    tokens: int,
    k: int,
    GROUP_OFFSET: tl.constexpr,
    M: tl.constexpr,
) -> tl.tensor:
    """Load up to M tokens, 32 columns from column [W] on per warp: [M / 8, W, 8, 32].

    Tokens and columns that do not exist are 0. A lane reads 16 bytes.
    """
    if FIRST_AXIS:
        token = tl.arange(0, 8)[:, None] + 8 * tl.arange(0, M // 8)[None, :]
    else:
        token = 8 * tl.arange(0, M // 8)[:, None] + tl.arange(0, 8)[None, :]
    token = token[:, None, :, None]
    column = (column[:, None] + tl.arange(0, 32)[None, :])[None, :, None, :]
    inside = (token < tokens) & (column < k)
    if GROUP_OFFSET > 0:
        inside = inside & (column >= 0)
    x = tl.load(x_ptr + token * k + column, mask=inside, other=0.0, eviction_policy="evict_last")
    return tl.permute(x, (2, 1, 0, 3)) if FIRST_AXIS else x


@triton.jit
def token_operands(x: tl.tensor, W: tl.constexpr, M: tl.constexpr) -> tl.tensor:
    """The right operands [W, 16 columns, M] of the two planes that share a run of 32 columns."""
    # token / 8, warp, token % 8, lane's c, i / 4, i / 2 % 2, i % 2
    x = tl.reshape(x, (M // 8, W, 8, 4, 2, 2, 2))
    wide, narrow = tl.permute(x, (1, 3, 5, 6, 0, 2, 4)), tl.permute(x, (1, 5, 3, 6, 0, 2, 4))
    first, second = tl.split(tl.reshape(wide if FOUR_WIDE else narrow, (W, 16, M, 2)))
    return first, second


@triton.jit
def for_each_tile(x: tl.tensor, R: tl.constexpr, W: tl.constexpr, M: tl.constexpr) -> tl.tensor:
    """[W, 16, M], what a warp needs once, as [R * W, 16, M], for each of its tiles."""
    return tl.reshape(tl.broadcast_to(x[None], (R, W, 16, M)), (R * W, 16, M))


@triton.jit
def over_tokens(scales: tl.tensor, T: tl.constexpr, M: tl.constexpr) -> tl.tensor:
    """Scale words [T, 8 rows, 4 lanes, 2] in the layout of sums [T, 16, M]."""
    # tile, row / 8, row % 8, token / 8, lane's c, token % 2
    scales = tl.permute(scales, (0, 3, 1, 2))[:, :, :, None, :, None]
    return tl.reshape(tl.broadcast_to(scales, (T, 2, 8, M // 8, 4, 2)), (T, 16, M))


@triton.jit
def add_run(
    dot: tl.tensor,
    words: tl.tensor,
    x_0: tl.tensor,
    x_1: tl.tensor,
    run: tl.constexpr,
    TILES: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    SUBNORMAL: tl.constexpr,
) -> tl.tensor:
    """Add to dot [T, 16, M] the products of one of two runs of 32 columns of half a chunk."""
    dtype: tl.constexpr = x_0.dtype
    operand = weight_operand(words, run * 2, TILES * W, dtype, SUBNORMAL)
    x_0, x_1 = matched(x_0, 0, SUBNORMAL), matched(x_1, 1, SUBNORMAL)
    dot = tl.dot(operand, for_each_tile(x_0, TILES, W, M), dot)
    operand = weight_operand(words, run * 2 + 1, TILES * W, dtype, SUBNORMAL)
    return tl.dot(operand, for_each_tile(x_1, TILES, W, M), dot)


@triton.jit
def scaled(
    group: tl.tensor,
    dot: tl.tensor,
    x_sum: tl.tensor,
    TILES: tl.constexpr,
    W: tl.constexpr,
    M: tl.constexpr,
    dtype: tl.constexpr,
    SUBNORMAL: tl.constexpr,
) -> tl.tensor:
    """Compute s * (dot + z * sum(x)) of a group: [T, 16, M]; words as `over_tokens` takes them."""
    group = over_tokens(group, TILES * W, M)
    scale = (group << 16).to(tl.float32, bitcast=True)
    zero = zero_points(group, dtype, SUBNORMAL)
    return scale * (dot + zero * for_each_tile(x_sum, TILES, W, M))


@triton.jit(do_not_specialize=["tokens", "chunks"])
def decode_kernel(
    x_ptr: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    y_ptr: tl.tensor,
    tokens: int,
    n: int,
    k: int,
    chunks: int,
    scale_stride: int,
    GROUP_OFFSET: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    TILES: tl.constexpr,
    WARPS_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    SPLIT: tl.constexpr,
    PREFETCH: tl.constexpr,
    SUBNORMAL: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Write y [tokens, N] = x [tokens, K] @ W.T + bias; tokens <= M = 8 or 16.

    Words, scales and arrivals as in `RuntimeWeight`; partial is fp32 [SPLIT, tokens, N].
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    W: tl.constexpr = WARPS_N * WARPS_K
    T: tl.constexpr = TILES * W
    pid_n = tl.program_id(0) // SPLIT
    split = tl.program_id(0) % SPLIT
    # Triton gives the last bits of the first axis to the warps, so tile = (own tile, n, k).
    unit = tl.arange(0, T)
    in_run = unit % WARPS_K
    tile = (pid_n * WARPS_N + unit % W // WARPS_K) * TILES + unit // W
    if TILES * WARPS_N > 4:
        # N is padded to 4 tiles; the last program may have more.
        tile = tl.minimum(tile, tl.cdiv(n, 64) * 4 - 1)
    words_ptr += word_offsets(tile, chunks) + in_run[:, None] * 1024
    if FIRST_AXIS:
        own_scales = (in_run * scale_stride)[None, None, :, None]
    else:
        own_scales = (in_run * scale_stride)[:, None, None, None]
    scales_ptr += scale_offsets(tile, PER_CHUNK) + own_scales
    per_split = tl.cdiv(chunks, WARPS_K * SPLIT) * WARPS_K
    start = split * per_split
    end = tl.minimum(start + per_split, chunks)
    # Every warp takes part in every step; beyond its last chunk it multiplies zeros.
    left = end - start - in_run
    next_0, next_1, next_s = load_chunk(words_ptr, scales_ptr, start, left > 0, scale_stride)
    if PREFETCH == 2:
        after_0, after_1, after_s = load_chunk(
            words_ptr, scales_ptr, start + WARPS_K, left > WARPS_K, scale_stride
        )
    if PDL:
        # Weights do not depend on the kernel before this one; x, partial and arrivals do.
        wait_for_kernel_before()
    one = tl.full((W, 16, 8), 1.0, dtype)
    ones = tl.reshape(tl.join(one, one), (W, 16, 16))
    warp_column = tl.arange(0, W) % WARPS_K * 128 - GROUP_OFFSET
    y = tl.zeros((T, 16, M), tl.float32)
    for chunk in range(start, end, WARPS_K):
        words_0, words_1, scales = next_0, next_1, next_s
        ahead = chunk + WARPS_K * PREFETCH
        wanted = left > ahead - start
        if PREFETCH == 2:
            next_0, next_1, next_s = after_0, after_1, after_s
            after_0, after_1, after_s = load_chunk(
                words_ptr, scales_ptr, ahead, wanted, scale_stride
            )
        else:
            next_0, next_1, next_s = load_chunk(words_ptr, scales_ptr, ahead, wanted, scale_stride)
        dot = tl.zeros((T, 16, M), tl.float32)
        x_sum = tl.zeros((W, 16, M), tl.float32)
        for run in tl.static_range(4):
            column = chunk * 128 + run * 32 + warp_column
            x = load_tokens(x_ptr, column, tokens, k, GROUP_OFFSET, M)
            x_0, x_1 = token_operands(x, W, M)
            words = words_0 if run < 2 else words_1
            dot = add_run(dot, words, x_0, x_1, run % 2, TILES, W, M, SUBNORMAL)
            x_sum = tl.dot(ones, x_0, x_sum)
            x_sum = tl.dot(ones, x_1, x_sum)
            if (run + 1) * PER_CHUNK % 4 == 0:
                group = scales_of_group(scales, run * PER_CHUNK // 4, T, PER_CHUNK)
                y += scaled(group, dot, x_sum, TILES, W, M, dtype, SUBNORMAL)
                dot = tl.zeros((T, 16, M), tl.float32)
                x_sum = tl.zeros((W, 16, M), tl.float32)
    # own tile, n, row, token
    y = tl.sum(tl.reshape(values_of_sums(y, SUBNORMAL), (TILES, WARPS_N, WARPS_K, 16, M)), axis=2)
    own = tl.arange(0, TILES)[:, None, None, None]
    warp = tl.arange(0, WARPS_N)[None, :, None, None]
    row = ((pid_n * WARPS_N + warp) * TILES + own) * 16 + tl.arange(0, 16)[None, None, :, None]
    token = tl.arange(0, M)[None, None, None, :]
    offset = token * n + row
    inside = (row < n) & (token < tokens)
    if SPLIT > 1:
        tl.store(partial_ptr + split * tokens * n + offset, y, mask=inside)
        tl.debug_barrier()
        last = tl.atomic_add(arrivals_ptr + pid_n, 1, sem="acq_rel") == SPLIT - 1
    else:
        last = split == 0
    if last:
        if SPLIT > 1:
            y = tl.load(partial_ptr + offset, mask=inside, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT):
                y += tl.load(
                    partial_ptr + other * tokens * n + offset,
                    mask=inside,
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(arrivals_ptr + pid_n, 0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)
        tl.store(y_ptr + offset, y.to(dtype), mask=inside)


def decode(
    x: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None,
    settings: DecodeSettings | None = None,
) -> torch.Tensor:
    """Multiply x [M, K] by a transposed int4 weight [N, K], add bias [N]: [M, N] in x.dtype.

    M is 1 to 16. x is contiguous, starts at a multiple of 16 bytes (a kernel compiled for aligned
    rows is used for every batch) and is bf16 or fp16. Without `settings`, the table or the rule
    for this GPU and shape decides. Nothing is checked here: the op does that.
    """
    tokens = x.shape[0]
    n, k = weight.shape
    chunks = weight.chunks
    chosen = settings or decode_settings(weight, x.device)
    launch = chosen.launch(tokens)
    y = torch.empty((tokens, n), dtype=x.dtype, device=x.device)
    partial = y
    if chosen.split > 1:
        partial = torch.empty((chosen.split, tokens, n), dtype=torch.float32, device=x.device)
    rows = 16 * launch.tiles * launch.warps_n
    decode_kernel[(ceil_div(n, rows) * chosen.split,)](
        x,
        weight.words,
        weight.scales,
        bias,
        partial,
        weight.arrivals,
        y,
        tokens,
        n,
        k,
        chunks,
        weight.scale_stride,
        GROUP_OFFSET=weight.group_offset,
        PER_CHUNK=weight.groups_per_chunk,
        HAS_BIAS=bias is not None,
        M=8 if tokens <= 8 else 16,
        TILES=launch.tiles,
        WARPS_N=launch.warps_n,
        WARPS_K=chosen.warps_k,
        SPLIT=chosen.split,
        PREFETCH=launch.prefetch,
        SUBNORMAL=x.dtype == torch.bfloat16 and keeps_subnormals(x.device),
        **launch_options(x.device, launch.warps_n * chosen.warps_k, num_stages=1),
        **limit_registers(launch.registers),
    )
    return y
