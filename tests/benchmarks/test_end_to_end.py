# SPDX-License-Identifier: Apache-2.0
"""The end-to-end benchmark: what its contestants are, whose turn it is, and the table."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.end_to_end import run, table
from benchmarks.end_to_end.contestants import NAMES, engine_options, environment
from tests.benchmarks.mistakes import said
from vllm_nanoquant.recipe import METHOD

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "end_to_end" / "results" / "h200-nano9b-contest.json"
FAKE_ENGINE = """
import json, pathlib, sys, time
given = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:])
name = (json.loads(given["engine"]).get("hf_overrides") or {}).get("quantization_config", {})
if name.get("preset") == "ssm":
    sys.exit("no memory is left")
print("Model loading took 6.50 GiB memory and 1.25 seconds")
print(given["ready"], flush=True)
turns = pathlib.Path(__file__).with_name("turns")
sys.stdin.readline()
with turns.open("a") as out:
    out.write("(")
time.sleep(0.2)
with turns.open("a") as out:
    out.write(")")
print("RESULT " + json.dumps({"start_seconds": 1.0}))
"""


def options(tmp_path, **changes):
    values = {
        "checkpoint": None,
        "geometry": tmp_path / "geometry",
        "max_model_len": 64,
        "batches": [1, 4],
        "tokens": 16,
        "prefill": [32],
        "only_load": False,
        "max_capture_size": None,
        "model_runner": None,
        "repeats": 1,
        "together": 3,
        "cache_gib": 2.0,
        "output": tmp_path / "result.json",
    }
    return argparse.Namespace(**(values | changes))


def test_contestants_differ_only_in_how_weights_are_stored(tmp_path):
    engines = [run.engine_arguments(options(tmp_path), name) for name in NAMES]
    differing = {"quantization", "hf_overrides"}
    common = [{k: v for k, v in engine.items() if k not in differing} for engine in engines]
    assert all(each == common[0] for each in common)
    assert common[0]["kv_cache_memory_bytes"] == 2 << 30
    assert (
        run.engine_arguments(options(tmp_path, together=1), "bf16")["gpu_memory_utilization"] > 0.5
    )


def test_our_presets_alone_get_a_cap_and_our_method():
    ours = engine_options("full", 32)
    assert ours["quantization"] == METHOD
    recipe = {"preset": "full", "max_capture_size": 32}
    assert ours["hf_overrides"]["quantization_config"] == recipe
    assert (
        "max_capture_size" not in engine_options("ssm", None)["hf_overrides"]["quantization_config"]
    )
    assert engine_options("bf16", 32) == {}
    assert engine_options("fp8", 32) == {"quantization": "fp8"}


def test_marlin_alone_is_vllms_int4_without_machete():
    assert engine_options("int4-marlin", None) == engine_options("int4-vllm", None)
    assert environment("int4-marlin") == {"VLLM_DISABLED_KERNELS": "MacheteLinearKernel"}
    assert environment("int4-vllm") == environment("balanced") == {}


def test_engines_start_at_once_and_are_measured_one_after_the_other(tmp_path, monkeypatch):
    (tmp_path / "engine.py").write_text(FAKE_ENGINE, encoding="utf-8")
    monkeypatch.setattr(run, "HERE", tmp_path)
    signals = []
    send = run.os.killpg
    monkeypatch.setattr(run.os, "killpg", lambda *sent: (signals.append(sent), send(*sent)))
    names = ["balanced", "ssm", "full"]
    found = dict(zip(names, run.measure(options(tmp_path), names), strict=True))
    assert found["balanced"]["weights_gib"] == 6.5
    assert found["full"]["load_seconds"] == 1.25
    assert found["ssm"]["status"] == 1
    assert "no memory is left" in found["ssm"]["error"][-1]
    assert (tmp_path / "turns").read_text() == "()()"
    processes = [process for process, number in signals if number == signal.SIGSTOP]
    assert len(set(processes)) == 3
    # All stand still before the first goes on, and each is ended.
    order = [number for _, number in signals]
    assert order == 3 * [signal.SIGSTOP] + 3 * [signal.SIGCONT] + 3 * [signal.SIGKILL]


def test_engines_that_wait_are_ended_with_the_run(tmp_path, monkeypatch):
    (tmp_path / "engine.py").write_text(FAKE_ENGINE, encoding="utf-8")
    monkeypatch.setattr(run, "HERE", tmp_path)
    started = []
    make = run.subprocess.Popen
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda *a, **k: started.append(make(*a, **k)) or started[-1]
    )
    measuring = run.measure(options(tmp_path), ["balanced", "full"])
    next(measuring)
    measuring.close()
    assert [process.returncode for process in started] == [0, -signal.SIGKILL]


TERMINATED = """
import json, sys, time
from argparse import Namespace
from pathlib import Path
from benchmarks.end_to_end import run
from benchmarks.end_to_end.processes import end_engines_when_terminated
def wait(engine):
    print(engine._process.pid, flush=True)
    time.sleep(600)
