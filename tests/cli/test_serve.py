# SPDX-License-Identifier: Apache-2.0
"""The line that `nanoquant serve` makes, by its dry run; the planner and the machine are fakes."""

import json
import os
import shlex

import pytest

from vllm_nanoquant.cli import serve
from vllm_nanoquant.launch import machine as machines
from vllm_nanoquant.launch.machine import Machine
from vllm_nanoquant.planner import Limits

GIB = 1 << 30
CPU, GPU = Machine(is_cpu=True), Machine((24 * GIB, 16 * GIB))
OPT = "--hf-overrides.quantization_config"
V2 = "{# <TOOLCALL>[...]</TOOLCALL>, <think> #}{{ messages }}"
V3 = "<tool_call>\n<function=f>\n</function><think>"
NEMOTRON = {"model_type": "nemotron_h", "ssm_state_size": 64, "num_hidden_layers": 2}
LLAMA = {"model_type": "llama", "num_hidden_layers": 2}


@pytest.fixture
def planned(monkeypatch):
    """Calls of the planner, as (model, recipe, keywords)."""
    calls = []

    def suggest(model, recipe, **rest):
        calls.append((model, recipe, rest))
        length, sequences = rest["max_model_len"] or 9000, rest["max_num_seqs"] or 6
        return Limits(length, sequences, rest["gpu_memory_utilization"])

    monkeypatch.setattr(serve, "_suggest_limits", suggest)
    return calls


@pytest.fixture
def model(tmp_path):
    """Makes a folder with config.json and, if given, a chat template."""

    def make(config=NEMOTRON, template=None, name="model"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if template is not None:
            text = json.dumps({"chat_template": template})
            (folder / "tokenizer_config.json").write_text(text)
        return folder

    return make


@pytest.fixture
def line(run, monkeypatch, planned):
    """Runs a dry run on a machine; gives the words behind the model, and fails if it fails."""
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("started"))

    def dry_run(folder, *words, on=GPU):
        monkeypatch.setattr(machines, "find_machine", lambda: on)
        status, out, err = run("serve", "--dry-run", folder, *words)
        assert status == 0, err
        printed = shlex.split(out)
        start = printed.index(str(folder))
        return printed[start + 1 :]

    return dry_run


def value(words, name):
    assert words.count(name) == 1, words
    return words[words.index(name) + 1]


# What is added


def test_everything_that_the_user_left_out(line, model, planned):
    folder = model(template=V2)
    words = line(folder)
    assert words == [
        *("--quantization", "nanoquant_w4a16"),
        *("--max-model-len", "9000", "--max-num-seqs", "6", "--gpu-memory-utilization", "0.9"),
        *("--mamba-ssm-cache-dtype", "float32", "--enable-auto-tool-choice"),
        *("--tool-call-parser", "nanoquant_nemotron_v2"),
        *("--reasoning-parser", "nanoquant_nemotron_v2"),
    ]
    ((name, recipe, rest),) = planned
    assert (name, recipe.preset) == (str(folder), "balanced")
    assert rest == {
        "gpu_memory": 24 * GIB, "tensor_parallel_size": 1, "gpu_memory_utilization": 0.9,
        "max_model_len": None, "max_num_seqs": None, "kv_cache_dtype": "auto",
        "mamba_ssm_cache_dtype": "float32",
    }  # fmt: skip


def test_other_families_and_other_parsers(line, model):
    assert "--mamba-ssm-cache-dtype" not in line(model(LLAMA, V2, "llama"))
    assert "--tool-call-parser" not in line(model(LLAMA, V2, "llama2"))
    assert "--tool-call-parser" not in line(model(NEMOTRON, "plain", "base"))
    words = line(model(NEMOTRON, V3, "v3"))
    assert value(words, "--tool-call-parser") == "qwen3_coder"
    assert value(words, "--reasoning-parser") == "nemotron_v3"
    assert value(line(model({"text_config": NEMOTRON}, V2, "in")), "--reasoning-parser")
    silent = line(model(NEMOTRON, "<TOOLCALL>", "silent"))
    assert "--reasoning-parser" not in silent and "--tool-call-parser" in silent


def test_the_template_may_lie_elsewhere(line, model, tmp_path):
    folder = model(name="a")
    (folder / "chat_template.jinja").write_text(V2)
    assert "--tool-call-parser" in line(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "plain"}))
    assert "--tool-call-parser" in line(folder)  # the file goes before the key
    several = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": V2}]
    assert "--tool-call-parser" in line(model(NEMOTRON, several, "b"))
    plain = model(NEMOTRON, "plain", "c")
    assert "--tool-call-parser" in line(plain, "--tokenizer", model(NEMOTRON, V2, "d"))
    own = tmp_path / "own.jinja"
    own.write_text(V2)
    assert "--tool-call-parser" in line(plain, f"--chat-template={own}")
    assert "--tool-call-parser" in line(plain, "--chat_template", V2)
    own.write_text("plain")
    assert "--tool-call-parser" not in line(folder, "--chat-template", own)


