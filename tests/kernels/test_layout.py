# SPDX-License-Identifier: Apache-2.0
"""The runtime layout: against the picture in its docstring, back again, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.problem import random_weight
from vllm_nanoquant.kernels import layout
from vllm_nanoquant.kernels.layout import RuntimeWeight, to_quantized
from vllm_nanoquant.kernels.reference import block_rows
from vllm_nanoquant.quantize.groups import WHOLE_ROW, QuantizedWeight, unpack_nibbles


def nibble(weight: RuntimeWeight, row: int, column: int) -> int:
    """One integer, found as the picture says."""
    column += weight.group_offset
    within = column % 128
    half, i, c = within // 64, within % 8, within % 32 // 8
    word = half * 128 + (4 * (row % 8) + c) * 4 + 2 * (i // 2 % 2) + row % 16 // 8
    shift = 4 * (2 * (within // 32 % 2) + i // 4) + 16 * (i % 2)
    return int(weight.words[row // 64, column // 128, row % 64 // 16, word]) >> shift & 15


def scale_word(weight: RuntimeWeight, row: int, column: int) -> int:
    column += weight.group_offset
    chunk, within = divmod(column, 128)
    group = 0
    if weight.group_size == WHOLE_ROW:
        chunk = 0
    else:
        group = within // weight.group_size
    word = weight.scales[chunk, row // 16, row % 8, row % 16 // 8, group]
    return int(word) & 0xFFFFFFFF


@pytest.mark.parametrize(
    "shape", [(70, 300, 128, 0), (130, 259, 64, 37), (33, 65, 32, 5), (20, 150, WHOLE_ROW, 0)]
)
def test_every_weight_is_where_the_picture_says(shape: tuple[int, int, int, int]) -> None:
    source = random_weight(*shape)
    weight = RuntimeWeight.from_quantized(source)
    q = unpack_nibbles(source.packed, source.in_features)
    scale = source.scale.view(torch.int16).to(torch.int32) & 0xFFFF
    zero_point = source.zero_point.view(torch.int16).to(torch.int32) & 0xFFFF
    for row in range(0, shape[0], 3):
        for column in range(0, shape[1], 7):
            assert nibble(weight, row, column) == q[row, column]
            group = 0 if shape[2] == WHOLE_ROW else (column + shape[3]) // shape[2]
            expected = int(scale[group, row]) | int(zero_point[group, row]) << 16
            assert scale_word(weight, row, column) == expected


def equal(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    same = (a.group_size, a.in_features, a.group_offset) == (
        b.group_size,
        b.in_features,
        b.group_offset,
    )
    pairs = ((a.packed, b.packed), (a.scale, b.scale), (a.zero_point, b.zero_point))
    return same and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


@settings(deadline=None, max_examples=40)
@given(
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 400),
    group_size=st.sampled_from([32, 64, 128, WHOLE_ROW]),
    offset=st.integers(0, 127),
)
def test_there_and_back(out_features: int, in_features: int, group_size: int, offset: int) -> None:
    offset = 0 if group_size == WHOLE_ROW else offset % group_size
    source = random_weight(out_features, in_features, group_size, offset)
    assert equal(to_quantized(RuntimeWeight.from_quantized(source)), source)


def test_packing_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    source = random_weight(300, 200, 64, 3)
    whole = RuntimeWeight.from_quantized(source)
    monkeypatch.setattr(layout, "_PACK_ROWS_WEIGHTS", 64 * 256)
    assert torch.equal(RuntimeWeight.from_quantized(source).words, whole.words)


def test_padding_is_zero_and_small() -> None:
    weight = RuntimeWeight.from_quantized(random_weight(22656, 4480, 128))
    assert weight.nbytes <= 1.01 * (22656 * 4480 // 2 + 35 * 22656 * 4)
    padded = RuntimeWeight.from_quantized(random_weight(3, 5, 32))
    assert int((padded.words != 0).sum()) <= 3 * 4
    assert int((padded.scales != 0).sum()) == 3
    assert not padded.arrivals.any()


def test_blocks_of_rows() -> None:
    source = random_weight(200, 300, 64)
    weight = RuntimeWeight.from_quantized(source)
    part = to_quantized(block_rows(weight, 1, 2))
    assert torch.equal(part.packed, source.packed[:, 64:192])
    last = to_quantized(block_rows(weight, 3, 1))
    assert torch.equal(last.scale, source.scale[:, 192:])


def test_a_clone_shares_nothing() -> None:
    weight = RuntimeWeight.from_quantized(random_weight(64, 128, 128))
    clone = weight.clone()
    clone.words.zero_()
    clone.scales.zero_()
    assert weight.words.any() and weight.scales.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_features": 500}, "a weight [70, 500] in groups of 64 with offset 0 needs"),
        ({"out_features": 200}, "words is torch.int32 [2, 3, 4, 256]; a weight [200, 300]"),
        ({"out_features": 0}, "a weight [0, 300] has no elements"),
        ({"group_size": 48}, "group_size is 48"),
        ({"group_size": 128}, "scales is torch.int32 [3, 8, 8, 2, 2]"),
        ({"group_offset": 64}, "group_offset is 64"),
        ({"group_size": WHOLE_ROW, "group_offset": 1}, "less than 1"),
        ({"arrivals": torch.zeros(3, dtype=torch.int32)}, "arrivals is torch.int32 [3]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], message: str) -> None:
    weight = RuntimeWeight.from_quantized(random_weight(70, 300, 64))
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(weight, **changes)  # type: ignore[arg-type]
