# SPDX-License-Identifier: Apache-2.0
"""Which input columns a tensor-parallel rank needs to quantize its share of a layer.

The groups of a row-parallel layer may straddle ranks: with K = 672 in groups of 128 over two ranks,
rank 1 starts 80 columns inside group 2. To give that group the same scale on both, each rank reads
all columns of the groups it touches, quantizes them, and cuts its share out of the result:

    columns   0     128     256 . 336   384     512     640 672
    groups    |  0   |   1   |    2 .    |   3   |   4   | 5 |
    rank 0    [==================]......
    rank 1                  .....[=============================]      = kept   . only read
"""

from dataclasses import dataclass

from vllm_nanoquant.quantize.groups import (
    WHOLE_ROW,
    QuantizedWeight,
    group_count,
    slice_columns,
)


@dataclass(frozen=True)
class ColumnShare:
    """The input columns of one rank, and the whole groups around them."""

    start: int
    """First column of the rank, in the whole layer."""
    stop: int
    """One past its last column."""
    read_start: int
    """First column to read: where the group of ``start`` begins."""
    read_stop: int
    """One past the last column to read: where the group of ``stop - 1`` ends."""

    @property
    def columns_read(self) -> int:
        """Number of columns to read."""
        return self.read_stop - self.read_start

    @property
    def kept(self) -> tuple[int, int]:
        """Range of the rank's own columns among those that were read."""
        return self.start - self.read_start, self.stop - self.read_start

    def own_part(self, weight: QuantizedWeight) -> QuantizedWeight:
        """The rank's own columns of a weight [N, columns read]."""
        if self.kept == (0, self.columns_read):
            return weight
        return slice_columns(weight, *self.kept)


def column_share(in_features: int, share: int, rank: int, group_size: int) -> ColumnShare:
    """Share of ``rank`` when K = ``in_features`` columns are split into runs of ``share``.

    Args:
        in_features: K of the whole layer.
        share: K of one rank; K itself where the layer does not split its input.
        rank: tensor-parallel rank; ignored where the layer does not split its input.
        group_size: inputs per scale, or WHOLE_ROW.
    """
    if group_size == WHOLE_ROW:
        group_size = in_features
    start = rank * share if share < in_features else 0
    stop = start + share
    return ColumnShare(
        start=start,
        stop=stop,
        read_start=start // group_size * group_size,
        read_stop=min(-(-stop // group_size) * group_size, in_features),
    )


def stored_rows(columns: ColumnShare, group_size: int) -> dict[str, tuple[int, int]]:
    """First row and number of rows to read of each tensor of an int4 weight, whose rows go along K.

    Args:
        columns: the rank's share of K.
        group_size: inputs per scale, or WHOLE_ROW.
    """
    # read_start is where a group begins, so even.
    packed = columns.read_start // 2, (columns.columns_read + 1) // 2
    first_group = group_count(columns.read_start, group_size) if columns.read_start else 0
    groups = first_group, group_count(columns.columns_read, group_size)
    return {"weight_packed": packed, "weight_scale": groups, "weight_zero_point": groups}
