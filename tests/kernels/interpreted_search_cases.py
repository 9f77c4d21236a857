# SPDX-License-Identifier: Apache-2.0
"""The search for ranges in Triton's interpreter; see `interpreter.py`."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.interpreter import guarded, guarded_empty
from vllm_nanoquant.kernels.search import search
from vllm_nanoquant.quantize.mse import KERNEL_WIDTHS, quantize_mse

pytest_plugins = ["tests.kernels.interpreter"]

GROUPS = 2


def rows_of_every_kind(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Weights [21, GROUPS * width]; an odd number of rows, more than a program takes."""
    generator = torch.Generator().manual_seed(width)
    weight = 0.02 * torch.randn(21, GROUPS * width, generator=generator)
    weight[0] = 0
    weight[1] = 0.5
    weight[2, ::2], weight[2, 1::2] = 0.25, -0.5
    weight[3] *= 1e-30
    weight[4] = weight[4].abs()
    weight[5] = -weight[5].abs()
    weight[6, ::width] = 30.0
    weight[7, ::width] = -3e4
    weight[8, 1:] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [32, 64, 128])
def test_the_bytes_are_those_of_the_reference(width: int, dtype: torch.dtype, at_end: bool) -> None:
    weight = rows_of_every_kind(width, dtype)
    expected = quantize_mse(weight, width)
    packed = guarded_empty(tuple(expected.packed.shape), torch.uint8, at_end)
    scale = guarded_empty(tuple(expected.scale.shape), torch.bfloat16, at_end)
    zero_point = guarded_empty(tuple(expected.scale.shape), torch.bfloat16, at_end)
    search(guarded(weight, at_end), width, packed, scale, zero_point)
    assert torch.equal(scale.view(torch.int16), expected.scale.view(torch.int16))
    assert torch.equal(zero_point.view(torch.int16), expected.zero_point.view(torch.int16))
    assert torch.equal(packed, expected.packed)


def test_a_part_of_the_rows_and_columns_is_written_and_no_more(at_end: bool) -> None:
    weight = rows_of_every_kind(64, torch.float32)
    expected = quantize_mse(weight, 64)
    packed = torch.full((2 * 32 * GROUPS, 30), 7, dtype=torch.uint8)
    scale, zero_point = torch.full((2, 2 * GROUPS, 30), 7.0, dtype=torch.bfloat16)
    inner = slice(4, 4 + len(weight))
    search(
        weight, 64, packed[: 32 * GROUPS, inner], scale[:GROUPS, inner], zero_point[:GROUPS, inner]
    )
    assert torch.equal(packed[: 32 * GROUPS, inner], expected.packed)
    assert torch.equal(scale[:GROUPS, inner], expected.scale)
    for whole, rows in ((packed, 32 * GROUPS), (scale, GROUPS), (zero_point, GROUPS)):
        whole[:rows, inner] = 7
        assert (whole == 7).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_scale(value: float, at_end: bool) -> None:
    weight = rows_of_every_kind(KERNEL_WIDTHS[0], torch.float32)
    weight[11, KERNEL_WIDTHS[0] + 5] = value
    packed = guarded_empty((GROUPS * KERNEL_WIDTHS[0] // 2, len(weight)), torch.uint8, at_end)
    scale, zero_point = (
        guarded_empty((GROUPS, len(weight)), torch.bfloat16, at_end) for _ in range(2)
    )
    search(guarded(weight, at_end), KERNEL_WIDTHS[0], packed, scale, zero_point)
    assert torch.isfinite(scale).logical_not().nonzero().tolist() == [[1, 11]]
