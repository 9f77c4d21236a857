# SPDX-License-Identifier: Apache-2.0
"""Where a model's shapes come from: folders, the Hub, config.json alone, strange checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.families import models as families
from tests.planner.hub import serve
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
from vllm_nanoquant.cli.main import main
from vllm_nanoquant.planner.errors import PlanError
from vllm_nanoquant.planner.fit import fit
from vllm_nanoquant.planner.numbers import GIB
from vllm_nanoquant.planner.settings import Settings
from vllm_nanoquant.planner.source import read_facts
from vllm_nanoquant.planner.weights import Part
from vllm_nanoquant.recipe import Recipe, RecipeError

GEOMETRIES = Path(__file__).parents[2] / "benchmarks" / "geometry"
MODEL = "maker/tiny"


def run_plan(endpoint, home, *arguments):
    """``nanoquant plan`` in a process whose Hub is at `endpoint`."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "vllm_nanoquant", "plan", *arguments, "--json"]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=120, check=False
    )


@pytest.mark.slow
def test_a_model_of_the_hub(tiny_model, tmp_path, capsys):
    arguments = (MODEL, "--gpu-memory", "24GiB", "--preset", "full")
    with serve(MODEL, tiny_model) as (endpoint, sent):
        done = run_plan(endpoint, tmp_path, *arguments)
        found = json.loads(done.stdout)
        missing = run_plan(endpoint, tmp_path, "maker/other", *arguments[1:])
    assert (done.returncode, found["shapes_from"]) == (0, "safetensors headers")
    # No weight is fetched: the client asks for the first 100 kB, where headers lie.
    assert sent["model.safetensors"] <= 100_001 < (tiny_model / "model.safetensors").stat().st_size
    assert set(sent) == {"config.json", "model.safetensors"}
    assert main(["plan", str(tiny_model), *arguments[1:], "--json"]) == 0
    assert found["variants"] == json.loads(capsys.readouterr().out)["variants"]
    assert missing.returncode == 2
    assert (
        "'maker/other' is not a folder that exists, nor a model that can be had" in missing.stderr
    )
    assert "Traceback" not in missing.stderr


@pytest.mark.slow
def test_a_model_of_the_hub_with_a_config_alone(tmp_path):
    geometry = GEOMETRIES / "nemotron-nano-9b-v2"
    with serve(MODEL, geometry) as (endpoint, sent):
        done = run_plan(endpoint, tmp_path, MODEL, "--gpu-memory", "24GiB", "--preset", "full")
    found = json.loads(done.stdout)
    assert (done.returncode, found["shapes_from"]) == (0, "config.json")
    # The Hub is gone; config.json is in the cache.
    later = run_plan(endpoint, tmp_path, MODEL, "--gpu-memory", "24GiB", "--preset", "full")
    assert (later.returncode, later.stdout) == (0, done.stdout)
    assert set(sent) == {"config.json"}
    total = found["variants"][0]["parts"][-1]
    assert total["parameters"] == pytest.approx(8.888e9, rel=1e-3)


