# SPDX-License-Identifier: Apache-2.0
"""vLLM's own parser on the lines that `nanoquant serve` makes: what the user gave is in force."""

import ast
import importlib
import json
import shlex

import pytest

from vllm_nanoquant.cli import serve
from vllm_nanoquant.cli.main import main
from vllm_nanoquant.launch import machine as machines
from vllm_nanoquant.planner import Limits

pytestmark = [pytest.mark.compat, pytest.mark.slow]

ADDED = {
    "quantization": "nanoquant_w4a16",
    "max_model_len": 9000,
    "max_num_seqs": 6,
    "gpu_memory_utilization": 0.9,
    "mamba_ssm_cache_dtype": "float32",
    "enable_auto_tool_choice": True,
    "tool_call_parser": "nanoquant_nemotron_v2",
    "reasoning_parser": "nanoquant_nemotron_v2",
}


@pytest.fixture(scope="module")
def parse():
    """vLLM's namespace of a line, as a dictionary; the module of its parser moved twice."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for place in ("launchers.cli_args", "openai.cli_args", "common.cli_args"):
        try:
            make = importlib.import_module(f"vllm.entrypoints.{place}").make_arg_parser
            break
        except (ImportError, AttributeError):
            continue
    parser = make(FlexibleArgumentParser())
    return lambda words: {k: str(v) for k, v in vars(parser.parse_args(list(words))).items()}


@pytest.fixture
def line(monkeypatch, capsys, tmp_path):
    config = {"model_type": "nemotron_h", "ssm_state_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text("<TOOLCALL><think>")
    limits = Limits(9000, 6, 0.9)
    monkeypatch.setattr(serve, "_suggest_limits", lambda *_, **__: limits)
    monkeypatch.setattr(machines, "find_machine", lambda: machines.Machine((1 << 34,) * 2))

    def make(words):
        assert main(["serve", "--dry-run", str(tmp_path), *words]) == 0
        printed = shlex.split(capsys.readouterr().out)
        return printed[printed.index(str(tmp_path)) + 1 :]

    return make


FORMS = [
    [],
    ["-tp", "2"],
    ["-tp=2"],
    ["--tensor_parallel_size", "2"],
    ["-q", "fp8"],
    ["-qfp8"],
    ["--quantization=fp8", "--max-num-seqs=3"],
    ["--max_model_len", "1k", "--port", "9"],
    ["--max-model", "1K"],
    ["--max-model-len=auto"],
    ["--gpu_memory_util", "0.5"],
    ["--no-enable-auto-tool-choice"],
    ["--tool-call-parser", "hermes", "--enable-auto-tool-choice"],
    ["--reasoning_parser=deepseek_r1"],
    ["--mamba_ssm_cache_dtype=float16"],
    ["--hf-overrides.quantization_config.preset", "full", "--hf-overrides.a.b=1"],
    ["--hf_overrides", '{"quantization_config": {"preset": "full"}}'],
    ["--compilation-config.cudagraph_mode", "NONE", "-O2"],
    ["--served-model-name", "a b", "c", "--no-enable-prefix-caching", "--enforce-eager"],
]


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_only_what_the_user_left_out_changes(parse, line, form):
    default, own, whole = parse([]), parse(form), parse(line(form))
    given = {name for name in own if own[name] != default[name]}
    changed = {name for name in own if whole[name] != own[name]}
    assert not changed & given
    assert changed <= set(ADDED)
    for name in changed:
        assert whole[name] == str(ADDED[name])
    if not form:
        assert changed == set(ADDED)


def test_a_config_file_is_in_force_too(parse, line, tmp_path):
    file = tmp_path / "vllm.yaml"
    file.write_text("max_model_len: 512\nmamba-ssm-cache-dtype: float16\nenforce-eager: true\n")
    for form in (["--config", str(file)], [f"--config={file}", "--port", "9"]):
        whole = parse(line(form))
        assert (whole["max_model_len"], whole["mamba_ssm_cache_dtype"]) == ("512", "float16")
        assert (whole["max_num_seqs"], whole["enforce_eager"]) == ("6", "True")


def test_our_own_options_arrive_beside_the_users(parse, line):
    words = ["--hf-overrides.quantization_config.ignore", '["lm_head"]', "--preset", "full"]
    found = parse(line([*words, "--group-size", "64"]))["hf_overrides"]
    expected = {"quantization_config": {"ignore": ["lm_head"], "preset": "full", "group_size": 64}}
    assert ast.literal_eval(found) == expected
