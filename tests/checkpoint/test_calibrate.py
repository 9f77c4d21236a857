# SPDX-License-Identifier: Apache-2.0
"""GPTQ's way to the disk; GPTQ itself is tested where it lives."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.small import content, weights, write_stock
from vllm_nanoquant.calibration import stream, text
from vllm_nanoquant.checkpoint.calibrate import Calibration
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
from vllm_nanoquant.checkpoint.quantize import Request, prepare
from vllm_nanoquant.checkpoint.verify import verify
from vllm_nanoquant.quantize.minmax import quantize_minmax
from vllm_nanoquant.recipe import Recipe

REACHED = ["1.mixer.up_proj", "0.mixer.in_proj", "1.mixer.down_proj"]


@pytest.fixture
def calibrated(monkeypatch):
    """Stands in for calibration, in another order than the files'; notes what was asked for."""
    calls = []

    def quantize_with_text(folder, source, sequences, recipe, settings, finished):
        for name in REACHED:
            module = f"backbone.layers.{name}"
            if finished(module) is None:
                calls.append(module)
                if len(calls) == 3 and calls[0] == "stop":
                    raise KeyboardInterrupt
                weight = source(f"{module}.weight")
                yield module, quantize_minmax(weight, recipe.scheme(module, None).group_size)

    monkeypatch.setattr(stream, "quantize_with_text", quantize_with_text)
    monkeypatch.setattr(text, "load_tokenizer", lambda folder: None)
    monkeypatch.setattr(text, "load_sequences", lambda *_: [torch.zeros(200, dtype=torch.int64)])
    return calls


def job_of(tmp_path, target):
    source = tmp_path / "source"
    if not source.exists():
        write_stock(source, weights(wide=32))
        (tmp_path / "text.txt").write_text("It was a dark and stormy night.")
    calibration = Calibration(tmp_path / "text.txt", 4, 8)
    recipe = Recipe(algorithm="gptq", group_size=32)
    return prepare(Request("source", source, target, recipe, 6000, "cpu", calibration))


def test_what_calibration_made_is_what_is_written(tmp_path, calibrated):
    report = job_of(tmp_path, tmp_path / "target").run()
    assert len(calibrated) == 3
    found = {}
    for path in (tmp_path / "target").glob("*.safetensors"):
        found |= load_file(path)
    for name in REACHED:
        module = f"backbone.layers.{name}"
        expected = quantize_minmax(weights(wide=32)[f"{module}.weight"], 32)
        assert torch.equal(found[f"{module}.weight_packed"], expected.packed)
        assert torch.equal(found[f"{module}.weight_zero_point"], expected.zero_point)
        assert report["tensors"][f"{module}.weight"]["algorithm"] == "gptq"
    # Calibration did not reach this one.
    missed = report["tensors"]["backbone.layers.0.mixer.out_proj.weight"]
    assert missed["algorithm"] == "mse"
    assert verify(tmp_path / "target", tmp_path / "source").problems == []
    assert not [name for name in content(tmp_path / "target") if name.startswith(".")]


def test_calibration_is_taken_up_where_it_stopped(tmp_path, calibrated):
    job_of(tmp_path, tmp_path / "whole").run()
    calibrated[:] = ["stop"]
    job = job_of(tmp_path, tmp_path / "target")
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert not (tmp_path / "target/config.json").exists()
    calibrated[:] = []
    job.run()
    assert calibrated == [f"backbone.layers.{name}" for name in REACHED[1:]]
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def test_another_text_is_another_result(tmp_path, calibrated):
    calibrated[:] = ["stop"]
    with pytest.raises(KeyboardInterrupt):
        job_of(tmp_path, tmp_path / "target").run()
    (tmp_path / "text.txt").write_text("Call me Ishmael.")
    with pytest.raises(UsageError, match="begun with another calibration text;"):
        job_of(tmp_path, tmp_path / "target").run()


