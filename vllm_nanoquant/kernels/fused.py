# SPDX-License-Identifier: Apache-2.0
"""Triton product of some tens to some thousands of tokens with an int4 weight, in one kernel.

Words come through shared memory, a few chunks ahead, or, where x needs that memory (PREFETCH),
straight into registers, one chunk ahead. They become weights in bf16, already in the order of the
left operand, and are multiplied with a tile of x from shared memory, where Hopper's copy engine
(TMA) puts it; elsewhere each lane copies its part.

The work is y in tiles of ROWS x TOKENS. While there is a tile for every program, each takes one.
The chunks of those that are left, counted tile by tile, are cut into equal runs:

    tile       0   1   2     3           4
    chunk     all all all    0 1 2 3 4 5 0 1 2 3 4 5
    program    0   1   2     |-- 0 --|-- 1 --|-- 2 -|

so every multiprocessor has nearly the same to do, whatever the shape ("stream-K" behind whole
tiles, Osama et al., 2023, arXiv:2301.03598). Where several programs share a multiprocessor, runs
end with their tile, and the tiles in front have one program more:

    tile       3           4
    chunk      0 1 2 3 4 5 0 1 2 3 4 5
    program    |0|-1-|-2-| |- 3 -|- 4 -|

`FusedSettings.share_out` says how many share. A tile that several programs share is added up by
the last of them to arrive, in the order of K (`shared_tiles.py`). Results do not depend on timing;
they do depend, in the last bits, on the number of tokens.

x is first copied into [chunks, tokens, 128], columns in the order of the words (`layout.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vllm_nanoquant.kernels.fragments import (
    FOUR_WIDE,
    load_chunk,
    load_scales,
    scale_offsets,
    word_offsets,
)
from vllm_nanoquant.kernels.layout import CHUNK, RuntimeWeight, ceil_div
from vllm_nanoquant.kernels.overlap import wait_for_kernel_before
from vllm_nanoquant.kernels.settings import (
    FusedSettings,
    fused_settings,
    gpu_of,
    is_hopper,
    launch_options,
)
from vllm_nanoquant.kernels.shared_tiles import as_held, as_tile, part_of, sum_of_parts
from vllm_nanoquant.kernels.weights import half_weights

# Rows of x that one program arranges.
ARRANGE_ROWS = 8


@triton.jit(do_not_specialize=["tokens", "padded_tokens"])
def arrange_kernel(
    x_ptr: tl.tensor,
    arranged_ptr: tl.tensor,
    tokens: int,
    k: int,
    padded_tokens: int,
    group_offset: int,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Write x [tokens, K] as [chunks, padded tokens, 128], zeros beside K; rest not written."""
    chunk = tl.program_id(0)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    lane = tl.arange(0, 128)[None, :]
    column = chunk * 128 + lane - group_offset
    if PDL:
        wait_for_kernel_before()
    inside = (row < tokens) & (column >= 0) & (column < k)
    x = tl.load(x_ptr + row * k + column, mask=inside, other=0.0)
    # row, run of 32, lane's c, i / 4, i / 2 % 2, i % 2
    x = tl.reshape(x, (ROWS, 4, 4, 2, 2, 2))
    wide, narrow = tl.permute(x, (0, 1, 3, 2, 4, 5)), tl.permute(x, (0, 1, 3, 4, 2, 5))
    x = tl.reshape(wide if WIDE else narrow, (ROWS, 128))
    offset = (chunk * padded_tokens + row) * 128 + lane
    tl.store(arranged_ptr + offset, x, mask=row < tokens)


@triton.jit
def after_tensor_cores(words: tl.tensor) -> tl.tensor:
    """The words, once the tensor cores of Hopper have read all operands given to them so far.

    They read the left operand from registers while the program runs on, and Triton before 3.9 lets
    the next chunk overwrite it too early (triton-lang/triton#9433). What is made from these words
    cannot.
    """
    return tl.inline_asm_elementwise(
        "wgmma.wait_group.sync.aligned 0; "
        "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
        "=r,=r,=r,=r,r,r,r,r",
        [words],
        dtype=tl.int32,
        is_pure=False,
        pack=4,
    )


@triton.jit
def left_operand(
    words: tl.tensor,
    scales: tl.tensor,
    half: tl.constexpr,
    T: tl.constexpr,
    PER_CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    dtype: tl.constexpr,
) -> tl.tensor:
    """Weights [16 * T, 64] of half a chunk, columns in the order of `arrange_kernel`."""
    weights = half_weights(words, scales, half, T, PER_CHUNK, dtype)
    # tile, row % 8, lane's c, i / 2 % 2, row / 8, i % 2, i / 4, plane / 2
    weights = tl.reshape(weights, (T, 8, 4, 2, 2, 2, 2, 2))
    wide = tl.permute(weights, (0, 4, 1, 7, 6, 2, 3, 5))
    narrow = tl.permute(weights, (0, 4, 1, 7, 6, 3, 2, 5))
    return tl.reshape(wide if WIDE else narrow, (T * 16, 64))


