# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.quantize import slow_reference
from tests.quantize.memory import LargestAllocation
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize import minmax
from vllm_nanoquant.quantize.groups import QuantizedWeight, unpack_nibbles
from vllm_nanoquant.quantize.minmax import quantize_minmax

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_same_as_slow(weight: torch.Tensor, group_size: int) -> QuantizedWeight:
    """Integers, scales and zeros equal the slow reference's, bit for bit."""
    result = quantize_minmax(weight, group_size)
    q, scale, zero_point = slow_reference.quantize(weight.float().numpy(), group_size)
    assert np.array_equal(result.scale.float().numpy(), scale)
    assert np.array_equal(result.zero_point.float().numpy(), zero_point)
    assert np.array_equal(unpack_nibbles(result.packed, weight.shape[1]).numpy(), q)
    assert np.array_equal(result.packed.numpy(), slow_reference.pack(q))
    return result


def values_of(result: QuantizedWeight) -> torch.Tensor:
    return dequantize(result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("columns", [1, 31, 128, 129, 200])
def test_equals_the_slow_reference(dtype: torch.dtype, group_size: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randn(6, columns, generator=generator)
    weight *= torch.tensor([1.0, 1e-3, 30.0, 1.0, 1.0, 1e-6])[:, None]
    weight[3].abs_()
    weight[4].abs_().neg_()
    assert_same_as_slow(weight.to(dtype), group_size)


@settings(deadline=None, max_examples=60)
@given(
    weight=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    group_size=st.sampled_from([32, 64, 128]),
)
def test_equals_the_slow_reference_on_any_values(weight: np.ndarray, group_size: int) -> None:
    assert_same_as_slow(torch.from_numpy(weight), group_size)


def test_rows_beyond_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(23, 70, generator=torch.Generator().manual_seed(1))
    whole = quantize_minmax(weight, 32)
    monkeypatch.setattr(minmax, "CHUNK_WEIGHTS", 4 * 96)
    parts = assert_same_as_slow(weight, 32)
    assert torch.equal(whole.packed, parts.packed)


def test_zero_is_exact_and_error_is_half_a_step() -> None:
    weight = torch.randn(16, 300, generator=torch.Generator().manual_seed(2))
    weight[:, ::7] = 0.0
    result = quantize_minmax(weight, 64)
    group = torch.arange(300) // 64
    step = result.scale.float().t()[:, group]
    # Half a step, and what rounding scale (1/256 of 15 steps) and zero point (1/32 step) to bf16
    # costs at the ends of the range.
    assert ((values_of(result) - weight).abs() <= step * (0.5 + 15 / 256 + 1 / 32)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, -6e-40, 5e-40])
def test_groups_without_a_range_come_back_as_zero(dtype: torch.dtype, value: float) -> None:
    weight = torch.randn(3, 96).to(dtype)
    weight[1] = torch.tensor(value).to(dtype)
    weight[2, 32:64] = torch.tensor(value).to(dtype)
    result = assert_same_as_slow(weight, 32)
    if weight[1].float().abs().max() * 2 > 1e-39:
        return  # wide enough in this dtype for a scale above 0
    values = values_of(result)
    assert not values[1].any() and not values[2, 32:64].any()
    assert (result.scale[:, 1] == 1).all() and not result.zero_point[:, 1].any()
    assert not unpack_nibbles(result.packed, 96)[1].any()


@pytest.mark.parametrize("scale", [1e-37, 1e-38, 1e-39, 1e-40, 1e-43, 1e-45])
def test_denormals_stay_finite(scale: float) -> None:
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(3)) * scale
    result = assert_same_as_slow(weight, 32)
    assert torch.isfinite(values_of(result)).all()


@pytest.mark.parametrize("value", [1.0, -2.5, 1e-3, 3e38])
def test_constant_rows_come_back_almost_exactly(value: float) -> None:
    weight = torch.full((2, 40), value)
    result = assert_same_as_slow(weight, 32)
    torch.testing.assert_close(values_of(result), weight, rtol=2**-8, atol=0.0)


def test_no_negative_zero_points() -> None:
    weight = torch.randn(4, 64).abs()
    weight[:, ::2] = -0.0
    zero_point = quantize_minmax(weight, 32).zero_point
    assert not torch.signbit(zero_point).any()


def test_non_contiguous_weights() -> None:
    weight = torch.randn(70, 12).t()
    expected = quantize_minmax(weight.contiguous(), 32)
    assert torch.equal(quantize_minmax(weight, 32).packed, expected.packed)


def test_the_weight_is_left_alone() -> None:
    weight = torch.randn(4, 64)
    before = weight.clone()
    quantize_minmax(weight, 32)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weights_are_refused(dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(9, 100).to(dtype)
    weight[4, 99] = bad
    weight[7, 3] = bad
    weight[7, 50] = -bad
    with pytest.raises(ValueError, match=r"3 weights are not finite .* the first is in row 4"):
        quantize_minmax(weight, 32)


def test_a_range_beyond_fp32_is_refused() -> None:
    weight = torch.zeros(3, 32)
    weight[1, 0], weight[1, 1] = 3e38, -3e38
    with pytest.raises(ValueError, match=r"range of a group in row 1 .* beyond fp32"):
        quantize_minmax(weight, 32)


@pytest.mark.parametrize(
    ("weight", "group_size", "message"),
    [
        (torch.zeros(4), 32, "non-empty weight"),
        (torch.zeros(0, 4), 32, "non-empty weight"),
        (torch.zeros(4, 4, dtype=torch.float64), 32, "float64"),
        (torch.zeros(4, 4), 16, "group_size is 16"),
    ],
)
def test_arguments_that_make_no_sense(weight: torch.Tensor, group_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_minmax(weight, group_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(4096, 4480), (300, 15680)])
def test_temporaries_are_bounded(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape).to(dtype)
    with LargestAllocation(weight) as memory:
        result = quantize_minmax(weight, 128)
    assert 8 << 20 < memory.peak - result.nbytes <= 64 << 20


def test_imports_neither_vllm_nor_triton() -> None:
    code = (
        "import sys, vllm_nanoquant.quantize.minmax, vllm_nanoquant.kernels.ops;"
        "assert 'vllm' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
