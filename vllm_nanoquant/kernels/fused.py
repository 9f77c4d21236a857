# SPDX-License-Identifier: Apache-2.0
"""Triton product of some tens to hundreds of tokens with an int4 weight, in one kernel.

Words come through shared memory, a few chunks ahead, or, where x needs that memory (PREFETCH),
straight into registers, one chunk ahead. They become weights in bf16, already in the order of the
left operand, and are multiplied with a tile of x from shared memory, where Hopper's copy engine
(TMA) puts it; elsewhere each lane copies its part. The work is y in tiles of
ROWS x TOKENS times the chunks of K that each needs, counted tile by tile, and cut into equal runs,
one per program:

    tile 0             tile 1             tile 2
    chunk 0 1 2 3 4 5  0 1 2 3 4 5        0 1 2 3 4 5
    |- program 0 -|-- program 1 -|-- program 2 --|-- program 3 -|

so every multiprocessor has the same to do, whatever the shape ("stream-K", Osama et al., 2023,
arXiv:2301.03598). A tile that several programs share is added up by the last of them to arrive, in
the order of K. Results do not depend on timing; they do depend, in the last bits, on the number of
tokens.

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
    is_hopper,
    launch_options,
)
from vllm_nanoquant.kernels.weights import half_weights

# Rows of x that one program arranges.
ARRANGE_ROWS = 16


@triton.jit(do_not_specialize=["tokens", "chunks", "padded_tokens"])
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


@triton.jit(do_not_specialize=["tokens", "chunks", "padded_tokens"])
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
    arrivals as in `RuntimeWeight`; partial is fp32 [programs, 2, TOKENS, ROWS].
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    T: tl.constexpr = ROWS // 16
    # 64 bits: units times programs is beyond 32.
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    token_blocks = tl.cdiv(tokens, TOKENS)
    units = tl.cdiv(n, ROWS) * token_blocks * chunks
    first_unit = (program * units // programs).to(tl.int32)
    end_unit = ((program + 1) * units // programs).to(tl.int32)
    for y_tile in range(first_unit // chunks, tl.cdiv(end_unit, chunks)):
        start = tl.maximum(first_unit - y_tile * chunks, 0)
        end = tl.minimum(end_unit - y_tile * chunks, chunks)
        row_block = y_tile // token_blocks
        first_token = y_tile % token_blocks * TOKENS
        tile = row_block * T + tl.arange(0, T)
        if T > 4:
            # N is padded to 4 tiles; the last block of rows may have more.
            tile = tl.minimum(tile, tl.cdiv(n, 64) * 4 - 1)
        words_at = words_ptr + word_offsets(tile, chunks)
        scales_at = scales_ptr + scale_offsets(tile, PER_CHUNK)
        if not HOPPER:
            x_at = arranged + first_token * 128
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
            if HOPPER:
                x_0 = arranged.load([chunk * padded_tokens + first_token, 0])
                x_1 = arranged.load([chunk * padded_tokens + first_token, 64])
                words_0 = after_tensor_cores(words_0)
                words_1 = after_tensor_cores(words_1)
            else:
                x_0 = tl.load(x_at + chunk * padded_tokens * 128)
                x_1 = tl.load(x_at + chunk * padded_tokens * 128 + 64)
            # In halves: the second can be unpacked while the first is multiplied.
            weights = left_operand(words_0, scales, 0, T, PER_CHUNK, WIDE, dtype)
            y = tl.dot(weights, tl.trans(x_0), y)
            weights = left_operand(words_1, scales, 1, T, PER_CHUNK, WIDE, dtype)
            y = tl.dot(weights, tl.trans(x_1), y)
        row = row_block * ROWS + tl.arange(0, ROWS)
        token = first_token + tl.arange(0, TOKENS)
        if (start == 0) & (end == chunks):
            store_tile(y, y_ptr, bias_ptr, row, token, n, tokens, HAS_BIAS)
        else:
            # The runs of programs first to final touch this tile.
            first = ((y_tile * chunks + 1) * programs + units - 1) // units - 1
            final = ((y_tile + 1) * chunks * programs + units - 1) // units - 1
            inner = tl.arange(0, ROWS)[:, None] + tl.arange(0, TOKENS)[None, :] * ROWS
            slot = program * 2 + (program == first).to(tl.int64)
            tl.store(partial_ptr + slot * (ROWS * TOKENS) + inner, y)
            tl.debug_barrier()
            arrived = tl.atomic_add(arrivals_ptr + y_tile, 1, sem="acq_rel")
            if arrived == final - first:
                tl.store(arrivals_ptr + y_tile, 0)
                total = tl.zeros((ROWS, TOKENS), tl.float32)
                for other in range(first, final + 1):
                    slot = other * 2 + (other == first).to(tl.int64)
                    part = partial_ptr + slot * (ROWS * TOKENS) + inner
                    total += tl.load(part, cache_modifier=".cg")
                store_tile(total, y_ptr, bias_ptr, row, token, n, tokens, HAS_BIAS)


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

    x is contiguous and bf16 or fp16, for any M >= 1 up to 1024; see `decode` for the rest.
    """
    tokens = x.shape[0]
    n = weight.out_features
    chunks = weight.chunks
    device = x.device
    chosen = settings or fused_settings(weight, tokens, device)
    padded_tokens = ceil_div(tokens, chosen.tokens) * chosen.tokens
    arranged = arrange(x, chunks, padded_tokens, weight.group_offset)
    programs = chosen.programs(n, tokens, chunks, device)
    y = torch.empty((tokens, n), dtype=x.dtype, device=device)
    partial_shape = (programs, 2, chosen.tokens, chosen.rows)
    partial = torch.empty(partial_shape, dtype=torch.float32, device=device)
    hopper = is_hopper(device)
    fused_kernel[(programs,)](
        in_blocks(arranged, chosen) if hopper else arranged,
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
        weight.scale_stride,
        PER_CHUNK=weight.groups_per_chunk,
        HAS_BIAS=bias is not None,
        ROWS=chosen.rows,
        TOKENS=chosen.tokens,
        PREFETCH=chosen.prefetch,
        WIDE=is_wide(device),
        HOPPER=hopper,
        **launch_options(device, num_warps=chosen.warps, num_stages=chosen.stages),
    )
    return y