@triton.jit
def load_x(x_at: tl.tensor, row: int, HOPPER: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Both halves [TOKENS, 64] of a chunk of x from a row of `arranged` on; see `fused_kernel`."""
    if HOPPER:
        return x_at.load([row, 0]), x_at.load([row, 64])
    else:
        return tl.load(x_at + row * 128), tl.load(x_at + row * 128 + 64)


@triton.jit
def store_tile(
    y: tl.tensor,
    y_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    n: int,
    tokens: int,
    HAS_BIAS: tl.constexpr,
) -> None:
    """Write a finished tile [rows, tokens] of the result, plus bias, to y [tokens, N]."""
    if HAS_BIAS:
        y += tl.load(bias_ptr + row, mask=row < n, other=0.0).to(tl.float32)[:, None]
    tl.store(
        y_ptr + token[None, :] * n + row[:, None],
        y.to(y_ptr.dtype.element_ty),
        mask=(row < n)[:, None] & (token < tokens)[None, :],
    )


@triton.jit(
    do_not_specialize=["tokens", "chunks", "padded_tokens", "own", "front_tiles", "front", "back"]
)
def fused_kernel(
    arranged: tl.tensor,
    words_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    y_ptr: tl.tensor,
    tokens: int,
    n: int,
    chunks: int,
    padded_tokens: int,
    own: int,
    front_tiles: int,
    front: int,
    back: int,
    scale_stride: int,
    PER_CHUNK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    PREFETCH: tl.constexpr,
    WIDE: tl.constexpr,
    HOPPER: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Write y [tokens, N] = x @ W.T + bias; x as `arrange_kernel` leaves it.

    With HOPPER, arranged is a descriptor, see `in_blocks`, otherwise a pointer. Words, scales and
    arrivals as in `RuntimeWeight`, own to back as in `Work`; partial is fp32
    [front + back, 2, TOKENS * ROWS].
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    T: tl.constexpr = ROWS // 16
    program = tl.program_id(0)
    token_blocks = tl.cdiv(tokens, TOKENS)
    owned = own * tl.num_programs(0)
    # Of the programs that share: how many this group has, and what comes before it.
    in_front = program < front
    sharers = tl.where(in_front, front, tl.maximum(back, 1))
    programs_before = tl.where(in_front, 0, front)
    tiles_before = tl.where(in_front, 0, front_tiles)
    left = tl.cdiv(n, ROWS) * token_blocks - owned
    units = tl.where(in_front, front_tiles, left - front_tiles) * chunks
    sharer = program - programs_before
    first_unit = tl.minimum(sharer, sharers) * units // sharers
    end_unit = tl.minimum(sharer + 1, sharers) * units // sharers
    before = own - first_unit // chunks
    for visit in range(before + tl.cdiv(end_unit, chunks)):
        is_own = visit < own
        # Which of the tiles that the group shares, and which of all shared ones.
        shared = visit - before
        counter = tiles_before + shared
        y_tile = tl.where(is_own, visit * tl.num_programs(0) + program, owned + counter)
        start = tl.where(is_own, 0, tl.maximum(first_unit - shared * chunks, 0))
        end = tl.where(is_own, chunks, tl.minimum(end_unit - shared * chunks, chunks))
        row_block = y_tile // token_blocks
        first_token = y_tile % token_blocks * TOKENS
        tile = row_block * T + tl.arange(0, T)
        if T > 4:
            # N is padded to 4 tiles; the last block of rows may have more.
            tile = tl.minimum(tile, tl.cdiv(n, 64) * 4 - 1)
        words_at = words_ptr + word_offsets(tile, chunks)
        scales_at = scales_ptr + scale_offsets(tile, PER_CHUNK)
        x_at = arranged
        if not HOPPER:
            x_at += tl.arange(0, TOKENS)[:, None] * 128 + tl.arange(0, 64)[None, :]
        y = tl.zeros((ROWS, TOKENS), tl.float32)
        if PREFETCH:
            next_0, next_1, next_s = load_chunk(words_at, scales_at, start, tile >= 0, scale_stride)
        if PDL:
            # Weights do not depend on the kernel before this one; x and all that follows do.
            wait_for_kernel_before()
        for chunk in range(start, end):
            if PREFETCH:
                words_0, words_1, scales = next_0, next_1, next_s
                more = (tile >= 0) & (chunk + 1 < end)
                next_0, next_1, next_s = load_chunk(
                    words_at, scales_at, chunk + 1, more, scale_stride
                )
            else:
                words_0 = tl.load(words_at + chunk * 1024)
                words_1 = tl.load(words_at + chunk * 1024 + 128)
                scales = load_scales(scales_at + chunk * scale_stride, tile >= 0)
            x_row = chunk * padded_tokens + first_token
            if PREFETCH:
                x_0, x_1 = load_x(x_at, x_row, HOPPER)
            if HOPPER:
                words_0 = after_tensor_cores(words_0)
                words_1 = after_tensor_cores(words_1)
            # In halves: the second can be unpacked while the first is multiplied.
            weights = left_operand(words_0, scales, 0, T, PER_CHUNK, WIDE, dtype)
            if not PREFETCH:
                # Only here must x have arrived. Where words come into registers, that is slower.
                x_0, x_1 = load_x(x_at, x_row, HOPPER)
            y = tl.dot(weights, tl.trans(x_0), y)
            weights = left_operand(words_1, scales, 1, T, PER_CHUNK, WIDE, dtype)
            y = tl.dot(weights, tl.trans(x_1), y)
        row = row_block * ROWS + tl.arange(0, ROWS)
        token = first_token + tl.arange(0, TOKENS)
        if (start == 0) & (end == chunks):
            store_tile(y, y_ptr, bias_ptr, row, token, n, tokens, HAS_BIAS)
        else:
            at = part_of(partial_ptr, program, start == 0, ROWS, TOKENS)
            tl.store(at, as_held(y, ROWS, TOKENS))
            tl.debug_barrier()
            # The runs of programs first to final touch this tile.
            first = programs_before + tl.cdiv((shared * chunks + 1) * sharers, units) - 1
            final = programs_before + tl.cdiv((shared + 1) * chunks * sharers, units) - 1
            arrived = tl.atomic_add(arrivals_ptr + counter, 1, sem="acq_rel")
            if arrived == final - first:
                tl.store(arrivals_ptr + counter, 0)
                y = as_tile(sum_of_parts(partial_ptr, first, final, ROWS, TOKENS), ROWS, TOKENS)
                store_tile(y, y_ptr, bias_ptr, row, token, n, tokens, HAS_BIAS)


def is_wide(device: torch.device) -> bool:
    """Whether 4 neighbours of K go to a lane in the left operand that the kernel there is given."""
    return bool(FOUR_WIDE.value) and not is_hopper(device)


def arrange(x: torch.Tensor, chunks: int, padded_rows: int, group_offset: int) -> torch.Tensor:
    """Copy x [rows, K] to [chunks, padded rows, 128]; what pads the rows is not written."""
    rows, k = x.shape
    arranged = torch.empty((chunks, padded_rows, CHUNK), dtype=x.dtype, device=x.device)
    arrange_kernel[(chunks, ceil_div(rows, ARRANGE_ROWS))](
        x,
        arranged,
        rows,
        k,
        padded_rows,
        group_offset,
        WIDE=is_wide(x.device),
        ROWS=ARRANGE_ROWS,
        **launch_options(x.device, num_warps=4, num_stages=1),
    )
    return arranged


def in_blocks(arranged: torch.Tensor, settings: FusedSettings) -> TensorDescriptor:
    """Describe x [chunks, rows, 128] to Hopper's copy engine, in blocks for half a chunk."""
    chunks, rows, columns = arranged.shape
    block = [settings.tokens, columns // 2]
    return TensorDescriptor(arranged, [chunks * rows, columns], [columns, 1], block)


def fused(
    x: torch.Tensor,
    weight: RuntimeWeight,
    bias: torch.Tensor | None,
    settings: FusedSettings | None = None,
) -> torch.Tensor:
    """Multiply x [M, K] by a transposed int4 weight [N, K], add bias [N]: [M, N] in x.dtype.

    x is contiguous and bf16 or fp16, for any M >= 1 up to FUSED_LIMIT; see `decode` for the rest.
    """
    tokens = x.shape[0]
    n = weight.out_features
    chunks = weight.chunks
    device = x.device
    gpu = gpu_of(device)
    chosen = settings or fused_settings(weight, tokens, device)
    padded_tokens = ceil_div(tokens, chosen.tokens) * chosen.tokens
    arranged = arrange(x, chunks, padded_tokens, weight.group_offset)
    tiles = ceil_div(n, chosen.rows) * (padded_tokens // chosen.tokens)
    work = chosen.share_out(tiles, chunks, gpu.multiprocessors)
    y = torch.empty((tokens, n), dtype=x.dtype, device=device)
    partial_shape = (work.front + work.back, 2, chosen.tokens * chosen.rows)
    partial = torch.empty(partial_shape, dtype=torch.float32, device=device)
    fused_kernel[(work.programs,)](
        in_blocks(arranged, chosen) if gpu.is_hopper else arranged,
        weight.words,
        weight.scales,
        bias,
        partial,
        weight.arrivals,
        y,
        tokens,
        n,
        chunks,
        padded_tokens,
        work.own,
        work.front_tiles,
        work.front,
        work.back,
        weight.scale_stride,
        PER_CHUNK=weight.groups_per_chunk,
        HAS_BIAS=bias is not None,
        ROWS=chosen.rows,
        TOKENS=chosen.tokens,
        PREFETCH=chosen.prefetch,
        WIDE=is_wide(device),
        HOPPER=gpu.is_hopper,
        **launch_options(device, num_warps=chosen.warps, num_stages=chosen.stages),
    )
    return y