def test_the_text_is_judged_before_anything_is_written(tmp_path, monkeypatch):
    def refuse(folder):
        raise text.CalibrationError("there is no tokenizer")

    monkeypatch.setattr(text, "load_tokenizer", refuse)
    with pytest.raises(UsageError, match="calibration: there is no tokenizer"):
        job_of(tmp_path, tmp_path / "target")
    monkeypatch.setattr(text, "load_tokenizer", lambda folder: None)
    few = [torch.zeros(64, dtype=torch.int64)] * 2
    monkeypatch.setattr(text, "load_sequences", lambda *_: few)
    with pytest.raises(UsageError, match=r"128 tokens in 2 .*out_proj.weight has 130 inputs"):
        job_of(tmp_path, tmp_path / "target")
    monkeypatch.undo()
    (tmp_path / "text.txt").unlink()
    with pytest.raises(UsageError, match="calibration"):
        job_of(tmp_path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_calibration_that_fails_late_can_be_taken_up(tmp_path, calibrated, monkeypatch):
    job_of(tmp_path, tmp_path / "whole").run()
    whole = stream.quantize_with_text

    def fails(*arguments):
        yield next(whole(*arguments))
        raise text.CalibrationError("layer 1: the Hessian is not finite")

    monkeypatch.setattr(stream, "quantize_with_text", fails)
    with pytest.raises(UsageError, match=r"not finite\. What is finished stays in the target"):
        job_of(tmp_path, tmp_path / "target").run()
    assert not (tmp_path / "target/config.json").exists()
    monkeypatch.setattr(stream, "quantize_with_text", whole)
    calibrated[:] = []
    job_of(tmp_path, tmp_path / "target").run()
    assert len(calibrated) == 2
    assert content(tmp_path / "target") == content(tmp_path / "whole")


def test_a_weight_that_is_not_finite_is_found_before_calibration(tmp_path, calibrated):
    tensors = weights(wide=32)
    name = "backbone.layers.1.mixer.down_proj.weight"
    tensors[name][3, 4] = float("inf")
    write_stock(tmp_path / "source", tensors)
    (tmp_path / "text.txt").write_text("It was a dark and stormy night.")
    with pytest.raises(CheckpointError, match=f"{name}: 1 weights are not finite"):
        job_of(tmp_path, tmp_path / "target").run()
    assert calibrated == []


def test_a_source_that_changes_during_calibration_is_noticed(tmp_path, calibrated):
    calibrated[:] = ["stop"]
    with pytest.raises(KeyboardInterrupt):
        job_of(tmp_path, tmp_path / "target").run()
    # Not the file that writing begins with, which is looked at for that.
    path = sorted((tmp_path / "source").glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the source has changed"):
        job_of(tmp_path, tmp_path / "target").run()


def test_a_calibrated_weight_that_is_damaged_is_named(tmp_path, calibrated):
    calibrated[:] = ["stop"]
    with pytest.raises(KeyboardInterrupt):
        job_of(tmp_path, tmp_path / "target").run()
    for path in (tmp_path / "target/.nanoquant_calibrated").iterdir():
        path.write_bytes(b"1234")
    with pytest.raises(CheckpointError, match="a calibrated weight is damaged"):
        job_of(tmp_path, tmp_path / "target").run()


def test_the_memory_of_calibration(tmp_path, calibrated):
    job = job_of(tmp_path, tmp_path / "target")
    stock = {name: tensor.shape for name, tensor in weights(wide=32).items()}
    # 200 tokens; config.json does not say how wide a hidden state is: the widest input, then.
    outside = sum(2 * s.numel() for n, s in stock.items() if "layers" not in n)
    assert job.calibration_bytes == {
        "hidden states": 2 * 200 * 130,
        "outside of the layers": outside,
        "largest layer": sum(2 * s.numel() for n, s in stock.items() if "layers.0." in n),
        "Hessians": 4 * (32**2 + 130**2),
        "quantizing": 12 * 130**2 + 20 * 32 * 130,
    }
    assert job.peak_bytes >= sum(job.calibration_bytes.values())


def test_the_report_of_a_calibrated_checkpoint_names_the_text(tmp_path, calibrated):
    job_of(tmp_path, tmp_path / "target").run()
    report = json.loads((tmp_path / "target/nanoquant_report.json").read_text())
    assert report["begun_with"]["calibration text"].endswith(" 4 8")


def test_experts_need_no_hessians(tmp_path, calibrated):
    before = job_of(tmp_path, tmp_path / "target")
    experts = {
        f"backbone.layers.1.mixer.experts.{expert}.{leaf}_proj.weight": torch.randn(
            shape
        ).bfloat16()
        for expert in range(3)
        for leaf, shape in (("up", (700, 32)), ("down", (32, 700)))
    }
    write_stock(tmp_path / "moe" / "source", weights(wide=32) | experts)
    (tmp_path / "moe" / "text.txt").write_text("It was a dark and stormy night.")
    job = job_of(tmp_path / "moe", tmp_path / "target")
    for part in ("Hessians", "quantizing"):
        assert job.calibration_bytes[part] == before.calibration_bytes[part]
    report = job.run()
    for name in experts:
        assert report["tensors"][name]["algorithm"] == "mse"
