# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from tests.calibration.models import LLAMA, MOE, TINY, random_model, sequences, tiny_source
from vllm_nanoquant.calibration import stream
from vllm_nanoquant.calibration.skeleton import Skeleton, lift_step_limits
from vllm_nanoquant.calibration.stream import CalibrationSettings, quantize_with_text
from vllm_nanoquant.calibration.text import CalibrationError
from vllm_nanoquant.kernels.reference import dequantize
from vllm_nanoquant.quantize.gptq import hessian_errors, quantize_gptq
from vllm_nanoquant.quantize.groups import QuantizedWeight
from vllm_nanoquant.quantize.minmax import quantize_minmax
from vllm_nanoquant.quantize.mse import quantize_mse
from vllm_nanoquant.recipe import Recipe
from vllm_nanoquant.roles import layer_index

FULL = Recipe(preset="full", group_size=32)
# One more token than the widest linear of the shipped model has inputs, in two lengths.
TEXT = [*sequences(2, 300, 1801), *sequences(1, 73, 1801)]


class Recorder:
    """Stands in for quantize_gptq: keeps the Hessian and quantizes with min-max."""

    def __init__(self) -> None:
        self.hessians: list[torch.Tensor] = []

    def __call__(self, weight, hessian, group_size, **_):  # type: ignore[no-untyped-def]
        self.hessians.append(hessian)
        return quantize_minmax(weight, group_size)


