# SPDX-License-Identifier: Apache-2.0
"""Suites: the shipped ones, and what is said of wrong ones."""

import time

import pytest
import yaml

from vllm_nanoquant.evaluation import suite
from vllm_nanoquant.evaluation.errors import SuiteError

HARNESS = {"kind": "harness", "name": "a", "harness": "arc", "metrics": {"acc": {}}}
TEXT = {"kind": "text", "name": "t"}


def loaded(tmp_path, *tasks, **rest):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"tasks": list(tasks), **rest}))
    return suite.load(str(path))


def test_the_shipped_suites():
    assert suite.shipped_names() == ["long-context", "offline", "reasoning"]
    tasks = {
        task.name: task for name in suite.shipped_names() for task in suite.load(name).suite.tasks
    }
    assert list(tasks) == [
        *("ruler-4k", "ruler-32k", "heldout", "math-500", "gpqa-diamond", "aime-2025", "ifeval")
    ]
    for name in ("math-500", "gpqa-diamond", "aime-2025", "ifeval"):
        sampling = tasks[name].sampling
        assert (sampling.temperature, sampling.top_p, sampling.stop) == (0.6, 0.95, [])
        assert tasks[name].think_end == "</think>"
        assert tasks[name].system.startswith("/think")
        assert all(metric.threshold == 99 for metric in tasks[name].metrics.values())
    assert tasks["aime-2025"].repeats == 8
    assert len(tasks["ruler-4k"].harness) == 13
    assert (tasks["ruler-32k"].lengths, list(tasks["ruler-32k"].metrics)) == ([32768], ["32768"])


def test_what_nothing_is_said_of(tmp_path):
    (task,) = loaded(tmp_path, HARNESS).suite.tasks
    assert task.harness == ["arc"]
    assert task.metrics["acc"].threshold == 99
    assert (task.repeats, task.mode, task.sampling, task.fewshot) == (1, "chat", None, None)


WRONG = [
    ({**HARNESS, "repeat": 2}, "unknown key tasks.0.repeat; did you mean 'repeats'? known: kind"),
    ({**HARNESS, "sampling": {"temprature": 1}}, "tasks.0.sampling.temprature; did you mean"),
    ({**HARNESS, "sampling": {"temperature": -1}}, "tasks.0.sampling.temperature = -1: Input"),
    ({**HARNESS, "metrics": {"acc": {"treshold": 9}}}, "metrics.acc.treshold; did you mean 'thres"),
    ({**HARNESS, "metrics": {"acc": {"threshold": 101}}}, "acc.threshold = 101: Input should be"),
    ({**HARNESS, "metrics": {}}, "tasks.0.metrics: Dictionary should have at least 1 item"),
    ({**HARNESS, "mode": "talk"}, "tasks.0.mode = talk: Input should be 'chat', 'template' or"),
    ({**HARNESS, "repeats": 2}, "tasks.0: repeats above 1 need a temperature above 0"),
    ({**HARNESS, "name": "../x"}, "tasks.0.name = ../x: String should match pattern"),
    ({"kind": "harness", "name": "a"}, "tasks.0.harness is missing; add it"),
    ({"name": "a"}, "tasks.0.kind must be 'harness' or 'text'; add or correct it"),
    ({**TEXT, "kind": "music"}, "tasks.0.kind must be 'harness' or 'text'"),
    ({**TEXT, "window": 1}, "tasks.0.window = 1: Input should be greater than or equal to 2"),
    ({**TEXT, "thresholds": {"acc": 9}}, "tasks.0.thresholds.acc"),
    ({**HARNESS, "trust_remote_code": True}, "tasks.0.trust_remote_code: a suite cannot switch"),
    ({**TEXT, "x": [{"y": {"trust_remote_code": False}}]}, "tasks.0.x.0.y.trust_remote_code"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "said"), WRONG)
def test_a_wrong_task_is_told_by_file_key_and_way_out(tmp_path, task, said):
    with pytest.raises(SuiteError) as error:
        loaded(tmp_path, task)
    assert str(error.value).startswith(f"{tmp_path}/own.yaml: ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_suites(tmp_path):
    with pytest.raises(SuiteError, match="two tasks are named 'a'; results are kept by name"):
        loaded(tmp_path, HARNESS, HARNESS)
    with pytest.raises(SuiteError, match="unknown key sed; did you mean 'seed'"):
        loaded(tmp_path, HARNESS, sed=1)
    with pytest.raises(SuiteError, match="tasks: List should have at least 1 item"):
        loaded(tmp_path)
    with pytest.raises(SuiteError, match="there is no suite 'resoning'; shipped are long-context"):
        suite.load("resoning")
    with pytest.raises(SuiteError, match=r"none\.yaml: No such file or directory; give a suite's"):
        suite.load(str(tmp_path / "none.yaml"))
    path = tmp_path / "own.yaml"
    for content, said in (
        ("tasks: [", "is not YAML: while parsing"),
        ("[1]", "holds no mapping; a suite begins with the key tasks"),
        ("a: !!python/object/apply:os.abort []", "is not YAML: could not determine"),
        ("tasks: 1 #" + "x" * (1 << 20), "are too many for a suite"),
    ):
        path.write_text(content)
        with pytest.raises(SuiteError) as error:
            suite.load(str(path))
        assert said in str(error.value)


def test_a_bomb_of_aliases_is_refused_at_once(tmp_path):
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "own.yaml").write_text("\n".join(["l0: &l0 [x]", *levels, "tasks: *l29"]))
    start = time.monotonic()
    with pytest.raises(SuiteError):
        suite.load(str(tmp_path / "own.yaml"))
    assert time.monotonic() - start < 5


def test_the_digest_changes_with_all_but_thresholds(tmp_path):
    def digest(task, seed=0):
        return suite.task_digest(loaded(tmp_path, task).suite.tasks[0], seed)

    first = digest(HARNESS)
    assert digest({**HARNESS, "metrics": {"acc": {"threshold": 50}}}) == first
    text = digest(TEXT)
    assert digest({**TEXT, "thresholds": {"accuracy": 50}}) == text
    others = [
        digest(HARNESS, seed=1),
        text,
        digest({**TEXT, "window": 9}),
        digest({**HARNESS, "metrics": {"acc": {"filter": "x"}}}),
        digest({**HARNESS, "sampling": {"top_p": 0.5}}),
        digest({**HARNESS, "fewshot": 0}),
        digest({**HARNESS, "system": "/think"}),
    ]
    assert len({first, *others}) == 1 + len(others)
