# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quantize import slow_reference
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.groups import (
    QuantizedWeight,
    group_count,
    join_rows,
    pack_nibbles,
    slice_columns,
    unpack_nibbles,
)
from vllm_nanoquant.quantize.minmax import quantize_minmax


def values_of(weight: QuantizedWeight) -> torch.Tensor:
    return dequantize(weight)


def example(rows: int = 5, columns: int = 100, group_size: int = 32) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(0)
    return quantize_minmax(torch.randn(rows, columns, generator=generator), group_size)


@settings(deadline=None)
@given(rows=st.integers(0, 9), columns=st.integers(1, 70), seed=st.integers(0, 1000))
def test_packing_round_trip(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=generator)
    packed = pack_nibbles(q)
    assert packed.is_contiguous()
    assert torch.equal(packed, torch.from_numpy(slow_reference.pack(q.numpy())))
    assert torch.equal(unpack_nibbles(packed, columns), q)


def test_packing_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        pack_nibbles(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="expected uint8"):
        pack_nibbles(torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 packed rows cannot hold 5 columns"):
        unpack_nibbles(torch.zeros(2, 3, dtype=torch.uint8), 5)


@pytest.mark.parametrize(
    ("columns", "group_size", "offset", "expected"),
    [(128, 128, 0, 1), (129, 128, 0, 2), (15680, 128, 0, 123), (7840, 128, 32, 62), (1, 32, 31, 1)],
)
def test_group_count(columns: int, group_size: int, offset: int, expected: int) -> None:
    assert group_count(columns, group_size, offset) == expected


@pytest.mark.parametrize("start", range(100))
def test_slice_equals_slice_of_values(start: int) -> None:
    weight = example()
    whole = values_of(weight)
    for stop in range(start + 1, 101):
        part = slice_columns(weight, start, stop)
        assert part.shape == (5, stop - start)
        assert part.group_offset == start % 32
        assert torch.equal(values_of(part), whole[:, start:stop])
        if part.in_features % 2:
            assert not (part.packed[-1] >> 4).any()


def test_slice_of_a_slice() -> None:
    weight = example()
    whole = values_of(weight)
    for middle in (1, 17, 31, 33, 50):
        part = slice_columns(slice_columns(weight, middle, 99), 20, 45)
        assert torch.equal(values_of(part), whole[:, middle + 20 : middle + 45])


def test_slice_of_down_proj_at_tensor_parallel_2() -> None:
    weight = example(rows=2, columns=15680, group_size=128)
    part = slice_columns(weight, 7840, 15680)
    assert (part.group_offset, part.scale.shape[0]) == (32, 62)
    assert torch.equal(values_of(part), values_of(weight)[:, 7840:])


def test_slice_owns_its_memory() -> None:
    weight = example()
    part = slice_columns(weight, 0, 100)
    part.packed.zero_()
    part.scale.zero_()
    part.zero_point.zero_()
    assert weight.packed.any() and weight.scale.any() and weight.zero_point.any()


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 5), (6, 5), (0, 101)])
def test_slice_refuses_bad_ranges(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not a non-empty part of 100 columns"):
        slice_columns(example(), start, stop)


def test_sizes() -> None:
    weight = example()
    assert weight.shape == (5, 100)
    assert weight.nbytes == 50 * 5 + 2 * (4 * 5 * 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 48}, "group_size is 48"),
        ({"in_features": 0}, "in_features is 0"),
        ({"group_offset": 32}, "group_offset is 32"),
        ({"group_offset": -1}, "group_offset is -1"),
        ({"in_features": 101}, "101 columns need [51, N]"),
        ({"packed": torch.zeros(50, 5)}, "packed weight is torch.float32"),
        ({"packed": torch.zeros(50, 6, dtype=torch.uint8)}, "scale has shape [4, 5]"),
        ({"packed": torch.zeros(5, 50, dtype=torch.uint8).t()}, "must be contiguous"),
        ({"group_offset": 31}, "need [5, 5]"),
        ({"zero_point": torch.zeros(4, 5)}, "zero point is torch.float32"),
        (
            {"scale": torch.zeros(4, 5, dtype=torch.bfloat16, device="meta")},
            "scale is on meta",
        ),
    ],
)
def test_shapes_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(example(), **changes)  # type: ignore[arg-type]


def test_rows_that_are_joined_are_those_of_one_weight() -> None:
    weight = torch.randn(11, 100, generator=torch.Generator().manual_seed(0))
    parts = [quantize_minmax(part, 32) for part in weight.split([4, 1, 6])]
    joined, whole = join_rows(parts), quantize_minmax(weight, 32)
    for name in ("packed", "scale", "zero_point"):
        assert torch.equal(getattr(joined, name), getattr(whole, name))
    assert join_rows(parts[:1]) is parts[0]
    with pytest.raises(ValueError, match="other columns or groups cannot be joined"):
        join_rows([parts[0], slice_columns(parts[1], 1, 100)])
