# SPDX-License-Identifier: Apache-2.0
"""From a foreign format's integers, scales and zero points to ours, without changing a value.

Every int4 format here says `w = (q - zero) * scale` with q and zero from 0 to 15 (16 at most), in
groups along K. Ours says `w = (q + zero_point) * scale`: `zero_point = -zero` is exact in bf16.
Scales are rounded to bf16, which is what vLLM does with them when it serves such a checkpoint in
bf16; how many change, and by how much, is counted.
"""

from __future__ import annotations

import torch

from vllm_nanoquant.checkpoint.fidelity import dequantize_rows
from vllm_nanoquant.checkpoint.formats.base import Converted, FormatError
from vllm_nanoquant.quantize.groups import (
    GROUP_SIZES,
    WHOLE_ROW,
    QuantizedWeight,
    group_count,
    pack_nibbles,
    unpack_nibbles,
)

SYMMETRIC_ZERO = 8
"""The zero point of a symmetric int4 weight, as an unsigned number."""
CHUNK_WEIGHTS = 1 << 22
"""Weights taken at a time where there are temporaries of 4 bytes a weight: 16 MB."""
PER_WORD = 8
"""4-bit integers in an int32."""


def our_group_size(group_size: int, place: str) -> int:
    """The group size in which groups of `group_size` inputs can be written exactly.

    A size that we do not have is cut into several groups with the same scale. Raises FormatError
    where no size of ours divides it.
    """
    if group_size in GROUP_SIZES:
        return group_size
    for size in sorted(GROUP_SIZES, reverse=True):
        if size > 0 and group_size > 0 and group_size % size == 0:
            return size
    raise FormatError(
        f"{place}: group size {group_size} cannot be written exactly; it must be -1 or a multiple "
        "of 32. Quantize the unquantized model instead: nanoquant quantize"
    )


def expect(name: str, tensor: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise FormatError unless a tensor has this dtype and this shape."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise FormatError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}: the "
            "checkpoint does not fit its config.json"
        )


def expect_matrix(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """Shape of a tensor that must be a non-empty matrix of this dtype; raises FormatError."""
    if tensor.dtype != dtype or tensor.dim() != 2 or tensor.numel() == 0:
        raise FormatError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}; expected a matrix of {dtype}"
        )
    return tensor.shape[0], tensor.shape[1]


def missing_library(error: ImportError) -> FormatError:
    """What to say where compressed-tensors cannot be imported."""
    return FormatError(
        f"reading and writing this format needs compressed-tensors, which cannot be imported "
        f"({error}); it comes with vLLM: pip install compressed-tensors"
    )