run.HERE = Path(sys.argv[1])
run.Engine.wait_until_ready = wait
end_engines_when_terminated()
options = json.loads(sys.argv[2]) | {"output": run.HERE / "result.json"}
next(run.measure(Namespace(**options), ["balanced"]))
"""


def test_engines_are_ended_when_the_run_is_terminated(tmp_path):
    (tmp_path / "engine.py").write_text("import time; time.sleep(600)", encoding="utf-8")
    given = {key: value for key, value in vars(options(tmp_path)).items() if key != "output"}
    given["geometry"] = str(given["geometry"])
    command = [sys.executable, "-c", TERMINATED, str(tmp_path), json.dumps(given)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as runs:
        assert runs.stdout
        engine = int(runs.stdout.readline())
        runs.terminate()
        assert runs.wait(60)
    with pytest.raises(ProcessLookupError):
        os.kill(engine, 0)


@pytest.mark.parametrize("memory", [" memory", ""])  # the second model runner leaves it out
def test_memory_is_what_vllm_logs(memory):
    line = f"INFO Model loading took 6.64 GiB{memory} and 19.758121 seconds"
    found = {name: re.findall(pattern, line) for name, pattern in run.LOGGED.items()}
    assert found["weights_gib"] == ["6.64"]
    assert found["load_seconds"] == ["19.758121"]


def test_a_missing_plugin_is_said_before_an_engine_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "entry_points", lambda **_: ())
    monkeypatch.setattr("sys.argv", ["run.py", "--output", str(tmp_path / "result.json")])
    with pytest.raises(SystemExit):
        run.main()
    assert "pip install ." in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_others_run_without_the_plugin(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "entry_points", lambda **_: ())
    failed = {"error": ["no memory is left"], "status": 1}
    monkeypatch.setattr(run, "measure", lambda _, names: [failed for _ in names])
    output = tmp_path / "result.json"
    assert run.main(["--output", str(output), "--contestants", "bf16", "fp8"]) == 1
    assert list(json.loads(output.read_text())["results"]) == ["bf16", "fp8"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--geometry", "/nope"], "argument --geometry: '/nope' has no config.json; there are"),
        (["--checkpoint", "/nope"], "--checkpoint: '/nope' has no config.json"),
        (["--batches", "1", "0"], "argument --batches: '0' is not a positive whole number"),
        (["--together", "0"], "argument --together: '0' is not a positive whole number"),
        (["--output", "/nope/x.json"], "argument --output: there is no folder '/nope'"),
        (["--tokens", "1"], "--tokens 1: the first is not timed, so give 2 or more"),
        (["--cache-gib", "0"], "--cache-gib 0.0: give more than 0"),
        (["--prefill", "4096"], "--prefill: 4097 tokens; give --max-model-len 4097 or more"),
        (["--tokens", "5000"], "--tokens: 5032 tokens; give --max-model-len 5032 or more"),
    ],
)
def test_mistakes_are_said_before_an_engine_starts(
    arguments, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run, "measure", lambda *_: pytest.fail("an engine was started"))
    given = ["--output", tmp_path / "x.json", "--contestants", "bf16", *arguments]
    assert message in said(capsys, run.main, *given)


def test_a_result_says_how_it_was_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    figures = {
        "decode_tokens_per_second": {"2": {"median": 90.0, "min": 88.0, "max": 95.0}},
        "time_to_first_token_ms": {"64": {"median": 5.0, "min": 4.0, "max": 6.0}},
    }
    monkeypatch.setattr(run, "measure", lambda _, names: [figures for _ in names])
    output = tmp_path / "result.json"
    arguments = ["--output", str(output), "--contestants", "bf16", "--batches", "2", "--prefill"]
    arguments += ["64", "--repeats", "5", "--max-model-len", "512", "--model-runner", "2"]
    assert run.main(arguments) == 0
    said = capsys.readouterr()
    assert "no CUDA GPU" in said.err and "say nothing about one" in said.err
    problem = json.loads(output.read_text())["problem"]
    assert problem == {
        "geometry": "nemotron-nano-9b-v2",
        "weights": "dummy",
        "prompt_tokens": 32,
        "decode_tokens": 128,
        "max_capture_size": None,
        "started_at_once": 1,
        "only_load": False,
        "batches": [2],
        "prefill": [64],
        "repeats": 5,
        "max_model_len": 512,
        "max_num_seqs": 2,
        "cache_gib": None,
        "model_runner": 2,
    }
    # vLLM for CPUs does not log its memory.
    assert table.main([str(output)]) == 0
    said = capsys.readouterr().out
    assert "| BF16 | **90** (88-95) |" in said and "| BF16 | - | - |" in said
    assert run.main([*arguments, "--together", "2", "--cache-gib", "3", "--only-load"]) == 0
    changed = json.loads(output.read_text())["problem"]
    assert (changed["cache_gib"], changed["batches"], changed["prefill"]) == (3.0, [], [])
    assert changed["only_load"] and changed["max_num_seqs"] == 2


def test_the_length_of_a_prompt_is_the_engines():
    from benchmarks.end_to_end.engine import PROMPT

    assert run.PROMPT_TOKENS == PROMPT


def test_a_table_names_who_failed(tmp_path):
    found = {"ssm": {"error": ["no memory is left"], "status": 1}}
    assert "| ssm | failed |" in run.table(found, [1], [32])


def test_the_committed_table_is_that_of_the_committed_results(capsys):
    page = ROOT / "docs" / "benchmarks.md"
    assert table.main([str(RESULT), "--check", str(page)]) == 0, capsys.readouterr().out


def test_the_table_marks_the_best_and_names_who_did_not_run(capsys, tmp_path):
    report = json.loads(RESULT.read_text("utf-8"))
    report["results"]["fp8"] = {"error": ["no"], "status": 1}
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(report), encoding="utf-8")
    assert table.main([str(changed)]) == 0
    said = capsys.readouterr().out
    assert "Did not run: vLLM's FP8." in said
    rates = {
        name: row["decode_tokens_per_second"]["1"]["median"]
        for name, row in report["results"].items()
        if name != "fp8"
    }
    best = max(rates, key=lambda name: rates[name])
    line = next(line for line in said.splitlines() if line.startswith(f"| {table.label(best)} |"))
    assert line.split("|")[2].strip().startswith(f"**{rates[best]:.0f}**")


def test_the_table_marks_figures_that_were_disturbed(capsys, tmp_path):
    report = json.loads(RESULT.read_text("utf-8"))
    rate = report["results"]["bf16"]["decode_tokens_per_second"]["1"]
    changed = tmp_path / "changed.json"
    for most, marked in ((1.14, False), (1.16, True)):
        rate |= {"min": rate["median"], "max": rate["median"] * most}
        changed.write_text(json.dumps(report), encoding="utf-8")
        assert table.main([str(changed)]) == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| BF16 |"))
        assert line.split("|")[2].strip().endswith("†") == marked


def test_a_result_file_that_is_none_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "none.json")])
    assert "none.json" in capsys.readouterr().err


def test_a_worker_without_such_a_graph_replays_nothing():
    from benchmarks.end_to_end.engine import replay_graph

    descriptor = namedtuple("Descriptor", "num_tokens")(4)
    graph = SimpleNamespace(replay=lambda: pytest.fail("a graph of another size was replayed"))
    entries = {descriptor: SimpleNamespace(cudagraph=graph)}

    def worker(model):
        return SimpleNamespace(model_runner=SimpleNamespace(model=model))

    assert replay_graph(worker(SimpleNamespace(concrete_cudagraph_entries=entries)), 8, 2) == []
    assert replay_graph(worker(SimpleNamespace()), 8, 2) == []
    # vLLM's second model runner holds the graphs itself.
    second = worker(SimpleNamespace())
    second.model_runner.cudagraph_manager = SimpleNamespace(graphs={descriptor: graph})
    assert replay_graph(second, 8, 2) == []


def test_a_graph_of_either_model_runner_is_replayed(monkeypatch):
    from benchmarks.end_to_end.engine import replay_graph

    event = SimpleNamespace(
        record=lambda: None, synchronize=lambda: None, elapsed_time=lambda end: 25.0
    )
    monkeypatch.setattr("torch.cuda.Event", lambda enable_timing: event)
    replayed = []
    descriptor = namedtuple("Descriptor", "num_tokens")(4)
    graph = SimpleNamespace(replay=lambda: replayed.append(4))
    entries = {descriptor: SimpleNamespace(cudagraph=graph)}
    first = SimpleNamespace(model=SimpleNamespace(concrete_cudagraph_entries=entries))
    second = SimpleNamespace(cudagraph_manager=SimpleNamespace(graphs={descriptor: graph}))
    for runner in (first, second):
        replayed.clear()
        assert replay_graph(SimpleNamespace(model_runner=runner), 4, 2) == [2.5, 2.5]
        assert len(replayed) == 30  # the first ten do not count


def test_prefill_is_taken_off_by_its_median():
    from benchmarks.end_to_end.engine import decode_rate

    taken = iter([9.0, 0.1, 1.1, 0.9, 1.6, 0.1, 0.6])  # the second prefill was disturbed

    class Model:
        def generate(self, batch, sampling, use_tqdm):
            clock[0] += next(taken)

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("benchmarks.end_to_end.engine.time.perf_counter", lambda: clock[0])
        rate = decode_rate(Model(), batch_size=2, tokens=51, repeats=3)
    assert rate == pytest.approx({"median": 100.0, "min": 100 / 1.5, "max": 200.0})


@pytest.mark.parametrize("runner", [1, 2])
def test_the_model_runner_is_chosen_and_recorded(tmp_path, monkeypatch, runner):
    says = """
import os
if os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1":
    print("Using V2 Model Runner")
"""
    (tmp_path / "engine.py").write_text(says + FAKE_ENGINE, encoding="utf-8")
    monkeypatch.setattr(run, "HERE", tmp_path)
    (figures,) = run.measure(options(tmp_path, model_runner=runner), ["balanced"])
    assert figures["model_runner"] == runner
