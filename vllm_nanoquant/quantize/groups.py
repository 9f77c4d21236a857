# SPDX-License-Identifier: Apache-2.0
"""The int4 number format: groups along K, their scales and zero points, and the packed bytes.

A weight W [N, K] is cut into groups of `group_size` columns. With one bf16 scale and one bf16 zero
point per group and row, `W ~ (q + zero_point) * scale`, where q is an integer from 0 to 15. The
last group may be ragged, and after a slice along K the first one may be as well. A group may also
be a whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

WHOLE_ROW = -1
"""The group size that means one group per row, however long."""
GROUP_SIZES = (32, 64, 128, WHOLE_ROW)


def group_count(in_features: int, group_size: int, group_offset: int = 0) -> int:
    """Number of groups that `in_features` columns touch, ragged ones counted.

    `group_offset` is the number of columns of the first group that lie before the first column.
    """
    return 1 if group_size == WHOLE_ROW else -(-(in_features + group_offset) // group_size)


def validate_group(group_size: int, group_offset: int) -> None:
    """Raise ValueError for a group size that does not exist, or an offset that is not inside it."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; it must be one of {GROUP_SIZES}")
    limit = 1 if group_size == WHOLE_ROW else group_size
    if not 0 <= group_offset < limit:
        raise ValueError(
            f"group_offset is {group_offset}; it must be at least 0 and less than {limit} where "
            f"the group size is {group_size}"
        )


def validate_quantized(
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    in_features: int,
    group_size: int,
    group_offset: int = 0,
) -> None:
    """Raise ValueError unless the three tensors describe one int4 weight [N, in_features].

    Wanted: `packed` uint8 [ceil(in_features / 2), N], `scale` and `zero_point` bf16 [G, N] with
    G = `group_count(in_features, group_size, group_offset)`, all contiguous and on one device.
    """
    validate_group(group_size, group_offset)
    if in_features < 1:
        raise ValueError(f"in_features is {in_features}; a weight has at least one column")
    if packed.dim() != 2 or packed.shape[0] != (in_features + 1) // 2:
        raise ValueError(
            f"the packed weight has shape {list(packed.shape)}; {in_features} columns need "
            f"[{(in_features + 1) // 2}, N]"
        )
    if packed.dtype != torch.uint8:
        raise ValueError(f"the packed weight is {packed.dtype}; it must be torch.uint8")
    expected = (group_count(in_features, group_size, group_offset), packed.shape[1])
    for name, tensor in (("scale", scale), ("zero point", zero_point)):
        if tensor.shape != expected:
            raise ValueError(
                f"the {name} has shape {list(tensor.shape)}; {in_features} columns in groups of "
                f"{group_size} with offset {group_offset} and {packed.shape[1]} rows need "
                f"{list(expected)}"
            )
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"the {name} is {tensor.dtype}; it must be torch.bfloat16")
        if tensor.device != packed.device:
            raise ValueError(f"the {name} is on {tensor.device}, the weight on {packed.device}")
    if not (packed.is_contiguous() and scale.is_contiguous() and zero_point.is_contiguous()):
        raise ValueError("the packed weight, the scale and the zero point must be contiguous")


@dataclass(frozen=True)
class QuantizedWeight:
    """One int4 weight [N, K]; building one with shapes that do not fit raises ValueError.

    Attributes:
        packed: uint8 [ceil(K / 2), N]; column 2j is the low nibble of row j, column 2j + 1 the
            high nibble. The high nibble of the last row is 0 when K is odd.
        scale: bf16 [G, N].
        zero_point: bf16 [G, N], in units of the scale; it need not be a whole number.
        group_size: columns per group, or WHOLE_ROW.
        in_features: K.
        group_offset: columns of the first group that lie before column 0, as in a
            tensor-parallel rank's share: column k is in group (k + group_offset) // group_size.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    group_size: int
    in_features: int
    group_offset: int = 0

    def __post_init__(self) -> None:
        validate_quantized(
            self.packed,
            self.scale,
            self.zero_point,
            self.in_features,
            self.group_size,
            self.group_offset,
        )

    @property
    def out_features(self) -> int:
        """N."""
        return self.packed.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as of the weight that was quantized."""
        return (self.out_features, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors together."""
        return self.packed.nbytes + self.scale.nbytes + self.zero_point.nbytes


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """Pack q, uint8 [N, K] with values 0 to 15, into uint8 [ceil(K / 2), N].

    Values above 15 would spill into their neighbours; that is the caller's to avoid. Raises
    ValueError for another dtype or number of dimensions.
    """
    if q.dtype != torch.uint8 or q.dim() != 2:
        raise ValueError(f"expected uint8 [N, K], got {q.dtype} {list(q.shape)}")
    even = q[:, 0::2]
    odd = q[:, 1::2]
    packed = even.clone()
    packed[:, : odd.shape[1]] |= odd << 4
    return packed.t().contiguous()


def unpack_nibbles(packed: torch.Tensor, in_features: int) -> torch.Tensor:
    """Undo `pack_nibbles`: uint8 [ceil(K / 2), N] to uint8 [N, K], K being `in_features`.

    Raises ValueError when the number of packed rows is not ceil(K / 2).
    """
    if packed.shape[0] != (in_features + 1) // 2:
        raise ValueError(f"{packed.shape[0]} packed rows cannot hold {in_features} columns")
    q = packed.new_empty((packed.shape[1], in_features))
    q[:, 0::2] = (packed & 15).t()
    q[:, 1::2] = (packed[: in_features // 2] >> 4).t()
    return q


def slice_columns(weight: QuantizedWeight, start: int, stop: int) -> QuantizedWeight:
    """Columns start to stop - 1 of a weight, as a weight of their own, bit for bit the same values.

    The groups keep their size; a cut inside a group becomes a group offset. Nothing is shared with
    the original's storage. Raises ValueError for an empty or out-of-range slice.
    """
    if not 0 <= start < stop <= weight.in_features:
        raise ValueError(
            f"columns {start} to {stop} are not a non-empty part of {weight.in_features} columns"
        )
    first = start // 2
    part = weight.packed[first : (stop + 1) // 2]
    if start % 2:
        # The share begins with a high nibble: every byte is put together from two neighbours.
        packed = part >> 4
        packed[:-1] |= part[1:] << 4
        packed = packed[: (stop - start + 1) // 2].clone()
    else:
        packed = part.clone()
    if (stop - start) % 2:
        packed[-1] &= 15
    size = weight.group_size
    if size == WHOLE_ROW:
        return replace(
            weight,
            packed=packed,
            scale=weight.scale.clone(),
            zero_point=weight.zero_point.clone(),
            in_features=stop - start,
        )
    first_group = (start + weight.group_offset) // size
    groups = slice(first_group, group_count(stop, size, weight.group_offset))
    return QuantizedWeight(
        packed=packed,
        scale=weight.scale[groups].clone(),
        zero_point=weight.zero_point[groups].clone(),
        group_size=size,
        in_features=stop - start,
        group_offset=(start + weight.group_offset) % size,
    )


def join_rows(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Rows of several weights with the same columns and groups, one below the other.

    Raises ValueError when they differ in their columns or groups.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    forms = {(part.in_features, part.group_size, part.group_offset) for part in parts}
    if len(forms) > 1:
        raise ValueError(f"weights with other columns or groups cannot be joined: {sorted(forms)}")
    return replace(
        first,
        packed=torch.cat([part.packed for part in parts], dim=1),
        scale=torch.cat([part.scale for part in parts], dim=1),
        zero_point=torch.cat([part.zero_point for part in parts], dim=1),
    )
