# SPDX-License-Identifier: Apache-2.0
"""Whole models with routed experts, served by real vLLM on the CPU."""

import os
from pathlib import Path

import pytest
import torch

from tests.checkpoints import write_int4
from tests.moe_models import dequantized, write_nemotron_moe, write_qwen_moe
from vllm_nanoquant.calibration.skeleton import lift_step_limits

from .engines import PROMPTS, heldout_windows, job, run_engines

pytestmark = pytest.mark.slow

# Each rank has a core, and float32 keeps what two ranks add up from turning a token.
ENGINE = {"dtype": "float32", "worker_extension_cls": "tests.serving.experts_on_cpu.Extension"}
ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    )
}


def by_transformers(folder):
    """Another implementation of the model, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lift_step_limits(model)
    return model.eval()


def logprobs_by_transformers(folder, windows):
    """Of each token given those before it."""
    model = by_transformers(folder)
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window])
            scores = model(ids).logits[0, :-1].log_softmax(-1)
            yield scores.gather(1, ids[0, 1:, None])[:, 0]


def continuations_by_transformers(folder, count):
    from transformers import AutoTokenizer

    model = by_transformers(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=count, do_sample=False, use_cache=False)
        found.append(made[0, ids.shape[1] :].tolist())
    return found


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    nemotron = write_nemotron_moe(tiny_model, folder / "nemotron")
    qwen = write_qwen_moe(tiny_model, folder / "qwen")
    return {
        "nemotron": nemotron,
        "nemotron, stored": write_int4(nemotron, folder / "stored", preset="full"),
        "nemotron, dequantized": dequantized(nemotron, folder / "deq", preset="full"),
        "qwen": qwen,
        "qwen, dequantized": dequantized(qwen, folder / "qwen-deq", preset="balanced"),
    }


def serve(models, folder, jobs, ranks=1):
    engine = ENGINE | {"tensor_parallel_size": ranks}
    environment = ENVIRONMENT
    if ranks > 1:
        environment = environment | {
            "NANOQUANT_TEST_MULTIPROCESS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks]),
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
    jobs = [
        job(name, models[model], options, engine=engine | more.pop("engine", {}), **more)
        for name, (model, options, more) in jobs.items()
    ]
    reports = run_engines(jobs, folder, environment)
    for name, report in reports.items():
        assert "error" not in report, (name, report)
    return reports


def test_one_process(models, tiny_model, tmp_path):
    windows = heldout_windows(tiny_model, tokens=64, count=4)
    full = {"preset": "full"}
    reports = serve(
        models,
        tmp_path,
        {
            "nemotron": ("nemotron", full, {"windows": windows, "reload": True, "digests": True}),
            "stored": ("nemotron, stored", None, {"reload": True, "digests": True}),
            "dummy": ("nemotron", full, {"engine": {"load_format": "dummy"}}),
            "qwen": ("qwen", {"preset": "balanced"}, {}),
            "qwen, dequantized": ("qwen, dequantized", None, {}),
        },
    )
    one = reports["nemotron"]
    assert one["tokens"] == continuations_by_transformers(models["nemotron, dequantized"], 24)
    exact = torch.cat(list(logprobs_by_transformers(models["nemotron, dequantized"], windows)))
    assert one["nll_tokens"] == len(exact)
    assert abs(one["nll"] + float(exact.sum())) <= 1e-4 * one["nll"]
    assert one["reload_keeps_every_byte"] and reports["stored"]["reload_keeps_every_byte"]
    assert one["tokens"] == reports["stored"]["tokens"]
    assert in_int4(one["digests"]) == in_int4(reports["stored"]["digests"])
    experts = [name for name in one["int4"] if ".experts." in name]
    assert len(experts) == 4  # two matrices in each of two layers
    assert all(len(answer) == 24 for answer in reports["dummy"]["tokens"])
    assert reports["qwen"]["tokens"] == reports["qwen, dequantized"]["tokens"]
    assert any(".experts." in name for name in reports["qwen"]["int4"])


def in_int4(digests):
    """Digests without the empty tensors that stand where weights were loaded."""
    (rank,) = digests
    loaded = ("13_weight", "2_weight", "_zero_point")
    return {name: digest for name, digest in rank.items() if not name.endswith(loaded)}


def test_two_ranks_give_the_tokens_of_one_however_experts_are_spread(models, tmp_path):
    full = {"preset": "full"}
    jobs = {
        name: ("nemotron", full, {"engine": {"enable_expert_parallel": name == "whole"}})
        for name in ("split", "whole")
    }
    reports = serve(models, tmp_path, jobs, ranks=2)
    expected = continuations_by_transformers(models["nemotron, dequantized"], 24)
    assert reports["split"]["tokens"] == reports["whole"]["tokens"] == expected
