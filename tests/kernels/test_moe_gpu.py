# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on a GPU: accuracy, determinism, CUDA graphs, no late compilation.

Run it under `compute-sanitizer --tool memcheck` (or racecheck) with `-k odd` for odd shapes alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.moe_problem import MoeProblem, random_moe
from tests.kernels.problem import mean_relative_error
from vllm_nanoquant.kernels.moe import decode_limit, moe_w4a16, warm_up_experts
from vllm_nanoquant.kernels.moe_reference import moe_reference
from vllm_nanoquant.quantize.groups import WHOLE_ROW

pytest.importorskip("triton")

from vllm_nanoquant.kernels.fused import arrange_kernel
from vllm_nanoquant.kernels.moe_decode import down_kernel, up_kernel
from vllm_nanoquant.kernels.moe_gate import gate_kernel
from vllm_nanoquant.kernels.moe_grouped import grouped_kernel
from vllm_nanoquant.kernels.moe_plan import plan_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

# What lies between the products is rounded to bf16, then squared or multiplied.
TOLERANCE = 8e-3
TOKENS = (1, 2, 5, 8, 19, 100, 700)
# hidden, intermediate, experts, top_k, group size, group offset of W2
SHAPES = [
    (2688, 1856, 16, 6, 128, 0),
    (2688, 928, 16, 6, 128, 64),
    (2688, 464, 16, 6, 64, 16),
]
ODD_SHAPES = [
    (65, 33, 3, 2, 32, 5),
    (130, 150, 5, 3, 128, 32),
    (40, 300, 2, 1, 64, 63),
    (300, 20, 9, 4, WHOLE_ROW, 0),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def poison_free_memory() -> None:
    """Leave NaN in the memory that the allocator hands out next."""
    junk = [torch.full((1 << size,), float("nan"), device="cuda") for size in range(4, 26)]
    del junk


def run(problem: MoeProblem) -> torch.Tensor:
    arrivals = problem.arrivals()
    routes = (problem.topk_weights, problem.topk_ids, problem.expert_map)
    stacked = problem.stacked()
    poison_free_memory()
    y = moe_w4a16(problem.x, *stacked, arrivals, *routes, problem.activation)
    assert not arrivals.any()
    return y


def first_tokens(problem: MoeProblem, count: int) -> MoeProblem:
    return replace(
        problem,
        x=problem.x[:count],
        topk_weights=problem.topk_weights[:count],
        topk_ids=problem.topk_ids[:count],
    )


def check(problem: MoeProblem) -> None:
    """Against fp64 for a few tokens; the others against the reference, which that proves too."""
    y = run(problem)
    few = first_tokens(problem, 3)
    assert mean_relative_error(y[:3], few.expected()) <= TOLERANCE
    routes = (problem.topk_weights, problem.topk_ids, problem.expert_map)
    wide = moe_reference(problem.x.float(), *problem.stacked(), *routes, problem.activation)
    assert mean_relative_error(y, wide.double()) <= TOLERANCE
    assert torch.equal(run(problem), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(
    shape: tuple[int, int, int, int, int, int], tokens: int, dtype: torch.dtype
) -> None:
    check(random_moe(tokens, *shape, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu2_no_mul"])
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_accuracy_of_odd_shapes(
    shape: tuple[int, int, int, int, int, int], tokens: int, activation: str
) -> None:
    check(random_moe(tokens, *shape, activation=activation, device="cuda"))


@pytest.mark.parametrize("tokens", [1, 8, 30, 300])
def test_a_rank_with_some_of_the_experts(tokens: int) -> None:
    numbers = [-1, 1, -1, 0, -1, 2, 3, -1]
    problem = random_moe(tokens, 300, 150, 4, 3, 64, expert_map=numbers, device="cuda")
    # Every token has one expert here, or all that is expected of it is 0.
    ids = problem.topk_ids
    ids.copy_(torch.where(ids == 1, ids[:, :1], ids))
    ids[:, 0] = 1
    check(problem)


@pytest.mark.parametrize("tokens", [8, 40, 300])
def test_all_tokens_choose_the_same_experts(tokens: int) -> None:
    check(random_moe(tokens, 300, 150, 9, 3, 64, popular=True, device="cuda"))


def test_tokens_stand_alone() -> None:
    problem = random_moe(decode_limit(6), 2688, 1856, 32, 6, device="cuda")
    y = run(problem)
    for count in (1, 2, 7, 16, 33):
        assert torch.equal(run(first_tokens(problem, count)), y[:count])


@pytest.mark.parametrize("tokens", [1, 2, 8, 32, 512])
def test_cuda_graph(tokens: int) -> None:
    problem = random_moe(tokens, 2688, 1856, 16, 6, device="cuda")
    w13, w2 = problem.stacked()
    arrivals = problem.arrivals()
    warm_up_experts(w13, w2, arrivals, problem.activation, 6)
    x, weights, ids = problem.x, problem.topk_weights, problem.topk_ids

    def call() -> torch.Tensor:
        return moe_w4a16(x, w13, w2, arrivals, weights, ids, None, problem.activation)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for _ in range(3):
        other = random_moe(tokens, 64, 32, 16, 6, 32, device="cuda")
        ids.copy_(other.topk_ids)
        x.copy_(torch.randn_like(x) / 50)
        expected = call()
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("activation", ["silu", "relu2_no_mul"])
def test_nothing_compiles_after_the_warm_up(activation: str) -> None:
    kernels = (arrange_kernel, down_kernel, gate_kernel, grouped_kernel, plan_kernel, up_kernel)

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    problem = random_moe(900, 320, 192, 8, 3, 64, activation=activation, device="cuda")
    w13, w2 = problem.stacked()
    arrivals = problem.arrivals()
    warm_up_experts(w13, w2, arrivals, activation, 3)
    before = compiled()
    for tokens in (*range(1, 40), *range(40, 901, 37)):
        few = first_tokens(problem, tokens)
        moe_w4a16(few.x, w13, w2, arrivals, few.topk_weights, few.topk_ids, None, activation)
    assert compiled() == before