def write(folder, config, tensors=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def tiny_config(tiny_model):
    return json.loads((tiny_model / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden_size": "big"}, "hidden_size is \"'big'\"|hidden_size is 'big'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": -5}, "vocab_size is -5; it must be a whole number above 0"),
        ({"mamba_num_heads": 10**12}, "mamba_num_heads is 1000000000000"),
        ({"hybrid_override_pattern": "MX"}, "must have one of the letters"),
        ({"hybrid_override_pattern": None, "layers_block_type": None}, "hybrid_override_pattern"),
        ({"hybrid_override_pattern": "M" * 1001}, "1001 layers; the limit is 1000"),
        ({"hybrid_override_pattern": "E" * 900, "n_routed_experts": 900}, "810000 routed experts"),
        ({"hybrid_override_pattern": "E", "n_routed_experts": 2**30}, "1073741824 routed experts"),
        ({"model_type": "llama", "num_hidden_layers": 10**6}, "num_hidden_layers is above 1000"),
        ({"mamba_ssm_cache_dtype": "int8"}, "mamba_ssm_cache_dtype is none of"),
        ({"mamba_ssm_cache_dtype": ["float32"]}, "mamba_ssm_cache_dtype is none of"),
        ({"model_type": 3}, "model_type is missing"),
        ({"model_type": "no-such-family"}, "transformers cannot build 'no-such-family'"),
        ({"kv_lora_rank": 512}, "has latent attention"),
        ({"num_attention_heads": [4]}, "num_attention_heads is"),
        ({"quantization_config": {"quant_method": "fp8"}}, "cannot be told how"),
        ({"quantization_config": [1]}, "cannot be told how"),
        ({"mamba_num_heads": 2**30, "mamba_head_dim": 2**30}, "is no tensor of a model"),
    ],
)
def test_a_strange_config(tiny_model, tmp_path, change, text):
    config = {k: v for k, v in (tiny_config(tiny_model) | change).items() if v is not None}
    with pytest.raises(CheckpointError, match=text):
        fit(read_facts(write(tmp_path / "model", config)), Recipe(), Settings(24 * GIB))


@pytest.mark.parametrize(
    ("config", "tensors", "text"),
    [
        ({"quant_method": "gptq"}, ["layers.0.q_proj.qweight"], r"another tool \(gptq\)"),
        (None, ["layers.0.q_proj.qweight"], r"another tool \(layers.0.q_proj.qweight\)"),
        ({"quant_method": "fp8"}, ["layers.0.q_proj.weight"], r"another tool \(fp8\)"),
        ({"quant_method": "x\n\x1b[31m"}, ["a.weight"], r"another tool \(x\\x0a\\x1b\[31m\)"),
    ],
)
def test_a_checkpoint_of_another_tool(tiny_model, tmp_path, config, tensors, text):
    whole = tiny_config(tiny_model) | ({"quantization_config": config} if config else {})
    whole["hybrid_override_pattern"] = "*"
    folder = write(tmp_path / "model", whole, {name: torch.zeros(8, 8) for name in tensors})
    with pytest.raises(PlanError, match=text):
        fit(read_facts(folder), Recipe(), Settings(24 * GIB))


def test_an_int4_format_of_a_later_release(tiny_model, tmp_path):
    options = {"quant_method": "nanoquant_w4a16", "format_version": 99}
    config = tiny_config(tiny_model) | {"quantization_config": options}
    folder = write(tmp_path / "model", config, {"lm_head.weight": torch.zeros(8, 8)})
    with pytest.raises(RecipeError, match="format_version = 99"):
        fit(read_facts(folder), None, Settings(24 * GIB))


