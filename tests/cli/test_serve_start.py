# SPDX-License-Identifier: Apache-2.0
"""What `nanoquant serve` refuses, how it starts vLLM, and what it knows of the machine."""

import json
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.cli.test_serve import CPU, GIB, GPU, NEMOTRON, OPT, value
from vllm_nanoquant import planner
from vllm_nanoquant.launch import machine as machines
from vllm_nanoquant.launch.machine import with_drivers_part
from vllm_nanoquant.requirements import BYTECODE_HOOK


@pytest.fixture
def model(tmp_path):
    """Makes a folder with config.json."""

    def make(config=NEMOTRON):
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


# What is refused


def test_wrong_usage_is_one_line_and_early(run, model, monkeypatch, tmp_path):
    monkeypatch.setattr(machines, "find_machine", lambda: CPU)
    folder, file = model(), tmp_path / "x.yaml"
    file.write_text("- 1\n")
    for words, said in (
        ([], "which model?"),
        (["--port", "1"], "which model?"),
        ([folder, "--model", folder], "two models are given"),
        ([tmp_path / "nix"], "nix' is not a folder that exists"),
        ([file], "is a file; nanoquant serves folders"),
        ([tmp_path], "without config.json"),
        ([folder, "--config", tmp_path / "no.yaml"], "No such file"),
        ([folder, "--config", file], "does not hold options"),
        ([folder, "--preset", "fast"], "preset = 'fast'"),
        ([folder, "--group-size", "48"], "group_size = 48"),
        ([folder, f"{OPT}.grup_size", "64"], "did you mean 'group_size'?"),
        ([folder, "--preset", "full", f"{OPT}.preset", "ssm"], "--preset is given twice"),
        ([folder, "--preset", "full", "--hf-overrides", "{}"], "cannot be given together"),
        ([folder, "--hf-overrides", "[1]"], "is not a JSON object"),
    ):
        status, out, err = run("serve", *words, "--dry-run")
        assert (status, out) == (2, ""), words
        assert said in err and err.count("\n") == 1, (words, err)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    status, _, err = run("serve", broken, "--dry-run")
    assert (status, "not JSON" in err) == (1, True)


def test_what_nanoquant_cannot_read_is_refused(run, model):
    folder = model({**NEMOTRON, "quantization_config": {"quant_method": "mxfp4"}})
    status, _, err = run("serve", folder, "--gpu-memory", "24GiB", "--dry-run")
    assert (status, "quantized by 'mxfp4', which nanoquant does not read" in err) == (2, True)


def test_a_model_that_does_not_fit_is_one_line(run, model, monkeypatch):
    def too_large(*_, **__):
        raise planner.PlanError("it does not fit")

    monkeypatch.setattr(planner, "suggest_limits", too_large)
    words = ["serve", model(), "--gpu-memory", "8GiB", "--dry-run"]
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert err.startswith(
        "nanoquant: error: it does not fit. Nothing is planned if --max-model-len"
    )
    assert run(*words, "--max-model-len", "512", "--max-num-seqs", "1")[0] == 0


def test_the_real_planner(run, tiny_model):
    status, out, _ = run("serve", tiny_model, "--gpu-memory", "24GiB", "--dry-run")
    words = shlex.split(out)
    # The model takes 2048 tokens; beyond 8 sequences there is no CUDA graph.
    assert (status, value(words, "--max-model-len"), value(words, "--max-num-seqs")) == (
        0, "2048", "8",
    )  # fmt: skip


def test_a_bytecode_hook_and_a_missing_vllm_are_found_before_it_starts(run, model, monkeypatch):
    monkeypatch.setattr(os, "execvp", lambda *_: pytest.fail("started"))
    monkeypatch.setenv(BYTECODE_HOOK, "1")
    status, _, err = run("serve", model())
    assert (status, f"{BYTECODE_HOOK}=1" in err) == (2, True)
    monkeypatch.delenv(BYTECODE_HOOK)
    monkeypatch.setattr("vllm_nanoquant.launch.command.find_spec", lambda name: None)
    status, _, err = run("serve", "model")
    assert (status, "vLLM is not installed" in err) == (2, True)


# How vLLM is started


@pytest.fixture
def started(run, model, monkeypatch):
    """What is printed, and what is executed, without --dry-run."""

    def start(*words):
        seen = []
        monkeypatch.setattr(machines, "find_machine", lambda: CPU)
        monkeypatch.setattr(os, "execvp", lambda program, command: seen.append((program, command)))
        folder = model()
        _, out, _ = run("serve", folder, *words)
        ((program, command),) = seen
        assert (shlex.split(out), program) == (command, command[0])
        return folder, command

    return start


def test_vllm_serve_where_its_distribution_is_there(started, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0")
    folder, command = started("--port", "1")
    script = Path(sys.executable).with_name("vllm")
    start = command.index("serve")
    assert command[:start][-1] in ("vllm", str(script), "vllm.entrypoints.cli.main")
    assert command[start : start + 2] == ["serve", str(folder)]
    assert command[-2:] == ["--port", "1"]


def test_the_module_where_the_command_would_not_start(started, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    folder, command = started("--port", "1")
    module = "vllm.entrypoints.openai.api_server"
    assert command[1:5] == ["-m", module, "--model", str(folder)]
    assert command[-2:] == ["--port", "1"]


def test_the_shell_finds_what_is_printed(started, monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.32.0")
    monkeypatch.setenv("PATH", "/nowhere")
    assert Path(started()[1][0]).is_absolute()


def test_help_names_what_is_added(run):
    status, out, _ = run("serve", "--help")
    assert status == 0
    for word in ("--preset", "--gpu-memory", "--dry-run", "examples:\n  nanoquant serve "):
        assert word in out


# The machine


def test_memory_is_that_of_nvidia_smi(monkeypatch):
    seen, totals = [25_300_000_000, 8_400_000_000], [8 * GIB, 24 * GIB]
    assert with_drivers_part(seen, totals) == (24 * GIB, 8 * GIB)
    assert with_drivers_part(seen, []) == tuple(seen)
    assert with_drivers_part([10 * GIB], [24 * GIB]) == (10 * GIB,)  # a slice of a GPU
    assert GPU.memory(1) == 24 * GIB and GPU.memory(2) == 16 * GIB
    assert GPU.memory(3) is None and CPU.memory(1) is None
    found = machines.find_machine()
    assert found.is_cpu or found.gpus
