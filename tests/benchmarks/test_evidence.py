# SPDX-License-Identifier: Apache-2.0
"""The evidence harness: methods, scores and cases, against sums written out and other code."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model.geometry import MINIATURE
from tiny_model.model import TinyNemotronH

from benchmarks.evidence.cases import PARTS, Case, cases
from benchmarks.evidence.methods import gptq_on, needs_text, round_weight, to_e4m3
from benchmarks.evidence.model import Subject
from benchmarks.evidence.scoring import (
    TokenScores,
    Windows,
    bootstrap_error,
    by_position,
    figures,
)
from benchmarks.quality.metrics import Scores
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.algorithms import quantize
from vllm_nanoquant.quantize.minmax import quantize_minmax
from vllm_nanoquant.recipe import Recipe
from vllm_nanoquant.roles import layer_kinds

SHIPPED = Path(__file__).resolve().parents[2] / "models" / "tiny-nemotron-h"


@pytest.fixture
def weight() -> torch.Tensor:
    """W [6, 80] of bf16 values: 80 columns are two groups of 32 and a ragged one."""
    torch.manual_seed(0)
    return torch.randn(6, 80).to(torch.bfloat16).float()


@pytest.fixture
def hessian() -> torch.Tensor:
    torch.manual_seed(1)
    x = torch.randn(400, 80) @ torch.randn(80, 80)
    return x.t() @ x


@pytest.mark.parametrize("method", ["minmax", "mse", "gptq"])
def test_our_methods_are_the_package_s(weight, hessian, method):
    expected = quantize(weight.to(torch.bfloat16), 32, method, hessian=hessian)
    found = round_weight(weight, method, 32, hessian)
    assert torch.equal(found.weight, dequantize(expected))
    assert found.bits == 4 + 32 * 3 / 80
    assert needs_text(method) == (method == "gptq")


def grid_errors(weight: torch.Tensor, low: float, high: float, scales, zeros) -> torch.Tensor:
    """W rounded with one scale and zero for each group of 32, number by number."""
    result = torch.empty_like(weight)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            scale, zero = scales[row][column // 32], zeros[row][column // 32]
            q = min(max(round(float(weight[row, column]) / scale) + zero, low), high)
            result[row, column] = (q - zero) * scale
    return result


def bf16(value: float) -> float:
    return float(torch.tensor(value).to(torch.bfloat16))


def test_symmetric_round_to_nearest_by_definition(weight):
    groups = [weight[:, start : start + 32] for start in (0, 32, 64)]
    scales = [[bf16(float(g[row].abs().max()) / 7.5) for g in groups] for row in range(6)]
    expected = grid_errors(weight, -8, 7, scales, [[0] * 3] * 6)
    found = round_weight(weight, "rtn-sym", 32, None)
    torch.testing.assert_close(found.weight, expected)
    assert found.bits == 4 + 16 * 3 / 80


def test_asymmetric_round_to_nearest_has_whole_zero_points(weight):
    groups = [weight[:, start : start + 32] for start in (0, 32, 64)]
    scales = [[bf16(float(g[r].max() - g[r].min()) / 15) for g in groups] for r in range(6)]
    zeros = [
        [-round(float(g[r].min()) / s) for g, s in zip(groups, scales[r], strict=True)]
        for r in range(6)
    ]
    found = round_weight(weight, "rtn-asym", 32, None)
    torch.testing.assert_close(found.weight, grid_errors(weight, 0, 15, scales, zeros))
    assert found.bits == 4 + 20 * 3 / 80


def test_shrunk_symmetric_ranges_are_never_worse_in_their_own_measure(weight):
    def error(method: str) -> torch.Tensor:
        lost = (round_weight(weight, method, 32, None).weight - weight).abs() ** 2.4
        return torch.stack([lost[:, start : start + 32].sum(1) for start in (0, 32, 64)])

    assert bool((error("mse-sym") <= error("rtn-sym") + 1e-6).all())
    assert bool((error("mse-sym") < error("rtn-sym")).any())


@pytest.mark.parametrize(
    ("method", "plain"), [("gptq-sym", "rtn-sym"), ("gptq-asym", "rtn-asym"), ("gptq-int", None)]
)
def test_gptq_on_other_grids_lowers_the_weighted_error(weight, hessian, method, plain):
    def error(name: str) -> float:
        lost = round_weight(weight, name, 32, hessian).weight - weight
        return float((lost @ hessian * lost).sum())

    assert error(method) < 0.8 * error(plain or "minmax-int")


def test_gptq_with_a_diagonal_hessian_rounds_to_nearest(weight):
    grid = quantize_minmax(weight.to(torch.bfloat16), 32)
    found = gptq_on(weight, torch.eye(80), grid, 0.01)
    assert torch.equal(found.packed, grid.packed)


def test_e4m3_keeps_three_bits_of_mantissa_and_the_largest_of_a_row():
    values = torch.tensor([[448.0, 17.0, 1.06, 0.0], [0.0, 0.0, 0.0, 0.0], [-3.5, 1.0, 0.5, 7.0]])
    expected = [[448.0, 16.0, 1.0, 0.0], [0.0] * 4, [-3.5, 1.0, 0.5, 7.0]]
    assert to_e4m3(values).tolist() == expected


def test_unknown_methods_and_missing_text_are_named(weight):
    for method in ("nonsense", "gptq-sym", "gptq-int"):
        with pytest.raises(ValueError, match=r"method|calibration"):
            round_weight(weight, method, 32, None)


@pytest.fixture
def model() -> TinyNemotronH:
    torch.manual_seed(0)
    made = TinyNemotronH(MINIATURE).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.copy_(parameter.to(torch.bfloat16))
        if parameter.dim() == 2:  # so that predictions depend on the layers
            parameter.mul_(4)
    return made


KINDS = layer_kinds(type("Config", (), {"hybrid_override_pattern": MINIATURE.pattern}))


def subject(model: TinyNemotronH) -> Subject:
    torch.manual_seed(2)
    return Subject(model, KINDS, torch.randint(512, (6, 64)))


def changed(model: TinyNemotronH, stock: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rows of each linear that differ from the stock model's."""
    now = model.state_dict()
    rows = {name: (now[name] != stock[name]).any(1).nonzero()[:, 0] for name in stock}
    return {name: found for name, found in rows.items() if len(found)}


