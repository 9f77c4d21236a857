# SPDX-License-Identifier: Apache-2.0
"""The op on a CPU, and what it promises on any device that can be checked without a GPU."""

from __future__ import annotations

import gc
import importlib
import re
import sys
from dataclasses import replace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.problem import TOLERANCE, Problem, mean_relative_error, random_problem
from tests.quantize import slow_reference
from vllm_nanoquant.kernels import ops, reference
from vllm_nanoquant.kernels.layout import RuntimeWeight
from vllm_nanoquant.kernels.ops import w4a16, warm_up
from vllm_nanoquant.kernels.reference import dequantize, w4a16_reference
from vllm_nanoquant.quantize.groups import WHOLE_ROW, slice_columns, unpack_nibbles
from vllm_nanoquant.quantize.minmax import quantize_minmax

TOKENS = (0, 1, 2, 3, 7, 8, 9, 16, 17, 64, 300)
# N, K, group size, group offset
SHAPES = [
    (1, 1, 32, 0),
    (70, 133, 32, 0),
    (33, 257, 64, 37),
    (130, 300, 128, 96),
    (64, 384, 128, 0),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_accuracy(tokens: int, shape: tuple[int, int, int, int]) -> None:
    for bias in (False, True):
        problem = random_problem(tokens, *shape, bias=bias)
        y = w4a16(*problem.arguments())
        assert y.shape == (tokens, shape[0])
        assert y.dtype == torch.bfloat16 and y.is_contiguous()
        if tokens:
            assert mean_relative_error(y, problem.expected()) <= TOLERANCE


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(0, 20),
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 200),
    group_size=st.sampled_from([32, 64, 128, WHOLE_ROW]),
    offset=st.integers(0, 127),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_shape(
    tokens: int,
    out_features: int,
    in_features: int,
    group_size: int,
    offset: int,
    dtype: torch.dtype,
) -> None:
    offset = 0 if group_size == WHOLE_ROW else offset % group_size
    problem = random_problem(
        tokens, out_features, in_features, group_size, offset, bias=True, dtype=dtype
    )
    y = w4a16(*problem.arguments())
    assert y.dtype == dtype and y.shape == (tokens, out_features)
    torch.testing.assert_close(
        y.double(), problem.expected(), rtol=2e-3, atol=5e-3 if dtype == torch.float16 else 1e-4
    )


def test_dequantize_equals_the_slow_reference() -> None:
    weight = quantize_minmax(torch.randn(7, 101), 32)
    expected = slow_reference.dequantize(
        unpack_nibbles(weight.packed, 101).numpy(),
        weight.scale.float().numpy(),
        weight.zero_point.float().numpy(),
        32,
    )
    values = dequantize(weight, torch.float64)
    assert torch.equal(values, torch.from_numpy(expected))


def test_shares_of_k_add_up() -> None:
    weight = quantize_minmax(torch.randn(20, 300), 128)
    x = torch.randn(3, 300)
    expected = w4a16_reference(x, RuntimeWeight.from_quantized(weight), None)
    total = torch.zeros_like(expected)
    for start, stop in ((0, 101), (101, 160), (160, 300)):
        part = slice_columns(weight, start, stop)
        total += w4a16(x[:, start:stop], RuntimeWeight.from_quantized(part))
    torch.testing.assert_close(total, expected)


def test_reference_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(5, 70, 133, 32, 7, bias=True)
    whole = w4a16(*problem.arguments())
    monkeypatch.setattr(reference, "CHUNK_WEIGHTS", 133 * 64)
    torch.testing.assert_close(w4a16(*problem.arguments()), whole)


