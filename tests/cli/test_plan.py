# SPDX-License-Identifier: Apache-2.0
"""``nanoquant plan``: what it prints, its exit status, its JSON."""

import json
import re
from pathlib import Path

import pytest

from vllm_nanoquant.planner import suggest_limits
from vllm_nanoquant.recipe import Recipe

GEOMETRIES = Path(__file__).parents[2] / "benchmarks" / "geometry"
NANO_9B = GEOMETRIES / "nemotron-nano-9b-v2"
PRESETS = ["ssm", "balanced", "quality", "full"]


def test_every_preset(run):
    status, out, err = run("plan", NANO_9B, "--gpu-memory", "24GiB")
    assert (status, err) == (0, "")
    assert "shapes from config.json, no safetensors headers could be read" in out
    for preset in PRESETS:
        assert re.search(
            rf"^{preset} +modules  parameters +BF16 +served  read per token$", out, re.M
        )
    assert out.count("embedding") == 5
    assert "predicted, not measured" in out
    # 54 projections, in BF16 and in int4.
    assert re.search(r"Mamba projections +54 +3,979.10 M +7,958.20 MB +2,116.83 MB", out)
    assert "16,384 bytes of keys and values per token, 143,548,416 bytes of Mamba states" in out
    assert "blocks of 1312 tokens or one state" in out
    assert all(len(line) <= 110 for line in out.splitlines() if str(NANO_9B) not in line)


def test_json_says_the_same(run):
    arguments = ("plan", NANO_9B, "--gpu-memory", "24GiB", "--mamba-ssm-cache-dtype", "float32")
    result = json.loads(run(*arguments, "--json")[1])
    assert (result["fits"], result["shapes_from"]) == (True, "config.json")
    assert "predicted" in result["kind"]
    assert [variant["name"] for variant in result["variants"]] == ["bf16", *PRESETS]
    out = run(*arguments)[1]
    for variant in result["variants"][1:]:
        limits = suggest_limits(
            NANO_9B, Recipe(preset=variant["name"]), gpu_memory=result["gpu_memory"]
        )
        assert variant["limits"] == vars(limits)
        assert (
            f"{variant['name']}: --max-model-len {limits.max_model_len} --max-num-seqs "
            f"{limits.max_num_seqs} --gpu-memory-utilization 0.9\n"
        ) in out
        *parts, total = variant["parts"]
        for key in ("modules", "parameters", "bf16_bytes", "bytes", "read_bytes"):
            assert total[key] == sum(part[key] for part in parts)
        assert variant["gpu"]["weights"] == total["bytes"]
        gpu = variant["gpu"]
        assert gpu["cache"] == gpu["budget"] - gpu["beside_cache"]
        assert gpu["model"] == gpu["weights"] + gpu["rounding"] + gpu["scratch"]
        speeds = variant["predicted_tokens_per_second"]["RTX 3090"]
        assert speeds["1"] < speeds["8"] < 8 * speeds["1"]
    reads = [variant["parts"][-1]["read_bytes"] for variant in result["variants"]]
    assert reads[0] > reads[1] > reads[3] > reads[2] > reads[4]


def test_a_token_reads_the_experts_that_it_chooses(run):
    model = GEOMETRIES / "nemotron-3-nano-30b-a3b"
    arguments = ("plan", model, "--gpu", "H200", "--preset", "balanced", "--json")
    parts = {row["part"]: row for row in json.loads(run(*arguments)[1])["variants"][0]["parts"]}
    experts = parts["routed experts"]
    assert experts["modules"] == 23 * 128 * 2
    assert experts["read_bytes"] == pytest.approx(experts["bytes"] * 6 / 128)
    assert parts["shared experts"]["read_bytes"] == parts["shared experts"]["bytes"]
    assert parts["Mamba states"]["read_bytes"] == 2 * 23 * 2134016
    assert parts["embedding"]["read_bytes"] == 0


def test_one_preset_and_one_gpu(run):
    status, out, _ = run(
        "plan", NANO_9B, "--gpu", "NVIDIA GeForce RTX 3090", "--preset", "full",
        "--group-size", "64", "--ignore", "lm_head",
    )  # fmt: skip
    assert status == 0
    assert re.search(r"LM head +1 +587.20 M +1,174.41 MB +1,174.41 MB", out)
    assert out.count("embedding") == 1
    assert "24.00 GiB each" in out
    assert "RTX 3090" in out
    assert "RTX 4090" not in out