def hessians_of_a_whole_model(
    folder: Path, tensors: dict[str, torch.Tensor] | None, names: list[str], group_size: int
) -> list[torch.Tensor]:
    """X^T X of each named linear in turn, layer by layer, by running all of a loaded model.

    What is before the linear's layer is quantized with min-max; the layer itself is not.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if tensors is None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(tensors, strict=False)
    lift_step_limits(model)
    model.eval()
    modules = {name: model.get_submodule(name.replace("backbone.", "model.")) for name in names}
    found: dict[str, torch.Tensor] = {}
    for layer in dict.fromkeys(layer_index(name) for name in names):
        mine = [name for name in names if layer_index(name) == layer]
        for name in mine:
            found[name] = torch.zeros(modules[name].in_features, modules[name].in_features).double()

        def add(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            found[name] += x.t() @ x

        hooks = [
            modules[name].register_forward_pre_hook(lambda _, x, name=name: add(name, x))
            for name in mine
        ]
        with torch.no_grad():
            for ids in TEXT if tensors is None else sequences(3, 64, 50):
                model(ids[None])
        for hook in hooks:
            hook.remove()
        for name in mine:
            weight = modules[name].weight
            weight.data.copy_(dequantize(quantize_minmax(weight.data, group_size)))
    return [found[name] for name in names]


def assert_hessians_agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        # Sums in fp32 against fp64; batches of another size round activations to bf16 otherwise.
        assert torch.linalg.norm(one.double() - other) < 5e-3 * torch.linalg.norm(other)


@pytest.mark.slow
def test_hessians_of_the_shipped_model(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    monkeypatch.setattr(stream, "quantize_gptq", recorder)
    names = [name for name, _ in quantize_with_text(TINY, tiny_source(), TEXT, FULL)]
    expected = hessians_of_a_whole_model(TINY, None, names, 32)
    assert_hessians_agree(recorder.hessians, expected)
    assert len(names) == len(set(names)) == 17
    layers = [int(name.split(".")[2]) for name in names if name != "lm_head"]
    assert layers == sorted(layers) and names[-1] == "lm_head"


@torch.no_grad()
def test_steps_of_a_mixer_may_be_as_small_as_in_vllm() -> None:
    """The scan of a Mamba-2 mixer by its definition, with steps that transformers would raise."""
    mixer = first_mixer()
    mixer.dt_bias.data.fill_(-12.0)  # steps of about 6e-6; time_step_min is 1e-3
    x = torch.randn(1, 24, mixer.in_proj.in_features)
    scans: list[tuple[torch.Tensor, torch.Tensor]] = []
    mixer.norm.register_forward_hook(lambda _, inputs, __: scans.append(inputs))
    mixer(x)
    (scanned, _gate), *_ = scans
    # With steps of nearly nothing the state stays empty, and what is left is D times the input.
    heads = scanned.view(1, 24, mixer.num_heads, mixer.head_dim)
    _, convolved, _ = mixer.in_proj(x).split(
        [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], dim=-1
    )
    convolved = torch.nn.functional.silu(mixer.conv1d(convolved.mT)[..., :24].mT)
    through = convolved[..., : mixer.intermediate_size].view_as(heads) * mixer.D[:, None]
    assert torch.linalg.norm(heads - through) < 2e-3 * torch.linalg.norm(through)


def first_mixer() -> torch.nn.Module:
    skeleton = Skeleton(TINY, tiny_source(), torch.device("cpu"), torch.float32)
    layer = skeleton.layers[0]
    skeleton.load(layer)
    return layer.mixer


def test_rotary_embeddings_and_a_tied_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_model(tmp_path, LLAMA)
    recorder = Recorder()
    monkeypatch.setattr(stream, "quantize_gptq", recorder)
    text = sequences(3, 64, 50)
    names = [n for n, _ in quantize_with_text(tmp_path, tensors.__getitem__, text, FULL)]
    assert len(names) == 14 and "lm_head" not in names
    assert_hessians_agree(
        recorder.hessians, hessians_of_a_whole_model(tmp_path, tensors, names, 32)
    )


def test_results_are_gptqs_and_better_than_mse(monkeypatch: pytest.MonkeyPatch) -> None:
    source, hessians = tiny_source(), []

    def keep(weight, hessian, group_size, **rest):  # type: ignore[no-untyped-def]
        hessians.append(hessian.clone())
        return quantize_gptq(weight, hessian, group_size, **rest)

    monkeypatch.setattr(stream, "quantize_gptq", keep)
    recipe = Recipe(preset="ssm", group_size=128, ignore=("*.layers.2.*",))
    results = dict(quantize_with_text(TINY, source, TEXT, recipe))
    assert list(results) == [
        f"backbone.layers.{i}.mixer.{leaf}" for i in (0, 5) for leaf in ("in_proj", "out_proj")
    ]
    for (name, found), hessian in zip(results.items(), hessians, strict=True):
        weight = source(f"{name}.weight").float()
        errors = [
            float(hessian_errors(weight, hessian, result).sum())
            for result in (found, quantize_mse(weight, 128))
        ]
        assert found.shape == weight.shape and errors[0] < 0.9 * errors[1]


def test_resuming_gives_the_same_bytes() -> None:
    recipe = Recipe(preset="ssm", group_size=64)
    first = dict(quantize_with_text(TINY, tiny_source(), TEXT, recipe))
    names = list(first)
    for done in (2, 3):  # a whole layer, and one with half of its linears
        kept = {name: first[name] for name in names[:done]}
        rest = dict(quantize_with_text(TINY, tiny_source(), TEXT, recipe, finished=kept.get))
        assert list(rest) == names[done:]
        for name, result in rest.items():
            assert torch.equal(result.packed, first[name].packed)
            assert torch.equal(result.scale, first[name].scale)


def test_one_layer_is_in_memory_at_a_time() -> None:
    asked: list[str] = []
    source = tiny_source()

    def watched(name: str) -> torch.Tensor:
        asked.append(name)
        return source(name)

    recipe = Recipe(preset="ssm", group_size=64)
    for name, _ in quantize_with_text(TINY, watched, TEXT, recipe):
        layer = name.split(".")[2]
        assert not any(f".layers.{i}." in n for n in asked for i in range(int(layer) + 1, 7))


def test_experts_are_not_calibrated_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = random_model(tmp_path, MOE)
    text = sequences(3, 64, 50)
    with caplog.at_level(logging.WARNING):
        names = [n for n, _ in quantize_with_text(tmp_path, tensors.__getitem__, text, FULL)]
    assert "the routed experts of 1 layers are not calibrated" in caplog.text
    assert any("shared_experts" in name for name in names)
    assert not any(".experts." in name for name in names)


def test_a_linear_that_is_never_called_gets_mse(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stream, "_hessians", lambda targets, run: {t.name: None for t in targets})
    recipe = Recipe(preset="ssm", group_size=32)
    results: dict[str, QuantizedWeight] = dict(
        quantize_with_text(TINY, tiny_source(), TEXT, recipe)
    )
    name = next(iter(results))
    assert f"{name} was never called" in caplog.text
    expected = quantize_mse(tiny_source()(f"{name}.weight"), 32)
    assert torch.equal(results[name].packed, expected.packed)


def run(source=None, text=TEXT, folder=TINY, recipe=FULL):  # type: ignore[no-untyped-def]
    list(quantize_with_text(folder, source or tiny_source(), text, recipe))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"600 tokens in 2 .* has 672 inputs.*more text"):
        run(text=TEXT[:2])


def test_tokens_of_another_tokenizer_are_refused() -> None:
    with pytest.raises(CalibrationError, match="token 1801, and the model knows 1801"):
        run(text=[*TEXT, torch.tensor([5, 1801])])


def test_a_missing_tensor_is_named() -> None:
    source = tiny_source()

    def lacking(name: str) -> torch.Tensor:
        if name == "backbone.layers.1.norm.weight":
            raise KeyError(name)
        return source(name)

    with pytest.raises(CalibrationError, match=r"no tensor backbone.layers.1.norm.weight"):
        run(lacking)
    with pytest.raises(CalibrationError, match=r"has no embedding: none of model.embeddings.w"):
        run({}.__getitem__)


def test_a_tensor_of_another_shape_is_named() -> None:
    source = tiny_source()

    def wrong(name: str) -> torch.Tensor:
        tensor = source(name)
        return tensor[:1] if name.endswith("layers.1.norm.weight") else tensor

    with pytest.raises(CalibrationError, match=r"layers.1.norm.weight has shape \[1\].*\[288\]"):
        run(wrong)


def test_inputs_that_are_not_finite_name_the_module() -> None:
    source = tiny_source()

    def broken(name: str) -> torch.Tensor:
        return source(name) * float("nan") if name.endswith("0.norm.weight") else source(name)

    with pytest.raises(CalibrationError, match=r"layers.0.mixer.in_proj: the Hessian is not fin"):
        run(broken)


@pytest.mark.parametrize(
    "config", [{"model_type": "unheard_of"}, {"auto_map": {"AutoConfig": "evil.Config"}}, {}]
)
def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, config: dict[str, object]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    with pytest.raises(CalibrationError, match=r"cannot build the model .* no code"):
        run(folder=tmp_path)


def test_settings_reach_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(weight, hessian, group_size, **rest):  # type: ignore[no-untyped-def]
        seen.append(rest)
        return quantize_minmax(weight, group_size)

    monkeypatch.setattr(stream, "quantize_gptq", keep)
    settings = CalibrationSettings(damping=0.5, block=3, batch_tokens=1)
    recipe = Recipe(preset="ssm")
    list(quantize_with_text(TINY, tiny_source(), TEXT, recipe, settings))
    assert seen == [{"damping": 0.5, "block": 3}] * 6
