# SPDX-License-Identifier: Apache-2.0
"""How an int4 weight lies in memory while it is served: in the order tensor cores take it.

The matrix instruction m16n8k16 wants 16 rows of W by 16 columns of K spread over the 32 lanes of a
warp in a fixed pattern. The words are stored so that the 16 bytes which a lane loads *are* its part
of that pattern; between memory and tensor core there is only the unpacking of nibbles.

    a tile = 16 rows x 128 columns = 256 words of 32 bits; lane = 4 * (row % 8) + c, c = 0..3

                columns  0      8      16     24     32           64           96        128
                         |--c0--|--c1--|--c2--|--c3--|-c0-..-c3-|-c0-..-c3-|-c0-..-c3-|
    row      r           |      :      :      :      |            |            |            |
    row  r + 8           |      :      :      :      |            |            |            |
                         '----- words of half 0 -----------------' '---- words of half 1 ---'

So a lane owns two rows, and of each run of 32 columns the 8 that begin at 8c: what it multiplies
them with are 16 consecutive bytes of an activation in bf16. The 8 columns i = 0..7 of a run lie in

    word   half * 128 + lane * 4 + 2 * (i / 2 % 2) + row / 8         half  = column / 64
    bits   4 * plane + 16 * (i % 2)                  plane = 2 * (column / 32 % 2) + i / 4

and a word shifted right by 4 * plane, masked with 0x000f000f, has two neighbours of K in its two
halves: one operand register. Four tiles make a block of 64 rows; words are [N / 64, K / 128, 4,
256], so a block's 128 columns are 4 KB in a row. N and K are padded with zeros.

Scale (low half) and zero point (high half) of a group and row share a word. They are stored
[K / 128, N / 16, 8, 2, groups per 128 columns], rows in the order r, r + 8: what a lane needs lies
together. With one group per row the first size is 1.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from vllm_nanoquant.quantize.groups import (
    WHOLE_ROW,
    QuantizedWeight,
    group_count,
    pack_nibbles,
    validate_group,
)

TILE = 16
"""Rows of a tile, and of the matrix instruction."""
BLOCK = 64
"""Rows of a block; N is padded to a multiple of it."""
CHUNK = 128
"""Columns of a tile; K is padded to a multiple of it."""
TILE_WORDS = TILE * CHUNK // 8
ARRIVALS_PER_BLOCK = 64
"""Counters per block of rows: enough for every way in which a kernel cuts y into tiles."""

# Temporaries of packing take about 10 bytes per weight.
_PACK_ROWS_WEIGHTS = 1 << 23


def ceil_div(a: int, b: int) -> int:
    """A / b, rounded up. `triton.cdiv` takes ten times as long outside of a kernel."""
    return -(-a // b)


def groups_per_chunk(group_size: int) -> int:
    """Groups that begin in 128 columns: 4, 2 or 1."""
    return 1 if group_size == WHOLE_ROW else CHUNK // group_size


def padded(out_features: int, in_features: int, group_offset: int) -> tuple[int, int]:
    """(blocks of 64 rows, chunks of 128 columns) that a weight [N, K] takes."""
    return ceil_div(out_features, BLOCK), ceil_div(in_features + group_offset, CHUNK)


@functools.cache
def runtime_shapes(
    out_features: int, in_features: int, group_size: int, group_offset: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the words and of the scales of a weight [N, K]."""
    blocks, chunks = padded(out_features, in_features, group_offset)
    tiles = blocks * BLOCK // TILE
    scale_chunks = 1 if group_size == WHOLE_ROW else chunks
    words = (blocks, chunks, BLOCK // TILE, TILE_WORDS)
    return words, (scale_chunks, tiles, 8, 2, groups_per_chunk(group_size))


def validate_runtime(
    words: torch.Tensor,
    scales: torch.Tensor,
    arrivals: torch.Tensor,
    out_features: int,
    in_features: int,
    group_size: int,
    group_offset: int,
) -> None:
    """Raise ValueError unless the tensors are those of one weight [N, K] in the runtime layout."""
    validate_group(group_size, group_offset)
    if out_features < 1 or in_features < 1:
        raise ValueError(f"a weight [{out_features}, {in_features}] has no elements")
    shapes = runtime_shapes(out_features, in_features, group_size, group_offset)
    require_tensors(
        f"a weight [{out_features}, {in_features}] in groups of {group_size} with offset "
        f"{group_offset} needs",
        words=(words, shapes[0]),
        scales=(scales, shapes[1]),
        arrivals=(arrivals, (shapes[0][0] * ARRIVALS_PER_BLOCK,)),
    )


def require_tensors(
    owner_needs: str,
    words: tuple[torch.Tensor, tuple[int, ...]],
    **others: tuple[torch.Tensor, tuple[int, ...]],
) -> None:
    """Raise ValueError unless tensors are contiguous int32, of these shapes, and on one device.

    Args:
        owner_needs: what they belong to, and the verb, for the message.
        words: a tensor and the shape that it must have.
        **others: the same, by the names that the message gives them.
    """
    for name, (tensor, shape) in {"words": words, **others}.items():
        if tensor.shape != shape or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; {owner_needs} contiguous "
                f"torch.int32 {list(shape)}"
            )
        if tensor.device != words[0].device:
            raise ValueError(f"{name} is on {tensor.device}, the words on {words[0].device}")