def linears(model: TinyNemotronH) -> dict[str, torch.Tensor]:
    return {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if name.endswith(("proj.weight", "lm_head.weight"))
    }


def test_a_case_changes_what_it_names_and_puts_it_back(model):
    stock = linears(model)
    one = subject(model)
    full = Recipe.parse({"preset": "full"})
    cfg = MINIATURE
    state = cfg.n_groups * cfg.ssm_state_size
    edges = np.cumsum([0, cfg.mamba_inner, cfg.mamba_inner, state, state, cfg.mamba_num_heads])
    for part, (first, stop) in zip(PARTS, pairwise(edges), strict=True):
        case = Case("kinds", part, full, "minmax", only="*.in_proj", part=part)
        with one.quantized(case, 2) as found:
            rows = changed(model, stock)
            assert set(rows) == {name for name in stock if "in_proj" in name}
            for changed_rows in rows.values():
                assert changed_rows.tolist() == list(range(first, stop))
            assert found["weights"] == 3 * (stop - first) * cfg.hidden_size
        assert not changed(model, stock)
    assert stop == stock["backbone.layers.0.mixer.in_proj.weight"].shape[0]
    with one.quantized(Case("presets", "all", full, "mse"), 2) as found:
        assert set(changed(model, stock)) == set(stock)
        assert found["modules"] == len(stock)
        assert 0 < found["relative_error"] < 0.2
    with (
        pytest.raises(ValueError, match="quantizes nothing"),
        one.quantized(Case("kinds", "none", full, "mse", only="*.router"), 2),
    ):
        pass


def test_calibration_sees_the_inputs_that_quantized_layers_give(model):
    stock = linears(model)
    one = subject(model)
    case = Case("presets", "all", Recipe.parse({"preset": "full"}), "gptq", seed=3)
    ids = one._calibration[torch.randperm(6, generator=torch.Generator().manual_seed(3))[:4]]
    hidden = {}
    with one.quantized(case, 4):
        quantized = {name: tensor.clone() for name, tensor in linears(model).items()}
        last = model.backbone.layers[-1].mixer.up_proj
        hook = last.register_forward_pre_hook(lambda _, x: hidden.update(x=x[0]))
        model.backbone(ids)
        hook.remove()
    x = hidden["x"].reshape(-1, MINIATURE.hidden_size)
    name = "backbone.layers.6.mixer.up_proj.weight"
    expected = quantize(stock[name].to(torch.bfloat16), 128, "gptq", hessian=x.t() @ x)
    torch.testing.assert_close(quantized[name], dequantize(expected), atol=1e-5, rtol=1e-3)


def test_scores_agree_with_those_of_the_quality_benchmark(model):
    torch.manual_seed(5)
    ids = torch.randint(512, (5, 40))
    windows = Windows(model, ids)
    assert windows.stock.divergence.max() == 0
    assert windows.stock.agreed.min() == 1
    reference = [model(row[None])[0] for row in ids]
    with subject(model).quantized(
        Case("presets", "all", Recipe.parse({"preset": "full"}), "minmax"), 2
    ):
        found = windows.score(model)
        expected = Scores()
        for row, logits in zip(ids, reference, strict=True):
            expected.add(model(row[None])[0], logits, row)
    np.testing.assert_allclose(found.loss.mean(1), expected.loss_by_window, rtol=1e-5)
    np.testing.assert_allclose(found.divergence.mean(1), expected.divergence_by_window, rtol=1e-3)
    assert found.agreed.sum() == sum(expected.agreed)
    assert figures(found, windows.stock)["perplexity"] == pytest.approx(expected.perplexity)


def test_errors_are_those_of_a_mean_and_positions_add_up():
    random = np.random.default_rng(0)
    values = random.normal(size=400)
    assert bootstrap_error(values) == pytest.approx(values.std() / 20, rel=0.1)
    loss = random.random((30, 20))
    stock = TokenScores(loss, loss * 0, loss * 0 + 1)
    scores = TokenScores(loss + 0.01, loss, loss * 0)
    found = figures(scores, stock)
    assert found["perplexity_change"] == pytest.approx(math.expm1(0.01))
    assert found["perplexity_change_error"] == pytest.approx(0, abs=1e-12)
    parts = by_position(scores, stock, (0, 5, 16, 64))
    assert [(part["first"], part["stop"]) for part in parts] == [(0, 5), (5, 16), (16, 20)]
    total = sum((part["stop"] - part["first"]) * part["kl_divergence"] for part in parts)
    assert total / 20 == pytest.approx(found["kl_divergence"])


def test_cases_have_names_of_their_own_and_cover_the_issue():
    found = list(cases(KINDS))
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    for preset in ("ssm", "balanced", "quality", "full"):
        for method in ("minmax", "mse", "gptq"):
            assert f"{preset}-g128-{method}" in names
    for part in PARTS:
        assert f"only-in_proj-{part}-mse" in names
    assert sum(case.is_long for case in found) > 10