def test_several_gpus(run):
    arguments = ("plan", NANO_9B, "--gpu-memory", "24GiB")
    result = json.loads(run(*arguments, "--preset", "full", "--json")[1])
    two = json.loads(run(*arguments, "--preset", "full", "--tensor-parallel-size", 2, "--json")[1])
    one_rank, half = result["variants"][0], two["variants"][0]
    assert two["tensor_parallel_size"] == 2
    assert half["gpu"]["weights"] == pytest.approx(one_rank["gpu"]["weights"] / 2, rel=0.01)
    assert (
        half["cache"]["state_bytes_per_sequence"] * 2
        == (one_rank["cache"]["state_bytes_per_sequence"])
    )
    assert half["parts"][0]["parameters"] == one_rank["parts"][0]["parameters"]
    out = run(*arguments, "--preset", "full", "--tensor-parallel-size", 2)[1]
    assert "2 GPUs, and sizes are those of one of them" in out
    assert "linked by NVLink" in out


def test_what_does_not_fit(run):
    arguments = ("plan", NANO_9B, "--gpu-memory", "6GiB")
    status, out, err = run(*arguments)
    assert status == 1
    assert "full: does not fit" in out
    assert re.fullmatch(r"nanoquant: error: .* does not fit: .* what would fit: .*\n", err)
    status, out, err = run(*arguments, "--json")
    result = json.loads(out)
    assert (status, err, result["fits"]) == (1, "", False)
    for variant in result["variants"]:
        assert variant["limits"] is None
        assert "does not fit" in variant["why_not"]
        assert set(variant["longest_by_sequences"].values()) == {0}


def test_an_int4_checkpoint_is_planned_as_it_is(run, tiny_model, tmp_path):
    target = tmp_path / "int4"
    assert run("quantize", tiny_model, target, "--preset", "full", "--algorithm", "minmax")[0] == 0
    stored = json.loads(run("plan", target, "--gpu-memory", "24GiB", "--json")[1])
    online = json.loads(
        run("plan", tiny_model, "--gpu-memory", "24GiB", "--preset", "full", "--json")[1]
    )
    assert [variant["name"] for variant in stored["variants"]] == ["as it is"]
    for key in ("parts", "gpu", "cache", "limits"):
        assert stored["variants"][0][key] == online["variants"][0][key]


def test_presets_that_cannot_be_planned(run, tmp_path):
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, _ = run("plan", tmp_path, "--gpu-memory", "24GiB")
    assert status == 0
    assert re.search("^ssm: not planned: preset ssm, .* covers no module of", out, re.M)
    assert re.search(
        "^quality: not planned: preset 'quality' needs the kind of each layer", out, re.M
    )
    status, out, err = run("plan", tmp_path, "--gpu-memory", "24GiB", "--preset", "ssm")
    assert (status, out) == (2, "")
    assert "covers no module" in err


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        ([], 2, "required: MODEL"),
        ([NANO_9B], 2, "one of the arguments --gpu-memory --gpu is required"),
        ([NANO_9B, "--gpu-memory", "24GiB", "--gpu", "L4"], 2, "not allowed with argument"),
        ([NANO_9B, "--gpu-memory", "much"], 2, "'much' is not a size like 24GiB, 24GB or 24564MiB"),
        ([NANO_9B, "--gpu-memory", "24"], 2, "no GPU has 0.00 GiB"),
        ([NANO_9B, "--gpu", "GTX 970"], 2, "'GTX 970' is not known; known: RTX 3090,"),
        ([NANO_9B, "--gpu", "L4", "--preset", "fast"], 2, "preset = 'fast'"),
        ([NANO_9B, "--gpu", "L4", "--group-size", "48"], 2, "group_size = 48"),
        ([NANO_9B, "--gpu", "L4", "--ignore", "*.inproj"], 2, "'*.inproj'"),
        ([NANO_9B, "--gpu", "L4", "--override", "x"], 2, "is not of the form PATTERN=4/32"),
        ([NANO_9B, "--gpu", "L4", "--kv-cache-dtype", "int3"], 2, "kv_cache_dtype is 'int3'"),
        ([NANO_9B, "--gpu", "L4", "--tensor-parallel-size", "3"], 2, "does not divide 128"),
        ([NANO_9B, "--gpu", "L4", "--gpu-memory-utilization", "2"], 2, "must be above 0 and"),
        ([NANO_9B, "--gpu", "L4", "--max-model-len", "0"], 2, "max_model_len is 0"),
        ([NANO_9B, "--gpu", "L4", "--revision", "main"], 2, "--revision main is for models"),
        (["./nothing", "--gpu", "L4"], 2, "'./nothing' is not a folder that exists"),
        ([GEOMETRIES, "--gpu", "L4"], 2, "has no config.json"),
    ],
)
def test_wrong_usage(run, arguments, status, text):
    found, out, err = run("plan", *arguments)
    assert (found, out) == (status, "")
    assert text in err
    assert err.count("\n") == 1
    assert json.loads(run("plan", *arguments, "--json")[1]).keys() == {"error"}
