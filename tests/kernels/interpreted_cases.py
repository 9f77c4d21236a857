# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of one weight in Triton's interpreter; see `interpreter.py`."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch

from tests.kernels.interpreter import guarded, guarded_empty
from tests.kernels.problem import FewPrograms, Problem, mean_relative_error, random_problem
from vllm_nanoquant.kernels import decode as decode_module
from vllm_nanoquant.kernels import prefill as prefill_module
from vllm_nanoquant.kernels.decode import decode
from vllm_nanoquant.kernels.fused import fused
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.prefill import dequantize_rows, prefill
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.kernels.settings import DecodeLaunch, DecodeSettings, FusedSettings
from vllm_nanoquant.quantize.groups import WHOLE_ROW

pytest_plugins = ["tests.kernels.interpreter"]

Arguments = tuple[torch.Tensor, RuntimeWeight, torch.Tensor | None]


def guard(problem: Problem, at_end: bool) -> Arguments:
    x, weight, bias = problem.arguments()
    tensors = {
        name: guarded(getattr(weight, name), at_end) for name in ("words", "scales", "arrivals")
    }
    bias = None if bias is None else guarded(bias, at_end)
    return guarded(x, at_end), replace(weight, **tensors), bias


# N, K, group size, group offset: one element, odd sizes, K < g, ragged ends, cut first groups,
# both parities of the offset, several blocks of N, whole rows.
SHAPES = [
    (1, 1, 32, 0),
    (1, 1, 32, 31),
    (3, 17, 32, 0),
    (16, 64, 64, 0),
    (33, 65, 32, 5),
    (129, 131, 64, 32),
    (40, 300, 128, 127),
    (130, 259, 128, 1),
    (70, 520, WHOLE_ROW, 0),
]
LIMIT = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
DTYPES = [torch.float16, torch.bfloat16]


def decode_settings(
    warps_k: int, split: int, tiles: int, warps_n: int, prefetch: int
) -> DecodeSettings:
    launch = DecodeLaunch(tiles, warps_n, prefetch)
    return DecodeSettings(warps_k, split, launch, launch)


CASES = [
    (1, False, decode_settings(2, 2, 2, 1, 2)),
    (7, True, decode_settings(1, 1, 4, 2, 1)),
    (16, False, decode_settings(4, 1, 1, 1, 1)),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("tokens", "bias", "settings"), CASES)
def test_decode(
    shape: tuple[int, int, int, int],
    tokens: int,
    bias: bool,
    settings: DecodeSettings,
    dtype: torch.dtype,
    at_end: bool,
) -> None:
    problem = random_problem(tokens, *shape, bias=bias, dtype=dtype)
    arguments = guard(problem, at_end)
    y = decode(*arguments, settings)
    assert y.dtype == dtype
    assert mean_relative_error(y, problem.expected()) <= LIMIT[dtype]
    assert not arguments[1].arrivals.any()


@pytest.mark.parametrize("shape", [(300, 257, 64, 32), (1100, 40, 32, 8)])
def test_decode_by_the_rule(shape: tuple[int, int, int, int], at_end: bool) -> None:
    problem = random_problem(3, *shape)
    y = decode(*guard(problem, at_end))
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("split", [1, 3, 4])
def test_decode_repeats_itself_and_rows_stand_alone(split: int, at_end: bool) -> None:
    settings = decode_settings(2, split, 2, 1, 2)
    problem = random_problem(16, 70, 900, 64, 32, dtype=torch.float16)
    x, weight, _ = guard(problem, at_end)
    y = decode(x, weight, None, settings)
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.float16]
    assert torch.equal(decode(x, weight, None, settings), y)
    for row in (0, 3, 15):
        alone = x[row : row + 1].clone()
        assert torch.equal(decode(alone, weight, None, settings)[0], y[row])


