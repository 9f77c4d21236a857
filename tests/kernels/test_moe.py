# SPDX-License-Identifier: Apache-2.0
"""A mixture of int4 experts on the CPU, what the op refuses, and what the warm-up covers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from tests.kernels.moe_problem import MoeProblem, random_moe
from tests.kernels.problem import mean_relative_error, random_weight
from vllm_nanoquant.kernels import settings
from vllm_nanoquant.kernels.experts import ExpertWeights
from vllm_nanoquant.kernels.layout import to_quantized
from vllm_nanoquant.kernels.moe import GROUPED_TOKENS, arrivals_needed, decode_limit, moe_w4a16
from vllm_nanoquant.quantize.groups import WHOLE_ROW

# hidden, intermediate, experts, top_k, group size, group offset of W2
SHAPES = [(65, 33, 3, 2, 32, 5), (130, 150, 5, 3, 128, 32), (300, 20, 9, 4, WHOLE_ROW, 0)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def run(problem: MoeProblem, **changed: Any) -> torch.Tensor:
    w13, w2 = problem.stacked()
    arguments = {
        "x": problem.x,
        "w13": w13,
        "w2": w2,
        "arrivals": problem.arrivals(),
        "topk_weights": problem.topk_weights,
        "topk_ids": problem.topk_ids,
        "expert_map": problem.expert_map,
        "activation": problem.activation,
    }
    return moe_w4a16(**(arguments | changed))


@pytest.mark.parametrize("activation", ["relu2_no_mul", "silu", "gelu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape: tuple[int, int, int, int, int, int], activation: str) -> None:
    problem = random_moe(7, *shape, activation=activation, dtype=torch.float32)
    y = run(problem)
    assert y.dtype == torch.float32
    assert mean_relative_error(y, problem.expected()) <= 1e-5


def test_in_bf16_the_products_are_rounded_once() -> None:
    problem = random_moe(5, 130, 150, 4, 2)
    assert mean_relative_error(run(problem), problem.expected()) <= 8e-3


def test_experts_of_other_ranks_and_none_are_left_out() -> None:
    problem = random_moe(6, 40, 50, 2, 3, 32, expert_map=[-1, 1, 0, -1], dtype=torch.float32)
    problem.topk_ids[2] = torch.tensor([-1, 1, -1])
    assert mean_relative_error(run(problem), problem.expected()) <= 1e-5
    problem.topk_ids[:] = torch.tensor([0, 3, -1])
    assert not run(problem).any()


def test_no_tokens() -> None:
    problem = random_moe(1, 40, 50, 2, 2, 32)
    none = {"x": problem.x[:0], "topk_weights": problem.topk_weights[:0]}
    assert run(problem, **none, topk_ids=problem.topk_ids[:0]).shape == (0, 40)


def test_the_compiler_sees_one_op() -> None:
    problem = random_moe(3, 40, 50, 3, 2, 32)
    compiled = torch.compile(lambda x: run(problem, x=x) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(problem.x), run(problem) * 2)


def test_the_result_is_contiguous_whatever_x_is() -> None:
    problem = random_moe(3, 40, 50, 3, 2, 32)
    transposed = problem.x.t().contiguous().t()
    torch.library.opcheck(torch.ops.nanoquant.moe_w4a16.default, op_arguments(problem, transposed))
    assert torch.equal(run(problem, x=transposed), run(problem))


@pytest.mark.parametrize("left", range(1, 6))
def test_weights_that_are_partly_on_the_meta_device_are_refused(left: int) -> None:
    problem = random_moe(3, 40, 50, 3, 2, 32)
    arguments = list(op_arguments(problem, problem.x))
    arguments[left] = cast(torch.Tensor, arguments[left]).to("meta")
    with pytest.raises(ValueError, match="x is on cpu, a tensor of the weight on meta"):
        torch.ops.nanoquant.moe_w4a16(*arguments)


def op_arguments(problem: MoeProblem, x: torch.Tensor) -> tuple[object, ...]:
    """What the op itself takes, without the weights' class."""
    w13, w2 = problem.stacked()
    return (
        x,
        w13.words,
        w13.scales,
        w2.words,
        w2.scales,
        problem.arrivals(),
        problem.topk_weights,
        problem.topk_ids,
        problem.expert_map,
        w2.in_features,
        problem.activation,
        w2.group_size,
        w2.group_offset,
    )


