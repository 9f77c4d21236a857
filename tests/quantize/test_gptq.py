# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quantize.errors import row_errors, values_of
from vllm_nanoquant.quantize import gptq
from vllm_nanoquant.quantize.gptq import quantize_gptq
from vllm_nanoquant.quantize.groups import QuantizedWeight, unpack_nibbles
from vllm_nanoquant.quantize.mse import quantize_mse


def problem(
    rows: int, columns: int, tokens: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of correlated inputs of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    inputs *= torch.rand(columns, generator=generator) + 0.05
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs


def slow_gptq(
    weight: np.ndarray, hessian: np.ndarray, grid: QuantizedWeight, damping: float
) -> np.ndarray:
    """Integers [N, K]: optimal brain quantization in fp64, one column after another.

    Each step inverts the Hessian of the columns that are left anew. No blocks, no factorisation.
    """
    w, diagonal = weight.copy(), hessian.diagonal().copy()
    size = grid.in_features if grid.group_size == -1 else grid.group_size
    scale, zero = grid.scale.double().numpy(), grid.zero_point.double().numpy()
    live = diagonal > 0
    hessian = hessian + np.diag(np.where(live, damping * diagonal[live].mean(), 1.0))
    left = sorted(range(w.shape[1]), key=lambda k: -diagonal[k])
    q = np.zeros(w.shape)
    while left:
        k = left[0]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        s, z = scale[k // size], zero[k // size]
        q[:, k] = np.clip(np.round(w[:, k] / s - z), 0, 15)
        error = (w[:, k] - (q[:, k] + z) * s) / inverse[0, 0]
        w[:, left[1:]] -= np.outer(error, inverse[0, 1:])
        left = left[1:]
    return q


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize(("columns", "group_size"), [(32, 32), (75, 32), (130, 128), (45, -1)])
def test_equals_the_slow_recursion(columns: int, group_size: int, block: int) -> None:
    weight, hessian = problem(24, columns, 400, seed=columns)
    hessian[3], hessian[:, 3] = 0.0, 0.0
    result = quantize_gptq(weight, hessian, group_size, damping=0.01, block=block)
    grid = quantize_mse(weight, group_size, importance=hessian.diagonal())
    slow = slow_gptq(weight.double().numpy(), hessian.double().numpy(), grid, 0.01)
    q = unpack_nibbles(result.packed, columns).numpy()
    # A weight halfway between two integers in fp64 may round the other way in fp32, and every
    # column after it then differs: allowed in one row of 24.
    assert (q == slow).all(axis=1).sum() >= 23
    assert not np.array_equal(q, unpack_nibbles(grid.packed, columns).numpy())


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 90),
    tokens=st.integers(1, 120),
    group_size=st.sampled_from([32, 64, 128, -1]),
    dead=st.sets(st.integers(0, 89), max_size=6),
    seed=st.integers(0, 1000),
)
def test_no_row_is_worse_than_mse(
    rows: int, columns: int, tokens: int, group_size: int, dead: set[int], seed: int
) -> None:
    weight, hessian = problem(rows, columns, tokens, seed)
    for k in dead:
        if k < columns:
            hessian[k], hessian[:, k] = 0.0, 0.0
    result = quantize_gptq(weight, hessian, group_size)
    mse = row_errors(weight, quantize_mse(weight, group_size), hessian)
    # Rows are compared in fp32; a row's error is a difference of larger terms.
    slack = 1e-5 * float(hessian.diagonal().sum()) * 1e-2
    assert (row_errors(weight, result, hessian) <= mse * (1 + 1e-4) + slack).all()
    assert np.isfinite(values_of(result)).all()


def test_errors_are_far_smaller_where_inputs_are_correlated() -> None:
    weight, hessian = problem(64, 300, 2000)
    found = row_errors(weight, quantize_gptq(weight, hessian, 128), hessian).sum()
    importance = hessian.diagonal()
    weighted = quantize_mse(weight, 128, importance=importance)
    assert found < 0.75 * row_errors(weight, weighted, hessian).sum()


def test_a_row_that_spreading_makes_worse_is_taken_from_mse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight, hessian = problem(16, 64, 300)
    good = quantize_gptq(weight, hessian, 32)
    original = gptq.spread_errors

    def spoiled(*arguments: object) -> torch.Tensor:
        q = original(*arguments)  # type: ignore[arg-type]
        q[5] = 15 - q[5]
        return q

    monkeypatch.setattr(gptq, "spread_errors", spoiled)
    result = quantize_gptq(weight, hessian, 32)
    errors, mse = (
        row_errors(weight, r, hessian)
        for r in (result, quantize_mse(weight, 32, importance=hessian.diagonal()))
    )
    assert errors[5] <= mse[5] * (1 + 1e-4)
    others = [n for n in range(16) if n != 5]
    assert torch.equal(result.packed[:, others], good.packed[:, others])


def test_the_size_of_the_hessian_does_not_matter() -> None:
    weight, hessian = problem(8, 70, 300)
    one, other = (quantize_gptq(weight, hessian * c, 32) for c in (1.0, 2.0**-30))
    assert torch.equal(one.packed, other.packed)


def test_dead_columns_are_rounded_to_nearest() -> None:
    weight, hessian = problem(8, 64, 300)
    hessian[::3], hessian[:, ::3] = 0.0, 0.0
    result = quantize_gptq(weight, hessian, 32)
    step = result.scale.double().t()[:, torch.arange(64) // 32].numpy()
    off = np.abs(values_of(result) - weight.double().numpy())[:, ::3]
    low = (result.zero_point.double() * result.scale.double()).t()[:, torch.arange(64) // 32]
    inside = (weight > low) & (weight < low + 15 * torch.from_numpy(step))
    assert (off <= 0.5 * step[:, ::3] * (1 + 1e-6))[inside.numpy()[:, ::3]].all()


def test_no_live_column_at_all() -> None:
    weight = torch.randn(4, 40)
    result = quantize_gptq(weight, torch.zeros(40, 40), 32)
    assert torch.equal(result.packed, quantize_mse(weight, 32).packed)


def test_more_damping_where_the_hessian_is_not_positive_definite() -> None:
    weight, hessian = problem(8, 48, 20)  # rank 20
    hessian -= 0.03 * hessian.diagonal().mean() * torch.eye(48)
    hessian.diagonal().clamp_(min=1e-3)
    result = quantize_gptq(weight, hessian, 32, damping=0.001)
    assert np.isfinite(values_of(result)).all()


def test_a_hessian_that_no_damping_helps_is_refused() -> None:
    hessian = torch.full((40, 40), 5.0)
    hessian.diagonal().fill_(1.0)
    with pytest.raises(
        ValueError, match=r"not positive definite, with 1 of its mean diagonal.*mse"
    ):
        quantize_gptq(torch.randn(4, 40), hessian, 32)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(39), r"\[39, 39\]; a weight with 40 columns needs torch.float32 \[40, 40\]"),
        (torch.eye(40).double(), "torch.float64"),
        (torch.eye(40) * float("nan"), "not finite"),
        (torch.eye(40) * float("inf"), "not finite"),
        (-torch.eye(40), "-1 on its diagonal at column 0"),
    ],
)
def test_hessians_that_make_no_sense(hessian: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_gptq(torch.randn(4, 40), hessian, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"damping": 0.0}, "damping is 0"), ({"damping": 2.0}, "damping"), ({"block": 0}, "block is")],
)
def test_settings_that_make_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_gptq(torch.randn(4, 40), torch.eye(40), 32, **options)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="1 weights are not finite"):
        quantize_gptq(torch.tensor([[1.0, float("nan")]]), torch.eye(2), 32)