@pytest.mark.parametrize(
    ("written", "asked"),
    [
        ({"quant_method": "nanoquant_w4a16", "format_version": 1, "preset": "full"}, False),
        ({"quant_method": "nanoquant_w4a16", "preset": "ssm"}, False),
        ({"quant_method": "awq", "bits": 4}, True),
        ({"quant_method": "compressed-tensors"}, True),
    ],
)
def test_checkpoints_that_are_quantized(line, model, planned, written, asked):
    words = line(model({**NEMOTRON, "quantization_config": written}))
    assert ("--quantization" in words) is asked
    ((_, recipe, _),) = planned
    assert recipe.preset == written.get("preset", "balanced")


def test_states_are_as_config_json_says(line, model, planned):
    words = line(model({**NEMOTRON, "mamba_ssm_cache_dtype": "bfloat16"}, name="a"))
    assert "--mamba-ssm-cache-dtype" not in words
    assert planned[-1][2]["mamba_ssm_cache_dtype"] == "bfloat16"
    assert "--mamba-ssm-cache-dtype" in line(
        model({**NEMOTRON, "mamba_ssm_cache_dtype": "float32"}, name="b")
    )
    assert "--mamba-ssm-cache-dtype" in line(model({"mamba_d_state": 128}, name="c"))


def test_on_a_cpu_lengths_are_left_to_vllm_and_prefixes_are_not_cached(line, model, planned):
    words = line(model(), on=CPU)
    assert words == [
        *("--quantization", "nanoquant_w4a16", "--mamba-ssm-cache-dtype", "float32"),
        "--no-enable-prefix-caching",
    ]
    assert planned == []
    assert "--no-enable-prefix-caching" not in line(model(LLAMA, name="llama"), on=CPU)
    assert line(model(name="b"), "--enable-prefix-caching", on=CPU).count(
        "--no-enable-prefix-caching"
    ) == 0  # fmt: skip
    off = "--no-enable-prefix-caching"
    assert line(model(name="d"), off, on=CPU).count(off) == 1
    assert line(model(name="c"), on=Machine())[-1] == "float32"  # torch could not say


def test_gpu_memory_stands_for_the_machine(run, model, planned, monkeypatch):
    monkeypatch.setattr(machines, "find_machine", lambda: pytest.fail("asked the machine"))
    folder = model()
    status, out, _ = run("serve", folder, "-tp", "2", "--gpu-memory", "16GiB", "--dry-run")
    assert (status, planned[0][2]["gpu_memory"]) == (0, 16 * GIB)
    assert planned[0][2]["tensor_parallel_size"] == 2
    assert "--gpu-memory " not in out and "--dry-run" not in out
    for wrong in ("0.9", "much"):
        status, _, err = run("serve", folder, "--gpu-memory", wrong, "--dry-run")
        assert (status, err.startswith("nanoquant: error: --gpu-memory")) == (2, True)


# What the user gave


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["--quantization", "fp8"], "--quantization"),
        (["-q", "fp8"], "--quantization"),
        (["-q=fp8"], "--quantization"),
        (["-qfp8"], "--quantization"),
        (["--quant=fp8"], "--quantization"),
        (["--max-model-len", "512"], "--max-model-len"),
        (["--max_model_len=512"], "--max-model-len"),
        (["--max-model=512"], "--max-model-len"),
        (["--max-num-seqs", "2"], "--max-num-seqs"),
        (["--gpu_memory_utilization", "0.5"], "--gpu-memory-utilization"),
        (["--gpu-mem", "0.5"], "--gpu-memory-utilization"),  # vLLM's, and not our --gpu-memory
        (["--mamba-ssm-cache-dtype", "bfloat16"], "--mamba-ssm-cache-dtype"),
        (["--tool-call-parser", "hermes"], "--tool-call-parser"),
        (["--tool-call-parser", "hermes"], "--enable-auto-tool-choice"),
        (["--no-enable-auto-tool-choice"], "--tool-call-parser"),
        (["--no-enable-auto-tool-choice"], "--enable-auto-tool-choice"),
        (["--reasoning-parser=deepseek_r1"], "--reasoning-parser"),
        (["--structured-outputs-config.reasoning_parser", "x"], "--reasoning-parser"),
        (["--structured-outputs-config", '{"reasoning_parser": "x"}'], "--reasoning-parser"),
    ],
)
def test_what_is_given_is_kept_and_not_added(line, model, given, name):
    words = line(model(template=V2), *given)
    assert words[-len(given) :] == given  # behind, where it would win in any case
    assert name not in words[: -len(given)]