def test_an_expert_comes_back_as_it_was_put() -> None:
    problem = random_moe(1, 130, 150, 3, 1, 64, 32)
    for weights, stacked in zip((problem.w13, problem.w2), problem.stacked(), strict=True):
        for number, weight in enumerate(weights):
            found = to_quantized(stacked.expert(number))
            assert torch.equal(found.packed, weight.packed)
            assert torch.equal(found.scale, weight.scale)
            assert torch.equal(found.zero_point, weight.zero_point)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (random_weight(40, 64, 32), r"expert 1 is \[40, 64\] in groups of 32 with offset 0"),
        (random_weight(48, 64, 64), r"in groups of 64 with offset 0; this layer's are \[48, 64\]"),
        (random_weight(48, 64, 32, 5), "with offset 5"),
    ],
)
def test_an_expert_of_another_shape_is_refused(weight: Any, message: str) -> None:
    stacked = ExpertWeights.empty(2, 48, 64, 32, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        stacked.put(1, weight)


def test_tensors_that_do_not_fit_together_are_refused() -> None:
    good = ExpertWeights.empty(2, 48, 64, 32, 0, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"words is torch\.int32 \[2, 1, 1, 4, 128\]"):
        replace(good, words=good.words[..., :128])
    with pytest.raises(ValueError, match=r"scales is torch\.int64"):
        replace(good, scales=good.scales.long())
    with pytest.raises(ValueError, match="0 experts"):
        replace(good, words=good.words[:0], scales=good.scales[:0])


def test_the_op_names_what_does_not_fit() -> None:
    problem = random_moe(3, 40, 50, 2, 2, 32)
    w13, w2 = problem.stacked()
    ids = problem.topk_ids
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"activation": "tanh"}, "activation 'tanh'; known: silu, gelu, relu2_no_mul"),
        ({"activation": "silu"}, r"words is .* experts \[100, 40\]"),
        ({"topk_ids": ids[:2], "topk_weights": problem.topk_weights[:2]}, "3 tokens, .* has 2"),
        ({"topk_ids": ids.float()}, r"topk_ids is torch\.float32"),
        ({"topk_ids": ids[:, :1]}, r"must be \[M, top_k\]"),
        ({"expert_map": torch.zeros(2, dtype=torch.int64)}, r"expert_map is torch\.int64"),
        ({"w13": replace(w13, words=w13.words[:1], scales=w13.scales[:1])}, "w13 has 1 experts"),
    ]
    for changed, message in wrong:
        with pytest.raises(ValueError, match=message):
            run(problem, **changed)
    assert arrivals_needed(w2.out_features) == 3


@pytest.mark.parametrize("capability", [(8, 6), (9, 0)])
@pytest.mark.parametrize(
    ("experts", "top_k"), [(128, 1), (128, 2), (128, 6), (128, 22), (16, 8), (8, 2)]
)
def test_the_warm_up_meets_every_kernel(
    experts: int, top_k: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels differ in: one token or more, the length of the plan's list, the grouped settings.

    More than GROUPED_TOKENS come in parts, each of which chooses its own.
    """
    pytest.importorskip("triton")
    from vllm_nanoquant.kernels.moe_decode import decode_buckets
    from vllm_nanoquant.kernels.moe_grouped import grouped_buckets, grouped_settings
    from vllm_nanoquant.kernels.moe_plan import PAIR_SIZES

    device = torch.device("cpu")
    monkeypatch.setattr(settings, "gpu_of", lambda device: settings.Gpu(capability, 82))

    def kernel(tokens: int) -> tuple[Any, ...]:
        if tokens == 1:
            return ("one",)
        if tokens <= decode_limit(top_k):
            return ("few", next(size for size in PAIR_SIZES if size >= tokens * top_k))
        return ("many", grouped_settings(tokens, top_k, experts, device))

    warm = {kernel(n) for n in (*decode_buckets(top_k), *grouped_buckets(experts, top_k, device))}
    assert {kernel(tokens) for tokens in range(1, GROUPED_TOKENS + 1)} <= warm