def unpack_words(words: torch.Tensor, shape: tuple[int, int], packed_dim: int) -> torch.Tensor:
    """Unpack int32 words of eight 4-bit integers, lowest bits first, to uint8 `shape`.

    Not by the library's function, which the tests compare this with: it takes ten times as long,
    minutes for a model of 9 B weights, and models are loaded this way.

    Args:
        words: int32, `shape` with `packed_dim` divided by 8 and rounded up.
        shape: of the result, which may be a transposed view; what lies beyond it in the last word
            is dropped.
        packed_dim: 0 or 1, the dimension along which eight integers share a word.
    """
    lines = words if packed_dim == 1 else words.t()
    count = shape[packed_dim]
    # In memory, on the little-endian machines that vLLM runs on, a word is four bytes of two
    # integers each, the lower one first: our own packing, line by line.
    octets = lines.flatten().view(torch.uint8).view(len(lines), -1)[:, : (count + 1) // 2]
    q = unpack_nibbles(octets.t(), count)
    return q if packed_dim == 1 else q.t()


def from_integers(
    module: str,
    q: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    group_size: int,
    g_idx: torch.Tensor | None = None,
) -> Converted:
    """One module in our format, from `w = (q - zero) * scale`.

    Args:
        module: its name, for errors.
        q: uint8 [N, K], values 0 to 15.
        scale: [G, N], bf16, fp16 or fp32.
        zero: integers [G, N], or None for a symmetric weight (8 everywhere).
        group_size: inputs per group in the source; -1 for a whole row.
        g_idx: integers [K], the group of each column; None where groups follow one another.

    Raises:
        FormatError: shapes that do not fit, scales that are not finite, groups of another size.
    """
    rows, columns = q.shape
    ours = our_group_size(group_size, module)
    width = columns if group_size == WHOLE_ROW else group_size
    groups = -(-columns // width)
    if scale.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise FormatError(f"the scales of {module} are {scale.dtype}; expected a float type")
    for what, tensor in (("scales", scale), ("zero points", zero)):
        if tensor is not None and tuple(tensor.shape) != (groups, rows):
            raise FormatError(
                f"the {what} of {module} are {list(tensor.shape)}; {columns} inputs in groups of "
                f"{width} and {rows} outputs need {[groups, rows]}: the checkpoint does not fit "
                "the group size in its config.json"
            )
    order = order_of(module, g_idx, columns, group_size)
    if order is not None:
        # By rows of the transpose: that is how GPTQ stores it, and how it is packed below.
        q = q.t()[order].t()
    rounded, count, largest = _round_scales(module, scale)
    if zero is None:
        zero_point = torch.full_like(rounded, -SYMMETRIC_ZERO)
    else:
        zero_point = zero.to(torch.bfloat16).neg_().add_(0.0)
    # Which of the source's groups each of ours lies in.
    if ours != WHOLE_ROW and ours != group_size:
        count_ours = group_count(columns, ours)
        source = torch.arange(count_ours, device=q.device) * ours // width
        rounded, zero_point = rounded[source], zero_point[source]
    weight = QuantizedWeight(
        pack_nibbles(q), rounded.contiguous(), zero_point.contiguous(), ours, columns
    )
    return Converted(
        weight,
        None if order is None else order.to(torch.int32),
        rounded_scales=count,
        largest_rounding=largest,
    )


def _round_scales(module: str, scale: torch.Tensor) -> tuple[torch.Tensor, int, float]:
    """Scales [G, N] in bf16, how many changed, and the largest relative change."""
    rounded = scale.to(torch.bfloat16)
    # Also an fp32 scale that is finite but beyond bf16.
    bad = ~torch.isfinite(rounded)
    if bool(bad.any()):
        group, row = (int(i) for i in bad.nonzero()[0])
        raise FormatError(
            f"{int(bad.sum())} scales of {module} are not finite numbers; the first is that of "
            f"output {row}, group {group}: fetch the checkpoint again"
        )
    exact = scale.float()
    change = (rounded.float() - exact).abs_()
    count = int((change > 0).sum())
    largest = float((change / exact.abs()).nan_to_num_(nan=0.0).max()) if count else 0.0
    return rounded, count, largest


def order_of(
    module: str, g_idx: torch.Tensor | None, columns: int, group_size: int
) -> torch.Tensor | None:
    """Columns sorted by group, int64 [K], or None where they are so already.

    Args:
        module: its name, for errors.
        g_idx: integers [K], the group of each column; None or all -1: never changed.
        columns: K.
        group_size: inputs per group in the source; -1 for a whole row.

    Raises:
        FormatError: the groups have other sizes than `group_size`, the last one excepted.
    """
    if g_idx is None:
        return None
    if g_idx.dtype not in (torch.int32, torch.int64) or tuple(g_idx.shape) != (columns,):
        raise FormatError(
            f"g_idx of {module} is {g_idx.dtype} {list(g_idx.shape)}; expected integers [{columns}]"
        )
    # compressed-tensors writes -1 where the order was never changed.
    if bool((g_idx == -1).all()):
        return None
    width = columns if group_size == WHOLE_ROW else group_size
    groups = -(-columns // width)
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise FormatError(
            f"g_idx of {module} has values from {low} to {high}; {columns} inputs in groups of "
            f"{width} have groups 0 to {groups - 1}"
        )
    wanted = torch.arange(columns, device=g_idx.device) // width
    if torch.equal(g_idx.long(), wanted):
        return None
    found, order = torch.sort(g_idx.long(), stable=True)
    if not torch.equal(found, wanted):
        sizes = torch.bincount(g_idx.long(), minlength=groups)
        expected = torch.bincount(wanted, minlength=groups)
        group = int((sizes != expected).nonzero()[0])
        raise FormatError(
            f"g_idx of {module} puts {int(sizes[group])} columns into group {group}; "
            f"{int(expected[group])} belong there. Such groups have no exact counterpart"
        )
    return order


def dequantize(converted: Converted) -> torch.Tensor:
    """The dense bf16 weight [N, K], columns in the order of the input features.

    Each value is computed in fp32 from the rounded scale and rounded once.
    """
    rows, columns = converted.weight.shape
    device = converted.weight.packed.device
    result = torch.empty((rows, columns), dtype=torch.bfloat16, device=device)
    target = slice(None) if converted.order is None else converted.order.long()
    for part in row_chunks(rows, columns):
        result[part, target] = dequantize_rows(converted.weight, part).to(torch.bfloat16)
    return result


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows of about CHUNK_WEIGHTS weights each."""
    step = max(1, CHUNK_WEIGHTS // columns)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
