# SPDX-License-Identifier: Apache-2.0
"""Loaded BF16 models that become int4 in place, by real vLLM."""

import pytest
import torch

from tests.dequantized import write_dequantized

from .patched_engines import (
    mean_relative_error,
    patched_job,
    run_patched,
    same_until_a_tie,
)

pytestmark = pytest.mark.slow

FULL = ["llm", {"preset": "full"}]
EXTENSION = "vllm_nanoquant.serving.patch.PatchWorker"


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("patch")
    by_steps = [["model", {"preset": "ssm"}], ["worker", {"preset": "balanced"}], FULL, FULL]
    wrong = [{"preset": "fast"}, {"ignore": ["*.inproj"]}, {"algorithm": "gptq"}]
    rounded = write_dequantized(tiny_model, folder / "rounded")
    exact = write_dequantized(tiny_model, folder / "exact", torch.float32)
    jobs = [
        patched_job(
            "patched",
            tiny_model,
            by_steps,
            refused=[["llm", options] for options in wrong],
            digests=True,
        ),
        patched_job("loaded", tiny_model, options={"preset": "full"}, digests=True),
        patched_job("dequantized", rounded),
        patched_job("dequantized exactly", exact, engine={"dtype": "float32"}),
        patched_job(
            "compiled",
            tiny_model,
            [FULL],
            refused=[["model", {}]],
            digests=True,
            engine={"enforce_eager": False},
        ),
    ]
    reports = run_patched(jobs, folder / "in_process")
    process = patched_job(
        "worker process",
        tiny_model,
        [FULL, FULL],
        engine={"worker_extension_cls": EXTENSION, "dtype": "float32"},
    )
    environment = {"NANOQUANT_TEST_MULTIPROCESS": "1"}
    return reports | run_patched([process], folder / "worker_process", environment)


@pytest.mark.parametrize("name", ["patched", "compiled"])
def test_the_bytes_are_those_of_quantizing_while_loading(reports, name):
    assert reports[name]["digests"] == reports["loaded"]["digests"]
    assert len(reports[name]["digests"][0]) > 40


@pytest.mark.parametrize("name", ["patched", "compiled"])
def test_the_tokens_are_those_of_an_engine_that_loaded_int4(reports, name):
    assert reports[name]["tokens"] == reports["loaded"]["tokens"]
    assert reports[name]["tokens"] != reports[name]["before"]


def test_the_logits_are_those_of_an_engine_that_loaded_int4(reports):
    assert reports["patched"]["logits"].equal(reports["loaded"]["logits"])


@pytest.mark.parametrize("name", ["patched", "compiled"])
def test_the_logits_are_those_of_a_bf16_model_with_the_dequantized_weights(reports, name):
    found, expected = reports[name], reports["dequantized"]
    compared = 0
    for prompt, tokens in enumerate(expected["tokens"]):
        logits = expected["logits"][prompt]
        same = same_until_a_tie(found["tokens"][prompt], tokens, logits)
        error = mean_relative_error(found["logits"][prompt, :same], logits[:same])
        assert error < 1e-2
        compared += same
    assert compared >= 60


def test_in_float32_the_tokens_are_those_of_a_model_with_the_dequantized_weights(reports):
    found, expected = reports["worker process"], reports["dequantized exactly"]
    assert found["tokens"] == expected["tokens"]
    assert found["tokens"] != found["before"]
    assert mean_relative_error(found["logits"], expected["logits"]) < 1e-5


def test_each_patch_says_what_it_replaced_and_only_what_was_left(reports):
    ssm, balanced, full, again = reports["patched"]["patches"]
    assert ssm["replaced"] == {"mamba": 6}
    assert balanced["replaced"] == {"mlp": 6}
    assert full["replaced"] == {"attention": 2, "lm_head": 1}
    assert full["left"] == dict.fromkeys(ssm["modules"] + balanced["modules"], "int4 already")
    assert again["modules"] == [] and again["bytes_freed"] == 0
    assert len(again["left"]) == 15
    assert not any(report["compiled_again"] for report in reports["patched"]["patches"])


def test_the_memory_is_reported(reports):
    (report,) = reports["compiled"]["patches"]
    # 3.47 million weights in BF16: 2 bytes each; in int4 a little more than half of one.
    assert report["bytes_before"] == pytest.approx(6.94e6, rel=0.01)
    assert report["bytes_after"] < 0.4 * report["bytes_before"]
    assert report["bytes_freed"] == report["bytes_before"] - report["bytes_after"]
    assert report["text"].startswith("15 modules became int4 (")
    assert "6.94 MB to 2.48 MB, 4.47 MB freed on 1 rank(s)" in report["text"]


def test_a_compiled_model_is_compiled_again(reports):
    (report,) = reports["compiled"]["patches"]
    assert report["compiled_again"]


def test_a_worker_process_is_patched_by_name(reports):
    first, second = reports["worker process"]["patches"]
    assert len(first["modules"]) == 15 and first["ranks"] == 1
    assert second["modules"] == []


def test_what_cannot_be_patched_is_refused(reports):
    preset, pattern, algorithm = reports["patched"]["refused"]
    assert "preset = 'fast': Input should be 'ssm', 'balanced', 'quality' or 'full'" in preset
    assert "'*.inproj' in quantization_config matches no module" in pattern
    assert "model.layers.0.mixer.in_proj" in pattern
    assert "'gptq' needs calibration text and cannot quantize a loaded model" in algorithm
    (compiled,) = reports["compiled"]["refused"]
    assert "this model is compiled" in compiled and "enforce_eager=True" in compiled


@pytest.mark.parametrize("name", ["patched", "compiled", "worker process"])
def test_an_engine_with_running_requests_is_refused(reports, name):
    assert "requests are running" in reports[name]["while running"]