def test_the_rest_is_still_added(line, model, planned):
    words = line(model(template=V2), "--max-model-len", "8k", "--reasoning-parser", "other")
    assert value(words, "--max-num-seqs") == "6"
    assert value(words, "--tool-call-parser") == "nanoquant_nemotron_v2"
    assert planned[0][2]["max_model_len"] == 8000
    words = line(model(name="b", template=V2), "--enable-auto-tool-choice")
    assert words.count("--enable-auto-tool-choice") == 1
    assert value(words, "--tool-call-parser") == "nanoquant_nemotron_v2"


def test_the_planner_learns_what_the_user_gave(line, model, planned):
    line(
        model(), "-tp=2", "--kv-cache-dtype", "fp8", "--gpu-memory-utilization=0.8",
        "--max-num-seqs", "3", "--mamba_ssm_cache_dtype", "float16", f"{OPT}.preset", "full",
        f"{OPT}.ignore", '["lm_head"]',
    )  # fmt: skip
    ((_, recipe, rest),) = planned
    assert rest == {
        "gpu_memory": 16 * GIB, "tensor_parallel_size": 2, "gpu_memory_utilization": 0.8,
        "max_model_len": None, "max_num_seqs": 3, "kv_cache_dtype": "fp8",
        "mamba_ssm_cache_dtype": "float16",
    }  # fmt: skip
    assert (recipe.preset, recipe.ignore) == ("full", ("lm_head",))


@pytest.mark.parametrize(
    ("text", "number"),
    [("8k", 8000), ("8K", 8192), ("1.5k", 1500), ("4096", 4096), ("auto", None), ("-1", None)],
)
def test_lengths_as_vllm_reads_them(line, model, planned, text, number):
    words = line(model(), "--max-model-len", text)
    assert planned[0][2]["max_model_len"] == number
    assert words.count("--max-model-len") == 1


@pytest.mark.parametrize(
    "given",
    [
        ["--max-model-len", "512", "--max-num-seqs", "2"],
        ["-q", "fp8"],
        ["-pp", "2"],
        ["--kv-cache-memory-bytes", "5000000000"],
        ["--cpu-offload-gb=4"],
        ["-tp", "4"],  # more than there are
    ],
)
def test_where_there_is_nothing_to_plan(line, model, planned, given):
    words = line(model(), *given)
    assert planned == []
    assert "--gpu-memory-utilization" not in words


def test_a_config_file_counts_as_given(line, model, planned, tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "max-model-len: 777\nquantization: nanoquant_w4a16\nenable_auto_tool_choice: false\n"
        "hf-overrides:\n  quantization_config:\n    preset: full\n"
    )
    words = line(model(template=V2), "--config", file)
    added = words[:-2]
    assert words[-2:] == ["--config", str(file)]
    for name in ("--quantization", "--max-model-len", "--enable-auto-tool-choice"):
        assert name not in added
    assert value(added, "--max-num-seqs") == "6"
    assert (planned[0][2]["max_model_len"], planned[0][1].preset) == (777, "full")
    line(model(name="b"), f"--config={file}", "--max-model-len", "888")
    assert planned[1][2]["max_model_len"] == 888  # the command line goes before the file
    assert line(model(name="c"), f"--config={file}")[-2:] == ["--config", str(file)]


def test_a_model_in_the_config_file(run, model, planned, monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "find_machine", lambda: GPU)
    file, folder = tmp_path / "vllm.yaml", model(template=V2)
    file.write_text(f"model: {folder}\n")
    status, out, _ = run("serve", "--config", file, "--dry-run")
    assert (status, planned[0][0]) == (0, str(folder))
    assert str(folder) not in out  # vLLM reads it in the file
    assert "--tool-call-parser" in out


def test_the_model_behind_the_flag_is_the_model(run, model, planned, monkeypatch):
    monkeypatch.setattr(machines, "find_machine", lambda: CPU)
    folder = model()
    for words in (["--model", folder, "--port", "1234"], ["--port", "1234", f"--model={folder}"]):
        status, out, _ = run("serve", *words, "--dry-run")
        assert status == 0
        assert shlex.split(out).count(str(folder)) == 1 and "--port 1234" in out


def test_our_own_options_reach_the_plugin(line, model, planned):
    words = line(model(), "--preset", "full", "--group-size=64", "--max-capture-size", "16")
    assert value(words, f"{OPT}.preset") == "full"
    assert value(words, f"{OPT}.group_size") == "64"
    assert value(words, f"{OPT}.max_capture_size") == "16"
    assert not {"--preset", "--group-size", "--group-size=64"} & set(words)
    recipe = planned[0][1]
    assert (recipe.preset, recipe.group_size, recipe.max_capture_size) == ("full", 64, 16)


def test_words_are_passed_on_in_their_order_and_quoted(line, model, tmp_path):
    folder = model(name="a folder with 'quotes'")
    given = [
        "--served-model-name",
        "a b",
        "c",
        "--hf-overrides",
        '{"x": "$HOME"}',
        "-O3",
        "--",
        "z",
    ]
    assert line(folder, *given)[-len(given) :] == given
