# SPDX-License-Identifier: Apache-2.0
"""The benchmark of memory: what it finds in vLLM's log, and what the plan says beside it."""

import argparse
import json
import re
import signal

import pytest

from benchmarks.end_to_end import memory
from benchmarks.end_to_end.memory import GEOMETRY, LOGGED, planned
from benchmarks.end_to_end.processes import start_engine
from tests.benchmarks.mistakes import said
from vllm_nanoquant.planner.numbers import MIB

# Lines of vLLM 0.26 on an H200.
LOG = """\
(EngineCore pid=1) Peak GPU memory after loading weights: 6.93 GiB
(EngineCore pid=1) Model loading took 5.72 GiB memory and 17.473308 seconds
(EngineCore pid=1) Setting attention block size to 1312 tokens to ensure that attention page ...
(EngineCore pid=1) Estimated CUDA graph memory: 0.04 GiB total
(EngineCore pid=1) Available KV cache memory: 103.56 GiB
(EngineCore pid=1) GPU KV cache size: 1,926,237 tokens
(EngineCore pid=1) Maximum concurrency for 4,096 tokens per request: 470.27x
(EngineCore pid=1) Free memory on device (139.29/139.8 GiB) on startup. Desired GPU memory \
utilization is (0.8, 111.84 GiB). Actual usage is 5.72 GiB for weight, 2.28 GiB for peak \
activation, 0.23 GiB for non-torch memory, and 0.04 GiB for CUDAGraph memory.
"""


ARGUMENTS = argparse.Namespace(
    geometry=GEOMETRY,
    preset="full",
    max_model_len=4096,
    max_num_seqs=8,
    max_num_batched_tokens=16384,
    tensor_parallel_size=1,
    gpu_memory_utilization=0.8,
)


def test_every_figure_is_found():
    found = {name: re.search(pattern, LOG)[1] for name, pattern in LOGGED.items()}
    assert found == {
        "model_gib": "5.72",
        "peak_while_loading_gib": "6.93",
        "block_tokens": "1312",
        "graphs_estimated_gib": "0.04",
        "cache_gib": "103.56",
        "cache_tokens": "1,926,237",
        "concurrency": "470.27",
        "total_gib": "139.8",
        "free_gib": "139.29",
        "budget_gib": "111.84",
        "activations_gib": "2.28",
        "outside_torch_gib": "0.23",
        "graphs_gib": "0.04",
    }


def test_the_plan_has_figures_beside_them():
    plan = planned(ARGUMENTS, 143771 * MIB, "0.26.0")
    assert plan["block_tokens"] == 1312
    assert plan["cache_gib"] == pytest.approx(103.56, rel=0.03)
    assert plan.keys() - LOGGED.keys() == {"blocks", "needs", "cache"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geometry", "/nope"], "'/nope' has no config.json"),
        (["--preset", "bf61"], "invalid choice: 'bf61'"),
        (["--output", "/nope/x.json"], "there is no folder '/nope'"),
        (["--max-num-seqs", "0"], "'0' is not a positive whole number"),
        (["--geometry", "EMPTY"], "cannot be planned: "),
    ],
)
def test_mistakes_are_said_before_the_engine_starts(
    arguments, message, tmp_path, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text("{}")
    arguments = [each.replace("EMPTY", str(tmp_path)) for each in arguments]
    monkeypatch.setattr(memory, "run_engine", lambda *_: pytest.fail("an engine was started"))
    assert message in said(capsys, memory.main, "--output", tmp_path / "x.json", *arguments)


def test_the_engine_is_ended_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "ENGINE", "import time; time.sleep(600)")
    started = []

    def interrupted(command, **options):
        process = start_engine(command, **options)
        wait = process.wait

        def once():
            process.wait = wait
            raise KeyboardInterrupt

        process.wait = once
        started.append(process)
        return process

    monkeypatch.setattr(memory, "start_engine", interrupted)
    with pytest.raises(KeyboardInterrupt):
        memory.run_engine(ARGUMENTS, tmp_path / "engine.log")
    assert [process.returncode for process in started] == [-signal.SIGKILL]


@pytest.mark.parametrize("vllm", [{"error": ["no memory"], "status": 1}, {"cache_gib": 100.0}])
def test_the_status_is_that_of_the_engine(vllm, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "run_engine", lambda *_: vllm)
    output = tmp_path / "x.json"
    assert memory.main(["--output", str(output)]) == ("error" in vllm)
    written = json.loads(output.read_text())
    assert written["vllm"] == vllm
    assert written["plan_over_vllm"].keys() == vllm.keys() & {"cache_gib"}