@dataclass(frozen=True)
class RuntimeWeight:
    """One int4 weight [N, K] in the layout of the kernels; shapes that do not fit are refused.

    Attributes:
        words: int32 [ceil(N / 64), ceil((K + offset) / 128), 4, 256].
        scales: int32 [chunks or 1, tiles of 16 rows, 8, 2, groups per chunk]; low half the bf16
            scale, high half the bf16 zero point.
        arrivals: int32 [64 * ceil(N / 64)], zero between products: programs that share a tile of
            the result count themselves here.
        out_features: N.
        in_features: K.
        group_size: columns per group: 32, 64, 128 or WHOLE_ROW.
        group_offset: columns of the first group that lie before column 0 of this weight.
    """

    words: torch.Tensor
    scales: torch.Tensor
    arrivals: torch.Tensor
    out_features: int
    in_features: int
    group_size: int
    group_offset: int = 0

    def __post_init__(self) -> None:
        validate_runtime(
            self.words,
            self.scales,
            self.arrivals,
            self.out_features,
            self.in_features,
            self.group_size,
            self.group_offset,
        )

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight) -> RuntimeWeight:
        """Lay out a weight for the kernels, on the device it is on, a few rows at a time."""
        return cls(
            words=_pack_words(weight),
            scales=_pack_scales(weight),
            arrivals=torch.zeros(
                padded(*weight.shape, weight.group_offset)[0] * ARRIVALS_PER_BLOCK,
                dtype=torch.int32,
                device=weight.packed.device,
            ),
            out_features=weight.out_features,
            in_features=weight.in_features,
            group_size=weight.group_size,
            group_offset=weight.group_offset,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (self.out_features, self.in_features)

    @property
    def chunks(self) -> int:
        """Chunks of 128 columns, the padding counted."""
        return self.words.shape[1]

    @property
    def groups_per_chunk(self) -> int:
        """Groups that begin in a chunk: 4, 2 or 1."""
        return groups_per_chunk(self.group_size)

    @property
    def scale_stride(self) -> int:
        """Words of `scales` from one chunk to the next; 0 where all chunks share a row's group."""
        return 0 if self.group_size == WHOLE_ROW else self.scales.stride(0)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors together."""
        return self.words.nbytes + self.scales.nbytes + self.arrivals.nbytes

    def clone(self) -> RuntimeWeight:
        """Make the same weight in other memory."""
        return replace(
            self,
            words=self.words.clone(),
            scales=self.scales.clone(),
            arrivals=self.arrivals.clone(),
        )


def _pack_words(weight: QuantizedWeight) -> torch.Tensor:
    rows, columns = weight.shape
    blocks, chunks = padded(rows, columns, weight.group_offset)
    device = weight.packed.device
    words = torch.empty((blocks, chunks, 4, TILE_WORDS), dtype=torch.int32, device=device)
    step = max(1, _PACK_ROWS_WEIGHTS // (chunks * CHUNK * BLOCK))
    for first in range(0, blocks, step):
        count = min(step, blocks - first)
        part = slice(first * BLOCK, min((first + count) * BLOCK, rows))
        # One byte per weight, [K, N] as packed is, with the padding around it.
        q = torch.zeros((chunks * CHUNK, count * BLOCK), dtype=torch.uint8, device=device)
        packed = weight.packed[:, part]
        inside = q[weight.group_offset : weight.group_offset + columns, : packed.shape[1]]
        inside[0::2] = packed & 15
        inside[1::2] = packed[: columns // 2] >> 4
        words[first : first + count] = _interleave(q, count, chunks)
    return words


def _interleave(q: torch.Tensor, blocks: int, chunks: int) -> torch.Tensor:
    """Integers [chunks * 128, blocks * 64] to words [blocks, chunks, 4, 256]; see the picture."""
    # chunk, half, plane / 2, c, plane % 2, i / 2 % 2, i % 2, block, tile, row / 8, row % 8
    q = q.view(chunks, 2, 2, 4, 2, 2, 2, blocks, 4, 2, 8)
    q = q.permute(7, 0, 8, 1, 10, 3, 5, 9, 2, 4, 6)
    words = torch.zeros(q.shape[:8], dtype=torch.int32, device=q.device)
    for plane in range(4):
        for half_word in range(2):
            nibble = q[..., plane // 2, plane % 2, half_word].to(torch.int32)
            words |= nibble << (4 * plane + 16 * half_word)
    return words.reshape(blocks, chunks, 4, TILE_WORDS)


def _pack_scales(weight: QuantizedWeight) -> torch.Tensor:
    groups, rows = weight.scale.shape
    blocks, chunks = padded(rows, weight.in_features, weight.group_offset)
    per_chunk = groups_per_chunk(weight.group_size)
    total = 1 if weight.group_size == WHOLE_ROW else chunks * per_chunk
    pairs = torch.zeros((total, blocks * BLOCK), dtype=torch.int32, device=weight.scale.device)
    scale = weight.scale.view(torch.int16).to(torch.int32) & 0xFFFF
    zero_point = weight.zero_point.view(torch.int16).to(torch.int32) << 16
    pairs[:groups, :rows] = scale | zero_point
    # chunk, group, tile, row / 8, row % 8
    pairs = pairs.view(-1, per_chunk, blocks * 4, 2, 8).permute(0, 2, 4, 3, 1)
    return pairs.contiguous()


def integers(weight: RuntimeWeight) -> torch.Tensor:
    """The integers of a weight, without the padding: uint8 [K, N]."""
    blocks, chunks = weight.words.shape[:2]
    rows = blocks * BLOCK
    # block, chunk, tile, half, row % 8, c, i / 2 % 2, row / 8 -> one word per row, rows last
    words = weight.words.view(blocks, chunks, 4, 2, 8, 4, 2, 2).permute(1, 3, 5, 6, 0, 2, 7, 4)
    words = words.reshape(chunks, 2, 4, 2, rows)
    # chunk, half, plane / 2, c, plane % 2, i / 2 % 2, i % 2, row
    q = torch.empty((chunks, 2, 2, 4, 2, 2, 2, rows), dtype=torch.uint8, device=words.device)
    for plane in range(4):
        for half_word in range(2):
            nibbles = (words >> (4 * plane + 16 * half_word)) & 15
            q[:, :, plane // 2, :, plane % 2, :, half_word] = nibbles
    q = q.view(chunks * CHUNK, rows)
    start = weight.group_offset
    return q[start : start + weight.in_features, : weight.out_features]


def group_parameters(weight: RuntimeWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each group and row, without the padding: bf16 [G, N] each."""
    rows = weight.words.shape[0] * BLOCK
    pairs = weight.scales.permute(0, 4, 1, 3, 2).reshape(-1, rows)
    groups = group_count(weight.in_features, weight.group_size, weight.group_offset)
    pairs = pairs[:groups, : weight.out_features]
    scale = pairs.to(torch.int16).view(torch.bfloat16)
    return scale, (pairs >> 16).to(torch.int16).view(torch.bfloat16)


def to_quantized(weight: RuntimeWeight) -> QuantizedWeight:
    """Undo `RuntimeWeight.from_quantized`, bit for bit."""
    scale, zero_point = group_parameters(weight)
    return QuantizedWeight(
        packed=pack_nibbles(integers(weight).t()),
        scale=scale,
        zero_point=zero_point,
        group_size=weight.group_size,
        in_features=weight.in_features,
        group_offset=weight.group_offset,
    )