def test_tiles_do_not_change_bits(at_end: bool) -> None:
    x, weight, _ = guard(random_problem(5, 150, 900, 128), at_end)
    launches = [(2, 1, 1), (2, 1, 2), (4, 1, 1), (1, 2, 2), (4, 2, 1)]
    results = [decode(x, weight, None, decode_settings(2, 3, *each)) for each in launches]
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("shape", [(33, 65, 32, 5), (130, 259, 128, 1)])
def test_bf16_where_tensor_cores_lose_subnormals(
    shape: tuple[int, int, int, int], at_end: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_module, "keeps_subnormals", lambda device: False)
    problem = random_problem(11, *shape, dtype=torch.bfloat16)
    x, weight, bias = guard(problem, at_end)
    y = decode(x, weight, bias, decode_settings(2, 2, 2, 1, 2))
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize("power", [-50, 50])
def test_bf16_of_any_size(power: int, at_end: bool) -> None:
    problem = random_problem(3, 40, 300, 128, dtype=torch.bfloat16)
    x, weight, _ = guard(problem, at_end)
    y = decode(x, weight, None)
    scaled = decode(x * 2.0**power, weight, None)
    assert torch.equal(scaled, y * 2.0**power)


def test_a_row_of_nan_stays_in_its_row(at_end: bool) -> None:
    x, weight, _ = guard(random_problem(5, 40, 100, 32, dtype=torch.float16), at_end)
    y = decode(x, weight, None)
    x[2] = float("nan")
    poisoned = decode(x, weight, None)
    assert poisoned[2].isnan().all()
    assert torch.equal(poisoned[[0, 1, 3, 4]], y[[0, 1, 3, 4]])


def fused_settings(rows: int, tokens: int, programs: int) -> FusedSettings:
    return FewPrograms(1024, rows, tokens, warps=4, stages=1, per_multiprocessor=programs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("programs", "bias"), [(1, False), (2, True), (3, False)])
def test_fused(
    shape: tuple[int, int, int, int], programs: int, bias: bool, dtype: torch.dtype, at_end: bool
) -> None:
    problem = random_problem(20, *shape, bias=bias, dtype=dtype)
    arguments = guard(problem, at_end)
    y = fused(*arguments, fused_settings(64, 16, programs))
    assert y.dtype == dtype
    # With one weight per sum nothing averages out, and the interpreter cuts bf16 off.
    assert mean_relative_error(y, problem.expected()) <= (5e-3 if shape[1] > 1 else 8e-3)
    assert not arguments[1].arrivals.any()


@pytest.mark.parametrize("programs", [1, 2, 4, 5, 6, 16])
def test_fused_however_the_work_is_cut(programs: int, at_end: bool) -> None:
    problem = random_problem(40, 150, 500, 64, 32)
    x, weight, _ = guard(problem, at_end)
    settings = fused_settings(64, 32, programs)
    y = fused(x, weight, None, settings)
    assert mean_relative_error(y, problem.expected()) <= 5e-3
    assert torch.equal(fused(x, weight, None, settings), y)
    assert not weight.arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize(shape: tuple[int, int, int, int], dtype: torch.dtype, at_end: bool) -> None:
    problem = random_problem(1, *shape)
    weight = guard(problem, at_end)[1]
    out = guarded_empty(weight.shape, dtype, at_end)
    dequantize_rows(weight, out, 0)
    exact = dequantize(problem.weight, torch.float64)
    # Rounded once, to half a unit in the last place, and the rest of the zero point besides.
    unit = torch.finfo(dtype).eps
    scale = problem.weight.scale.double().max()
    assert ((out.double() - exact).abs() <= unit * (exact.abs() / 2 + scale / 2) * 1.01).all()


@pytest.mark.parametrize("bias", [False, True])
def test_prefill_in_parts(bias: bool, monkeypatch: pytest.MonkeyPatch, at_end: bool) -> None:
    problem = random_problem(17, 300, 77, 32, 5, bias=bias)
    arguments = guard(problem, at_end)
    whole = prefill(*arguments)
    assert mean_relative_error(whole, problem.expected()) <= 5e-3
    monkeypatch.setattr(prefill_module, "SCRATCH_BYTES", 130 * 77 * 2)
    assert torch.equal(prefill(*arguments), whole)


@pytest.mark.parametrize("capturing", [False, True])
def test_a_buffer_lives_as_long_as_graphs_have_its_address(
    capturing: bool, monkeypatch: pytest.MonkeyPatch, at_end: bool
) -> None:
    monkeypatch.setattr(prefill_module, "_scratch", {})
    monkeypatch.setattr(prefill_module, "_captured", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    small, large = (guard(random_problem(17, rows, 64, 32), at_end) for rows in (64, 128))
    prefill(*small)
    (buffer,) = (weakref.ref(each) for each in prefill_module._scratch.values())
    prefill(*large)
    assert (buffer() is not None) == capturing
