# SPDX-License-Identifier: Apache-2.0
"""Two pipeline stages give the logits and tokens of one, in float32 on the CPU, by both ways in."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import write_int4

from .engines import LOGITS, job, run_engines

pytestmark = pytest.mark.slow

IDS = [[5, 9, 77, 130, 8, 21, 6], [50, 93]]
# Layers of the shipped model, M-M*-M-, in the order of the new one. vLLM wants the same kinds of
# layers in every stage; the stages are M*- and M*-.
ORDER = (0, 3, 1, 2, 3, 4)


def write_two_alike_stages(source, target):
    """Write the shipped model with its layers in another order."""
    shutil.copytree(source, target)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        head, layers, rest = name.partition(".layers.")
        index, _, leaf = rest.partition(".")
        if not layers:
            tensors[name] = tensor
            continue
        for new, old in enumerate(ORDER):
            if int(index) == old:
                tensors[f"{head}.layers.{new}.{leaf}"] = tensor.clone()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config |= {"hybrid_override_pattern": "M*-M*-", "num_hidden_layers": len(ORDER)}
    (target / "config.json").write_text(json.dumps(config))
    return target


def ask(name, model, options, **engine):
    settings = {"dtype": "float32", "max_model_len": 64, **LOGITS, **engine}
    return job(name, model, options, engine=settings) | {"prompts": [], "ids": IDS}


@pytest.fixture(scope="module")
def reports(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    model = write_two_alike_stages(tiny_model, folder / "model")
    stored = write_int4(model, folder / "int4", preset="full")
    one = run_engines([ask("one", model, {"preset": "full"})], tmp_path_factory.mktemp("one"))
    # Stock vLLM 0.32 runs stages on the CPU only where a graph is traced. It is run by plain torch:
    # compiling C++ takes a minute, and is vLLM's affair.
    traced = {"mode": 2, "backend": "eager"}
    stages = {"pipeline_parallel_size": 2, "enforce_eager": False, "compilation_config": traced}
    environment = {
        "NANOQUANT_TEST_MULTIPROCESS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
    }
    jobs = [
        ask("loading", model, {"preset": "full"}, **stages),
        ask("stored", stored, None, **stages),
    ]
    return one | run_engines(jobs, tmp_path_factory.mktemp("two"), environment)


@pytest.mark.parametrize(
    ("name", "line"),
    [("loading", "quantized 7 modules to int4"), ("stored", "loaded 7 int4 modules")],
)
def test_two_stages_give_the_logits_and_tokens_of_one(reports, name, line):
    one, two = reports["one"], reports[name]
    assert "error" not in two, two
    wanted, found = torch.tensor(one["logits"]), torch.tensor(two["logits"])
    assert (found - wanted).abs().mean() <= 1e-5 * wanted.abs().mean()
    assert two["chosen"] == one["chosen"]
    # in_proj, out_proj, qkv_proj, o_proj, up_proj and down_proj of three layers, and the LM head,
    # which vLLM builds in the first stage of a Nemotron-H as well.
    assert sum(line in text for text in two["log"]) == 2
    assert len(one["int4"]) == 13