@pytest.mark.parametrize("shape", [(133,), (0, 133), (2, 3, 133), (2, 0, 133), (2, 1, 2, 133)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    problem = random_problem(1, 20, 133, 32, bias=True)
    problem.x = torch.randn(shape).bfloat16()
    y = w4a16(*problem.arguments())
    assert y.shape == (*shape[:-1], 20)
    assert torch.allclose(y.double(), problem.expected(), rtol=1e-2, atol=1e-2)


def test_strided_tokens() -> None:
    problem = random_problem(6, 20, 133, 32)
    expected = w4a16(*problem.arguments())
    x = problem.x
    wide = torch.full((6, 300), float("nan")).bfloat16()
    wide[:, 5:138] = x
    for strided in (x.t().contiguous().t(), wide[:, 5:138], x.repeat_interleave(2, 0)[::2]):
        assert not strided.is_contiguous()
        assert torch.equal(w4a16(*replace(problem, x=strided).arguments()), expected)


def test_a_row_alone_equals_the_row_in_a_batch_closely() -> None:
    problem = random_problem(9, 40, 200, 64)
    y = w4a16(*problem.arguments())
    alone = w4a16(*replace(problem, x=problem.x[4:5]).arguments())
    torch.testing.assert_close(alone[0], y[4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 600)}, "x is [2, 600]; its last dimension must be 64"),
        # The padding is the same, so the op could not tell.
        ({"x": torch.zeros(2, 80)}, "x is [2, 80]; its last dimension must be 64"),
        ({"x": torch.zeros(())}, "x is []; its last dimension must be 64"),
        ({"bias": torch.zeros(21)}, "bias is torch.float32 [21]"),
        ({"bias": torch.zeros(20, dtype=torch.float16)}, "bias is torch.float16 [20]"),
        ({"bias": torch.zeros(40)[::2]}, "bias must be contiguous"),
    ],
)
def test_arguments_that_do_not_fit(changes: dict[str, torch.Tensor], message: str) -> None:
    problem = random_problem(2, 20, 64, 32, dtype=torch.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        w4a16(*replace(problem, **changes).arguments())


def op_arguments(problem: Problem) -> tuple[object, ...]:
    """What the op itself takes, without the weight's class."""
    x, w, bias = problem.arguments()
    return (
        x,
        w.words,
        w.scales,
        w.arrivals,
        bias,
        w.out_features,
        w.group_size,
        w.group_offset,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_opcheck(tokens: int, bias: bool) -> None:
    problem = random_problem(tokens, 20, 70, 32, 3, bias=bias)
    torch.library.opcheck(torch.ops.nanoquant.w4a16.default, op_arguments(problem))


@pytest.mark.parametrize("left", range(1, 4))
def test_a_weight_that_is_partly_on_the_meta_device_is_refused(left: int) -> None:
    """PyTorch would answer with memory that nobody wrote."""
    arguments = list(op_arguments(random_problem(2, 20, 64, 32)))
    arguments[left] = cast(torch.Tensor, arguments[left]).to("meta")
    with pytest.raises(ValueError, match=r"x is on cpu, a tensor of the weight on meta; bring all"):
        torch.ops.nanoquant.w4a16(*arguments)


def test_one_graph_for_every_batch_size() -> None:
    problem = random_problem(1, 20, 70, 32, 3, bias=True)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    _, weight, bias = problem.arguments()
    # Parameters, as layers hold them: of a plain tensor dynamic=True would guess every size.
    for name in ("words", "scales", "arrivals"):
        tensor = torch.nn.Parameter(getattr(weight, name), requires_grad=False)
        weight = replace(weight, **{name: tensor})
    compiled = torch.compile(
        lambda x: w4a16(x * 2, weight, bias) + 1,
        backend=backend,
        fullgraph=True,
        dynamic=True,
    )
    for tokens in (2, 3, 8, 16, 17, 64, 300):
        x = torch.randn(tokens, 70).bfloat16()
        assert torch.equal(compiled(x), w4a16(x * 2, weight, bias) + 1)
    assert len(graphs) == 1
    assert sum("w4a16" in str(node.target) for node in graphs[0].graph.nodes) == 1


def test_inductor() -> None:
    problem = random_problem(4, 20, 70, 32, bias=True)
    x, weight, bias = problem.arguments()
    compiled = torch.compile(lambda x: w4a16(x, weight, bias), fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), w4a16(x, weight, bias))


def test_the_op_outlives_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = random_problem(2, 20, 64, 32)
    expected = w4a16(*problem.arguments())
    importlib.reload(ops)
    monkeypatch.delitem(sys.modules, "vllm_nanoquant.kernels.ops")
    again = importlib.import_module("vllm_nanoquant.kernels.ops")
    gc.collect()
    assert torch.equal(again.w4a16(*problem.arguments()), expected)


def test_warm_up_does_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object) -> None:
        raise AssertionError("warm_up ran the op")

    monkeypatch.setattr(ops, "w4a16", forbidden)
    warm_up(random_problem(1, 20, 64, 32).arguments()[1])