def test_shapes_that_do_not_fit_the_config(tiny_model, tmp_path):
    config = tiny_config(tiny_model)
    tensors = {
        "backbone.layers.0.mixer.conv1d.weight": torch.zeros(100, 1, 4),
        "backbone.layers.0.mixer.A_log": torch.zeros(7),
    }
    with pytest.raises(PlanError, match=r"conv1d.weight is \[100, 1, 4\], which does not fit 7"):
        fit(read_facts(write(tmp_path / "a", config, tensors)), Recipe(), Settings(24 * GIB))
    del tensors["backbone.layers.0.mixer.A_log"]
    with pytest.raises(PlanError, match="is not that of a Mamba-2 layer"):
        fit(read_facts(write(tmp_path / "b", config, tensors)), Recipe(), Settings(24 * GIB))


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(UsageError, match=r"has no config\.json"):
        read_facts(tmp_path)
    with pytest.raises(UsageError, match=r"--revision main is for models of the Hub"):
        read_facts(tmp_path, "main")
    with pytest.raises(UsageError, match="is not a folder that exists"):
        read_facts(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        read_facts(tmp_path)


def test_a_damaged_file_is_refused(tiny_model, tmp_path):
    folder = write(tmp_path / "model", tiny_config(tiny_model))
    data = (tiny_model / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        read_facts(folder)


@pytest.mark.parametrize("family", ["granite", "granite_routed", "zamba2", "falcon_h1", "qwen3"])
def test_other_families_by_headers_and_by_config(tmp_path, family):
    """The same plan from both, but for experts in one tensor, whose names differ."""
    folder = families.write(family, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    plans = [
        fit(read_facts(source), Recipe(preset="full"), Settings(24 * GIB))
        for source in (folder, write(tmp_path / "config", config))
    ]
    # Written by hand: what each family has (docs/families.md).
    states = {
        "granite": (2, 1), "granite_routed": (2, 1), "zamba2": (4, 2), "falcon_h1": (2, 2),
        "qwen3": (0, 2),
    }  # fmt: skip
    mamba, attention = states[family]
    for found in plans:
        cache = found.cache
        heads = {w.module for w in found.weights if w.part is Part.LM_HEAD}
        # vLLM builds Falcon-H1's head without asking; Zamba2's and this Qwen3's are tied.
        assert heads == (set() if family in ("zamba2", "qwen3") else {"lm_head"})
        assert ("lm_head" in found.schemes) == family.startswith("granite")
        assert cache.attention_groups * cache.group_layers >= attention
        assert bool(cache.state_bytes) == bool(mamba)
        if mamba:
            assert cache.mamba_groups * cache.group_layers >= mamba
            heads, inner = (10, 320) if family == "falcon_h1" else (12, 384)
            state = 3 * (inner + 2 * 2 * 32) * 2 + heads * 32 * 32 * 2
            assert cache.state_bytes == mamba * state
    assert plans[0].needs.weights == plans[1].needs.weights
    assert plans[0].cache == plans[1].cache


LLAMA = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}


def test_a_plain_transformer_from_its_config(tmp_path):
    facts = read_facts(write(tmp_path / "model", LLAMA))
    found = fit(facts, Recipe(preset="full"), Settings(24 * GIB))
    assert found.cache.block_tokens == 16
    assert found.cache.token_bytes == 3 * 2 * 4 * 32 * 2
    assert found.cache.block_bytes == 16 * found.cache.token_bytes
    assert found.cache.blocks_of(2048) == 128
    assert len(found.schemes) == 3 * 7 + 1
    assert sum(weight.numel for weight in found.weights) == 2 * 1024 * 256 + 256 + 3 * (
        2 * 256 + 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 512
    )


def test_a_config_brings_no_code(tmp_path, monkeypatch):
    """Keys by which transformers would fetch or choose code do not reach it."""
    seen = []
    from transformers import AutoConfig

    def read(folder, **options):
        seen.append((json.loads((Path(folder) / "config.json").read_text()), options))
        raise OSError("enough")

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    code = {
        "auto_map": {"AutoConfig": "evil.Config"},
        "attn_implementation": "someone/kernel",
        "_attn_implementation": "someone/kernel",
        "_attn_implementation_internal": "someone/kernel",
        "experts_implementation": "someone/kernel",
    }
    with pytest.raises(PlanError, match="transformers cannot build 'llama'"):
        read_facts(write(tmp_path / "model", LLAMA | code))
    assert seen == [(LLAMA, {"trust_remote_code": False, "local_files_only": True})]


def test_a_tied_head_is_no_second_tensor(tmp_path):
    facts = read_facts(write(tmp_path / "model", LLAMA | {"tie_word_embeddings": True}))
    found = fit(facts, Recipe(preset="full"), Settings(24 * GIB))
    assert "lm_head.weight" not in facts.tensors
    assert len(found.schemes) == 3 * 7
    # It is read whole for every token, as the head.
    assert found.traffic.weights > 1024 * 256 * 2
