# SPDX-License-Identifier: Apache-2.0
"""The benchmark of one GPU beside several: what it refuses, and that no engine outlives it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from benchmarks.end_to_end import parallel, processes
from benchmarks.end_to_end.run import GEOMETRY
from tests.benchmarks.mistakes import said

FAKE_ENGINE = """
import json, sys, time
from pathlib import Path
job = json.loads(sys.argv[1])
if job["engine"]["tensor_parallel_size"] == FAILING:
    sys.exit("no memory is left")
if FAILING:
    time.sleep(60)
import torch
from safetensors.torch import save_file
save_file({"logits": torch.ones(2, 4)}, job["logits"])
Path(job["figures"]).write_text(json.dumps({"start_seconds": 1.0}))
"""


@pytest.fixture
def engines(tmp_path, monkeypatch):
    """Write a fake engine that fails on so many GPUs; the processes that are started."""
    monkeypatch.setattr(parallel, "HERE", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    started = []
    make = processes.subprocess.Popen

    def popen(*arguments, **more):
        started.append(make(*arguments, **more))
        return started[-1]

    monkeypatch.setattr(processes.subprocess, "Popen", popen)

    def write(failing):
        text = FAKE_ENGINE.replace("FAILING", str(failing))
        (tmp_path / "parallel_engine.py").write_text(text, encoding="utf-8")
        return started

    return write


def arguments(output: Path, *more: str) -> list[str]:
    return ["--checkpoint", str(GEOMETRY), "--output", str(output), "--ranks", "2", *more]


def test_logits_and_times_are_written(engines, tmp_path):
    engines(0)
    output = tmp_path / "found.json"
    assert parallel.main(arguments(output)) == 0
    results = json.loads(output.read_text())["results"]
    assert results["logits"]["same_first_choice"] == 2
    assert results["several"] == {"start_seconds": 1.0}


def test_if_one_engine_fails_the_other_is_ended(engines, tmp_path, capsys):
    started = engines(1)
    output = tmp_path / "found.json"
    assert parallel.main(arguments(output)) == 1
    assert "the engine on 1 GPUs ended without a result" in capsys.readouterr().err
    assert [process.returncode for process in started] == [1, -signal.SIGKILL]
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ranks", "3"], "--ranks 3: there are 2 GPUs; give that many or fewer"),
        (["--ranks", "1"], "--ranks 1: one GPU is what they are compared with; give 2"),
        (["--checkpoint", "/nope"], "'/nope' has no config.json"),
        (["--output", "/nope/x.json"], "there is no folder '/nope'"),
        (["--batches", "0"], "'0' is not a positive whole number"),
        (["--preset", "bf16"], "invalid choice: 'bf16'"),
    ],
)
def test_mistakes_are_said_before_an_engine_starts(more, message, engines, tmp_path, capsys):
    started = engines(0)
    assert message in said(capsys, parallel.main, *arguments(tmp_path / "found.json", *more))
    assert not started
