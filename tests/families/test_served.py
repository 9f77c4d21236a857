# SPDX-License-Identifier: Apache-2.0
"""Every family by real vLLM engines: int4 against the same model with the weights int4 stands for.

In float32, so that nothing else rounds. Bamba is not among them: vLLM dropped it after 0.23.
"""

import pytest
import torch

from tests.families.models import FAMILIES, int4_modules, write, write_dequantized
from tests.serving.engines import LOGITS, job, run_engines
from vllm_nanoquant.checkpoint.quantize import Request, prepare
from vllm_nanoquant.recipe import Recipe

pytestmark = pytest.mark.slow

SERVED = [name for name in FAMILIES if name != "bamba"]
STORED = ["llama", "qwen2", "granite_routed", "zamba2", "falcon_h1"]
IDS = [[5, 9, 77, 130, 8, 21, 6], [50, 93]]
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def ask(name, model, options=None, **rest):
    engine = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True, **LOGITS}
    return job(name, model, options, engine=engine, **rest) | {"prompts": [], "ids": IDS}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: write(name, folder / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def reports(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    jobs = []
    for name in SERVED:
        recipe = {"preset": "full", "ignore": list(FAMILIES[name].ignore)}
        dense = write_dequantized(name, models[name], folder / f"{name} dense")
        jobs.append(ask(name, models[name], recipe, digests=name in STORED))
        jobs.append(ask(f"{name} dense", dense))
        if name in STORED:
            target = folder / f"{name} int4"
            prepare(Request(name, models[name], target, Recipe(**recipe))).run()
            jobs.append(ask(f"{name} stored", target, digests=True))
    return run_engines(jobs, folder)


@pytest.mark.parametrize("name", SERVED)
def test_logits_are_those_of_the_weights_that_int4_stands_for(reports, name):
    int4, dense = reports[name], reports[f"{name} dense"]
    assert "error" not in int4, int4
    assert "error" not in dense, dense
    found, wanted = torch.tensor(int4["logits"]), torch.tensor(dense["logits"])
    assert found.shape == (len(IDS), 6, 331)
    assert (found - wanted).abs().mean() <= 1e-5 * wanted.abs().mean()
    assert int4["chosen"] == dense["chosen"]


@pytest.mark.parametrize("name", SERVED)
def test_every_module_that_is_named_is_int4_and_no_other(models, reports, name):
    wanted = {}
    for module in int4_modules(name, models[name]):
        parent, _, leaf = module.rpartition(".")
        if name == "falcon_h1":
            parent = parent.replace(".mamba", ".mamba.mamba")
        wanted[f"{parent}.{FUSED.get(leaf, leaf)}.weight_packed".lstrip(".")] = None
    count = len(wanted)
    if FAMILIES[name].experts:
        layers = [f"model.layers.{i}.block_sparse_moe.experts.routed_experts" for i in range(3)]
        wanted |= dict.fromkeys(
            f"{each}.{w}_weight_packed" for each in layers for w in ("w13", "w2")
        )
        count += len(layers)
    assert set(reports[name]["int4"]) == set(wanted)
    assert f"quantized {count} modules to int4" in "\n".join(reports[name]["log"])


@pytest.mark.parametrize("name", STORED)
def test_an_int4_checkpoint_gives_the_bytes_of_quantizing_while_loading(reports, name):
    stored = reports[f"{name} stored"]
    assert "error" not in stored, stored
    if FAMILIES[name].experts:
        assert not any("experts" in module for module in stored["int4"])
        assert others(stored["digests"]) == others(reports[name]["digests"])
    else:
        assert stored["digests"] == reports[name]["digests"]
        assert stored["chosen"] == reports[name]["chosen"]
    assert "modules to int4" not in "\n".join(stored["log"])


def others(digests):
    """The digests of what is not a routed expert, rank by rank."""
    return [{k: v for k, v in rank.items() if ".experts." not in k} for rank in digests]
