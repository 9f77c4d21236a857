# SPDX-License-Identifier: Apache-2.0
"""benchmarks/quality: metrics against sums written out by hand, and the model that scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import save_file
from tiny_model.export import load_exported
from tiny_model.model import TinyConfig

from benchmarks.quality import run, table
from benchmarks.quality.evaluate import dense_model
from benchmarks.quality.metrics import Scores, difference, paired_difference
from benchmarks.quality.served import last_error
from benchmarks.quality.weights import read_weights
from tests.serving.engines import heldout_windows
from vllm_nanoquant.recipe import METHOD

NAME = "backbone.layers.0.mixer.out_proj"


def probabilities(rows):
    return [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in rows]


def test_scores_against_sums_written_out():
    generator = numpy.random.default_rng(0)
    windows = generator.integers(0, 5, (2, 4))
    model, reference = generator.normal(0, 2, (2, 2, 4, 5))
    scores = Scores()
    loss = kl = agreed = 0
    for ids, rows, others in zip(windows, model, reference, strict=True):
        scores.add(torch.tensor(rows).float(), torch.tensor(others).float(), torch.tensor(ids))
        q, p = probabilities(rows), probabilities(others)
        for place in range(3):  # the last row predicts what lies beyond the window
            loss -= math.log(q[place][ids[place + 1]])
            kl += sum(p[place][v] * math.log(p[place][v] / q[place][v]) for v in range(5))
            agreed += q[place].index(max(q[place])) == p[place].index(max(p[place]))
    assert scores.tokens == [3, 3]
    assert scores.perplexity == pytest.approx(math.exp(loss / 6), rel=1e-5)
    assert scores.mean_divergence == pytest.approx(kl / 6, rel=1e-5)
    assert scores.agreement == agreed / 6
    assert sum(scores.loss_by_window) == pytest.approx(loss / 3, rel=1e-5)
    assert sum(scores.divergence_by_window) == pytest.approx(kl / 3, rel=1e-5)


@pytest.mark.slow
def test_the_model_that_scores_is_the_one_that_was_trained(tiny_model):
    # transformers by itself raises small steps of Mamba layers: 1.4e-3 off.
    ids = torch.tensor(heldout_windows(tiny_model, 64, 2))
    with torch.inference_mode():
        expected = load_exported(tiny_model, TinyConfig())(ids)
        logits = dense_model(tiny_model, read_weights(tiny_model))(ids).logits
    assert (logits - expected).norm() < 1e-5 * expected.norm()


def test_a_model_agrees_with_itself():
    rows = torch.randn(6, 11)
    scores = Scores()
    scores.add(rows, rows, torch.arange(6))
    assert scores.mean_divergence == 0
    assert scores.agreement == 1


def test_paired_difference_is_that_of_a_t_test():
    # Differences 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7.
    mean, error = paired_difference([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert (mean, error) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    with pytest.raises(ValueError, match="1 windows"):
        paired_difference([1.0], [1.0])


def test_difference_of_served_log_probabilities():
    a = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.375, 0.5]]).log()
    b = torch.tensor([[0.25, 0.5, 0.25], [0.125, 0.375, 0.5]]).log()
    found = difference(a, b)
    two = math.log(2)
    assert found["rms"] == pytest.approx(math.sqrt(2 * two**2 / 6))
    assert found["greatest"] == pytest.approx(two)
    assert found["p999"] == pytest.approx(two)
    assert found["kl_divergence"] == pytest.approx((0.5 * two - 0.25 * two) / 2)
    assert found["agreement"] == 0.5


def test_the_error_that_ended_an_engine_is_found():
    log = "INFO ok\n  ValueError: first\nValueError: N = 1288\n\n[rank0] goodbye\n"
    assert last_error(log) == "ValueError: N = 1288"
    assert last_error("killed\n") == "killed"
    assert last_error("") == "no output"


def write(stock, target, tensors, options):
    """The stock folder with other tensors, and a quantization_config."""
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((stock / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": options}))
    return target


@pytest.fixture
def small(tmp_path):
    """A stock folder with one weight [8, 64], and its tensors."""
    tensors = {
        f"{NAME}.weight": torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "backbone.layers.0.norm.weight": torch.ones(64, dtype=torch.bfloat16),
    }
    folder = tmp_path / "stock"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tensors


def test_a_stock_checkpoint_is_read_as_it_is(small):
    folder, tensors = small
    weights = read_weights(folder)
    assert weights.quantized == () and weights.bits_per_weight is None
    assert weights.relative_error(weights) is None
    assert weights.bytes_all == 2 * (8 * 64 + 64)
    for name, tensor in tensors.items():
        assert torch.equal(weights.tensors[name], tensor.float())


def test_our_checkpoint_is_read_by_the_formula_of_the_format(small, tmp_path):
    folder, tensors = small
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (32, 8), generator=generator, dtype=torch.uint8)
    scale = torch.rand(2, 8, generator=generator).bfloat16()
    zero = torch.randint(-15, 1, (2, 8), generator=generator).bfloat16()
    stored = {
        "backbone.layers.0.norm.weight": tensors["backbone.layers.0.norm.weight"],
        f"{NAME}.weight_packed": packed,
        f"{NAME}.weight_scale": scale,
        f"{NAME}.weight_zero_point": zero,
    }
    options = {"quant_method": METHOD, "format_version": 1, "preset": "full", "group_size": 32}
    target = write(folder, tmp_path / "ours", stored, options)
    expected = torch.zeros(8, 64, dtype=torch.float64)
    for k in range(64):
        q = packed[k // 2] // 16 if k % 2 else packed[k // 2] % 16
        expected[:, k] = (q.double() + zero[k // 32].double()) * scale[k // 32].double()
    weights = read_weights(target)
    assert weights.quantized == (NAME,)
    torch.testing.assert_close(weights.tensors[f"{NAME}.weight"].double(), expected)
    assert weights.bits_per_weight == 4 + 2 * 16 / 32
    wanted = tensors[f"{NAME}.weight"].double()
    error = float((expected - wanted).norm() / wanted.norm())
    assert weights.relative_error(read_weights(folder)) == pytest.approx(error, rel=1e-5)


def test_a_checkpoint_of_llm_compressor_is_read_by_its_formula(small, tmp_path):
    folder, tensors = small
    q = torch.randint(0, 16, (8, 64), generator=torch.Generator().manual_seed(1))
    scale = torch.rand(8, 2, generator=torch.Generator().manual_seed(2)).bfloat16()
    shifts = 4 * torch.arange(8)
    words = (q.view(8, 8, 8) << shifts).sum(dim=-1)
    stored = {
        "backbone.layers.0.norm.weight": tensors["backbone.layers.0.norm.weight"],
        f"{NAME}.weight_packed": torch.where(words >= 1 << 31, words - (1 << 32), words).int(),
        f"{NAME}.weight_scale": scale,
        f"{NAME}.weight_shape": torch.tensor([8, 64]),
    }
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme | {"group_size": 32}}}
    options = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    target = write(folder, tmp_path / "theirs", stored, options | {"config_groups": groups})
    weights = read_weights(target)
    expected = (q - 8) * scale.double().repeat_interleave(32, dim=1)
    torch.testing.assert_close(weights.tensors[f"{NAME}.weight"].double(), expected)
    assert weights.bits_per_weight == pytest.approx(4 + 16 / 32 + 2 * 64 / (8 * 64))


def test_a_checkpoint_of_another_calibration_is_made_anew(tmp_path, monkeypatch):
    made = []

    def nanoquant(command):
        made.append(Path(command[2]))
        made[-1].mkdir()
        (made[-1] / "config.json").write_text("{}")
        return 0

    figures = SimpleNamespace(figures={}, scores=None)
    evaluator = SimpleNamespace(stock=figures, evaluate=lambda folder: figures)
    monkeypatch.setattr(run, "nanoquant", nanoquant)
    monkeypatch.setattr(run, "quick_model", lambda work: work / "model")
    monkeypatch.setattr(run, "Evaluator", lambda *_: evaluator)
    monkeypatch.setattr(run, "in_words", lambda *_: "")
    cases = [run.Case("full", 128, algorithm) for algorithm in ("mse", "gptq")]
    monkeypatch.setattr(run, "cases", lambda: iter(cases))
    text, output = tmp_path / "text", tmp_path / "found.json"
    text.write_text("one")

    def count(*more):
        """Checkpoints that a run makes."""
        before = len(made)
        options = ["--work", str(tmp_path / "work"), "--output", str(output)]
        options += ["--calibration-text", str(text), *more]
        monkeypatch.setattr("sys.argv", ["run.py", *options])
        run.main()
        assert list(json.loads(output.read_text())["results"])[1:] == [each.name for each in cases]
        return len(made) - before

    assert count() == 2
    assert count() == 0
    assert count("--samples", "4") == count("--length", "64") == 1
    text.write_text("two")
    assert count() == 1
    assert made[0].name == "full-g128-mse"


def test_the_tables_in_the_documentation_are_those_of_the_results():
    text = (Path(__file__).parents[2] / "docs" / "quality.md").read_text(encoding="utf-8")
    quality, served = (json.loads(path.read_text()) for path in (table.QUALITY, table.SERVED))
    for rows in (
        table.quality_rows(quality),
        table.comparison_rows(quality),
        table.served_rows(served),
    ):
        assert "\n".join(rows) in text
