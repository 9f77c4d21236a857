# SPDX-License-Identifier: Apache-2.0
"""The real harness and the real vLLM: in process in BF16, then through a server in int4."""

import json
import math
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from _server import Server

from tests.serving.engines import METHOD

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval"),
]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "results" / "tiny-perplexity.json"
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 520,
    "max_num_seqs": 8,
    "enforce_eager": True,
    "enable_prefix_caching": False,
}
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 12, "stop": []}
TASKS = [
    {"kind": "text", "name": "heldout", "window": 512},
    {"kind": "harness", "name": "which", "harness": "which_word", "mode": "plain",
     "metrics": {"acc": {}}},
    {"kind": "harness", "name": "chat", "harness": "next_words", "mode": "chat",
     "system": "/think", "think_end": "</think>", "repeats": 2, "sampling": SAMPLING,
     "metrics": {"chrf": {"threshold": 1}}},
    {"kind": "harness", "name": "template", "harness": "next_words", "mode": "template",
     "sampling": {"max_tokens": 12}, "metrics": {"chrf": {"threshold": 1}}},
]  # fmt: skip
COMMON = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "target_delimiter": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """A suite, and two tasks for the harness: 6 prompts out of the held-out text."""
    folder = tmp_path_factory.mktemp("evaluation")
    words = (tiny_model / "heldout.txt").read_text(encoding="utf-8").split()
    documents = []
    for start in range(0, 600, 100):
        *prompt, last = words[start : start + 30]
        rest = " ".join(words[start + 30 : start + 40])
        choices = [f" {last}", " xylophone"]
        documents.append(
            {"prompt": " ".join(prompt), "rest": f" {last} {rest}", "choices": choices}
        )
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
    for name, keys, metric in (
        ("which_word", {"output_type": "multiple_choice", "doc_to_choice": "choices",
                        "doc_to_target": 0}, "acc"),
        ("next_words", {"output_type": "generate_until", "doc_to_target": "{{rest}}",
                        "generation_kwargs": {"until": ["zebra"]}}, "chrf"),
    ):  # fmt: skip
        task = {"task": name, "metric_list": [{"metric": metric}], **COMMON, **files, **keys}
        (folder / "tasks").mkdir(exist_ok=True)
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    (folder / "own.yaml").write_text(yaml.safe_dump({"tasks": TASKS}))
    return folder


def evaluate(folder, tiny_model, output, *arguments):
    """Exit status and result of a command in a process of its own."""
    given = ["own.yaml", "--task-folder", "tasks", "--output", output]
    given += ["--text", str(tiny_model / "heldout.txt"), "--json", *arguments]
    done = subprocess.run(
        [sys.executable, "-m", "vllm_nanoquant", "eval", *given],
        cwd=folder,
        env=os.environ
        | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
        | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stdout, done.stderr[-8000:]
    try:
        return done.returncode, json.loads(done.stdout)
    except ValueError:
        raise AssertionError(done.stdout + done.stderr[-8000:]) from None


def figure(result, task, metric):
    return result["tasks"][task]["figures"][metric]


@pytest.fixture(scope="module")
def bf16(folder, tiny_model):
    """In process, not quantized."""
    arguments = ["--model", str(tiny_model), "--recipe", "none", "--engine", json.dumps(ENGINE)]
    status, result = evaluate(folder, tiny_model, "bf16", *arguments)
    assert status == 0
    return result


@pytest.fixture(scope="module")
def int4(folder, tiny_model, bf16):
    """Through a server, with the default recipe, and beside BF16."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["--model", str(tiny_model), "--port", str(port), "--host", "127.0.0.1"]
    arguments += ["--quantization", METHOD, "--max-model-len", "520", "--max-num-seqs", "8"]
    arguments += ["--enforce-eager", "--no-enable-prefix-caching", "--dtype", "bfloat16"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments]
    url = f"http://127.0.0.1:{port}"
    with Server(command, folder / "server.log", f"{url}/health") as server:
        server.wait("starting vLLM", 300)
        baseline = ["--baseline", "bf16/results.json"]
        status, result = evaluate(folder, tiny_model, "int4", "--base-url", url, *baseline)
    assert status == 0, result
    return result


@pytest.mark.parametrize(("fixture", "recipe"), [("bf16", "bf16"), ("int4", "balanced")])
def test_figures(request, fixture, recipe):
    result = request.getfixturevalue(fixture)
    benchmark = json.loads(BENCHMARK.read_text())["results"][recipe]
    heldout = figure(result, "heldout", "perplexity")
    assert heldout["value"] == pytest.approx(benchmark["perplexity"], rel=1e-3)
    assert result["tasks"]["heldout"]["documents"] * 511 == benchmark["tokens"]
    assert 0.33 < figure(result, "heldout", "accuracy")["value"] < 0.38
    # No likely word of Austen's: the harness scores the model's own logprobs rightly.
    assert figure(result, "which", "acc")["value"] == 1
    for task, answers in (("chat", 12), ("template", 6)):
        output = result["tasks"][task]["output"]
        assert output["answers"] == answers
        assert 1 <= output["mean_tokens"] <= 12
        assert figure(result, task, "chrf")["value"] > 5
    assert len(figure(result, "chat", "chrf")["runs"]) == 2


def test_recovery(bf16, int4):
    found = {(entry["task"], entry["metric"]): entry for entry in int4["recovery"]}
    assert len(found) == 5
    recovered = found["heldout", "perplexity"]["recovery"]
    ratio = [figure(run, "heldout", "perplexity")["value"] for run in (bf16, int4)]
    assert recovered["percent"] == pytest.approx(100 * ratio[0] / ratio[1])
    # By pairs of windows the error is far smaller than that of either figure.
    assert 0 < recovered["stderr"] < 0.3
    assert math.isclose(found["which", "acc"]["recovery"]["percent"], 100)


def test_conditions(bf16, int4):
    assert bf16["served"]["through"] == "engine"
    assert (bf16["served"]["quantization"], bf16["served"]["engine"]) == (None, ENGINE)
    assert int4["served"]["through"] == "server"
    assert int4["served"]["max_model_len"] == 520
    for result in (bf16, int4):
        assert result["tasks"]["chat"]["conditions"]["versions"]["lm_eval"]
