# SPDX-License-Identifier: Apache-2.0
"""The kernels of a mixture of experts in Triton's interpreter; see `interpreter.py`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.interpreter import guarded
from tests.kernels.moe_problem import MoeProblem, random_moe
from tests.kernels.problem import mean_relative_error
from vllm_nanoquant.kernels import moe
from vllm_nanoquant.kernels import moe_decode as decode_module
from vllm_nanoquant.kernels import moe_grouped as grouped_module
from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.moe_decode import moe_decode
from vllm_nanoquant.kernels.moe_grouped import GroupedSettings, moe_grouped
from vllm_nanoquant.kernels.moe_plan import plan_pairs
from vllm_nanoquant.quantize.groups import WHOLE_ROW

pytest_plugins = ["tests.kernels.interpreter"]

# What is rounded between the products is squared, or multiplied; and the interpreter cuts bf16 off.
LIMIT = {torch.bfloat16: 1.6e-2, torch.float16: 1.5e-3}
# hidden, intermediate, experts, top_k, group size, group offset of W2
SHAPES = [
    (65, 33, 3, 2, 32, 5),
    (130, 150, 5, 3, 128, 32),
    (40, 300, 2, 1, 64, 63),
    (300, 20, 9, 4, WHOLE_ROW, 0),
]


def guarded_weights(problem: MoeProblem, at_end: bool) -> tuple[ExpertWeights, ExpertWeights]:
    w13, w2 = (
        replace(each, words=guarded(each.words, at_end), scales=guarded(each.scales, at_end))
        for each in problem.stacked()
    )
    return w13, w2


def routes(
    problem: MoeProblem, at_end: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    given = problem.expert_map
    return (
        guarded(problem.topk_weights, at_end),
        guarded(problem.topk_ids, at_end),
        None if given is None else guarded(given, at_end),
    )


def decode(problem: MoeProblem, at_end: bool) -> torch.Tensor:
    arrivals = guarded(problem.arrivals(), at_end)
    x = guarded(problem.x, at_end)
    y = moe_decode(
        x,
        *guarded_weights(problem, at_end),
        arrivals,
        *routes(problem, at_end),
        problem.activation,
    )
    assert not arrivals.any()
    return y


def grouped(problem: MoeProblem, settings: GroupedSettings, at_end: bool) -> torch.Tensor:
    x = guarded(problem.x, at_end)
    return moe_grouped(
        x,
        *guarded_weights(problem, at_end),
        *routes(problem, at_end),
        problem.activation,
        settings,
    )


@pytest.mark.parametrize(
    ("shape", "tokens", "activation", "dtype"),
    [
        (SHAPES[0], 1, "relu2_no_mul", torch.float16),
        (SHAPES[0], 5, "silu", torch.bfloat16),
        (SHAPES[1], 1, "relu2_no_mul", torch.bfloat16),
        (SHAPES[2], 3, "gelu", torch.float16),
        (SHAPES[3], 2, "relu2_no_mul", torch.float16),
    ],
)
def test_decode(
    shape: tuple[int, int, int, int, int, int],
    tokens: int,
    activation: str,
    dtype: torch.dtype,
    at_end: bool,
) -> None:
    problem = random_moe(tokens, *shape, activation=activation, dtype=dtype)
    y = decode(problem, at_end)
    assert y.dtype == dtype
    assert mean_relative_error(y, problem.expected()) <= LIMIT[dtype]


def test_decode_with_more_pairs_of_an_expert_than_columns(at_end: bool) -> None:
    problem = random_moe(19, 40, 50, 4, 2, 32, popular=True)
    y = decode(problem, at_end)
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.bfloat16]


def test_decode_of_a_rank_with_some_of_the_experts(at_end: bool) -> None:
    problem = random_moe(7, 70, 40, 2, 3, 32, expert_map=[-1, 1, -1, 0, -1])
    y = decode(problem, at_end)
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.bfloat16]


def test_decode_of_a_rank_with_none_of_the_chosen(at_end: bool) -> None:
    problem = random_moe(3, 70, 40, 2, 1, 32, expert_map=[-1, 1, -1, 0, -1])
    problem.topk_ids[:] = torch.tensor([[0], [2], [4]])
    assert not decode(problem, at_end).any()


def test_tokens_of_decode_stand_alone(at_end: bool) -> None:
    problem = random_moe(9, 70, 150, 4, 2, 128)
    y = decode(problem, at_end)
    assert torch.equal(decode(problem, at_end), y)
    for token in (0, 4, 8):
        one = slice(token, token + 1)
        alone = replace(
            problem,
            x=problem.x[one],
            topk_weights=problem.topk_weights[one],
            topk_ids=problem.topk_ids[one],
        )
        assert torch.equal(decode(alone, at_end)[0], y[token])


@pytest.mark.parametrize(("tiles", "warps", "prefetch"), [(1, 8, 1), (4, 2, 2)])
def test_decode_cut_otherwise(
    tiles: int,
    warps: int,
    prefetch: int,
    monkeypatch: pytest.MonkeyPatch,
    at_end: bool,
) -> None:
    for name, value in {"TILES": tiles, "WARPS": warps, "PREFETCH": prefetch}.items():
        monkeypatch.setattr(decode_module, name, value)
    problem = random_moe(2, 200, 330, 3, 2, 64, 32)
    y = decode(problem, at_end)
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.bfloat16]


@pytest.mark.parametrize(
    ("shape", "tokens", "activation", "dtype", "halves"),
    [
        (SHAPES[0], 23, "relu2_no_mul", torch.bfloat16, False),
        (SHAPES[0], 9, "silu", torch.float16, True),
        (SHAPES[1], 9, "relu2_no_mul", torch.float16, False),
        (SHAPES[2], 17, "gelu", torch.bfloat16, True),
        (SHAPES[3], 3, "relu2_no_mul", torch.float16, False),
    ],
)
def test_grouped(
    shape: tuple[int, int, int, int, int, int],
    tokens: int,
    activation: str,
    dtype: torch.dtype,
    halves: bool,
    at_end: bool,
) -> None:
    problem = random_moe(tokens, *shape, activation=activation, dtype=dtype)
    y = grouped(problem, GroupedSettings(16, 64, 4, 1, halves), at_end)
    assert y.dtype == dtype
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.bfloat16]


def test_grouped_on_a_rank_with_some_of_the_experts(at_end: bool) -> None:
    problem = random_moe(40, 100, 70, 3, 2, 64, expert_map=[-1, 1, -1, 0, -1, 2])
    y = grouped(problem, GroupedSettings(32, 128, 8, 1), at_end)
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.bfloat16]
    assert torch.equal(grouped(problem, GroupedSettings(32, 128, 8, 1), at_end), y)


@pytest.mark.parametrize("expert_map", [None, [-1, 1, 0, -1]])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_router_may_choose_no_expert(
    tokens: int, expert_map: list[int] | None, at_end: bool
) -> None:
    problem = random_moe(tokens, 70, 40, 2, 2, 32, expert_map=expert_map)
    problem.topk_ids[-1] = torch.tensor([1, -1])
    expected = problem.expected()
    for y in (decode(problem, at_end), grouped(problem, GroupedSettings(16, 64, 4, 1), at_end)):
        assert mean_relative_error(y[-1:], expected[-1:]) <= LIMIT[torch.bfloat16]
    problem.topk_ids[:] = -1
    for y in (decode(problem, at_end), grouped(problem, GroupedSettings(16, 64, 4, 1), at_end)):
        assert not y.any()


def test_the_plan_of_the_picture(at_end: bool) -> None:
    """What `moe_plan.py` draws, and 19 pairs of one expert."""
    plan = plan_pairs(guarded(torch.tensor([[7, 2, 5], [2, 7, 9]]).int(), at_end), None)
    assert plan[:, 0].tolist() == [7, 2, 5, -1, -1, 9]
    works = {pair: plan[pair, 8 : 8 + plan[pair, 1]].tolist() for pair in (0, 1, 2, 5)}
    assert works == {0: [0, 4], 1: [1, 3], 2: [2], 5: [5]}
    plan = plan_pairs(guarded(torch.full((19, 1), 3, dtype=torch.int32), at_end), None)
    assert [pair for pair in range(19) if plan[pair, 0] == 3] == [0, 8, 16]
    assert plan[[0, 8, 16], 1].tolist() == [8, 8, 3]
    assert plan[8, 8:16].tolist() == list(range(8, 16))


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_kernels_by_the_number_of_tokens(
    tokens: int, monkeypatch: pytest.MonkeyPatch, at_end: bool
) -> None:
    """Two tokens in the one kernel, five in the other; of seven, the last two in the first."""
    monkeypatch.setattr(moe, "DECODE_PAIRS", 4)
    monkeypatch.setattr(moe, "GROUPED_TOKENS", 5)
    problem = random_moe(tokens, 40, 50, 3, 2, 32)
    chosen = []
    for module, name in ((decode_module, "moe_decode"), (grouped_module, "moe_grouped")):
        kernel = getattr(module, name)

        def counted(x: torch.Tensor, *rest: object, kernel: Any = kernel, name: str = name) -> Any:
            chosen.append((name, len(x)))
            return kernel(x, *rest)

        monkeypatch.setattr(module, name, counted)
    arrivals = guarded(problem.arrivals(), at_end)
    mixture = moe._Mixture(
        guarded(problem.x, at_end),
        *guarded_weights(problem, at_end),
        arrivals,
        *routes(problem, at_end),
        problem.activation,
    )
    y = moe._sum_of_experts(mixture)
    assert mean_relative_error(y, problem.expected()) <= LIMIT[torch.bfloat16]
    many = [("moe_grouped", 5), ("moe_decode", 2)]
    assert chosen == (many if tokens == 7 else [("moe_decode", tokens)])
