# SPDX-License-Identifier: Apache-2.0
"""What the harness is asked, and what is made of its answers; the harness is a fake."""

import statistics

import pytest

from vllm_nanoquant.evaluation import harness
from vllm_nanoquant.evaluation.errors import EvaluationError, SuiteError
from vllm_nanoquant.evaluation.suite import HarnessTask

from .fakes import FakeBackend, FakeHarness


@pytest.fixture(autouse=True)
def no_index():
    harness._index.cache_clear()
    yield
    harness._index.cache_clear()


def task(**keys):
    given = {"kind": "harness", "name": "t", "harness": "x", "metrics": {"exact_match": {}}}
    return HarnessTask.model_validate(given | keys)


SAMPLED = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 300, "stop": []}


def run(monkeypatch, scores, *, limit=None, backend=None, seed=5, chosen="none", **keys):
    fake = FakeHarness(monkeypatch, scores, chosen=chosen)
    backend = backend or FakeBackend()
    if "sampling" in keys:
        fake.output = backend.output
    return fake, harness.run_task(task(**keys), backend, seed, limit, None)


def test_one_run(monkeypatch):
    fake, result = run(monkeypatch, [{"x": [1.0, 0.0, 1.0, 1.0]}], limit=4, mode="plain", fewshot=3)
    (asked,) = fake.calls
    assert (asked["tasks"], asked["limit"], asked["num_fewshot"]) == (["x"], 4, 3)
    assert (asked["gen_kwargs"], asked["apply_chat_template"]) == (None, False)
    assert "confirm_run_unsafe_code" not in asked
    figure = result.figures["exact_match"]
    assert (figure.value, figure.runs, figure.documents) == (0.75, [0.75], {"x": [1, 0, 1, 1]})
    assert figure.stderr == pytest.approx(statistics.stdev([1, 0, 1, 1]) / 2)
    assert (result.documents, result.repeats, result.output) == (4, 1, None)


def test_repeats_have_other_seeds_and_are_averaged_by_document(monkeypatch):
    scores = [{"x": [1.0, 0.0, 1.0]}, {"x": [1.0, 1.0, 1.0]}]
    fake, result = run(monkeypatch, scores, repeats=2, sampling=SAMPLED, system="/think")
    assert [call["gen_kwargs"] for call in fake.calls] == [
        {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_gen_toks": 300,
         "seed": seed, "until": []} for seed in (5, 6)
    ]  # fmt: skip
    assert {call["system_instruction"] for call in fake.calls} == {"/think"}
    assert all(call["apply_chat_template"] for call in fake.calls)
    figure = result.figures["exact_match"]
    assert figure.value == pytest.approx(5 / 6)
    assert figure.runs == pytest.approx([2 / 3, 1])
    assert figure.documents == {"x": [1.0, 0.5, 1.0]}
    assert figure.stderr == pytest.approx(statistics.stdev([1, 0.5, 1]) / 3**0.5)
    assert figure.run_stderr == pytest.approx(statistics.stdev([2 / 3, 1]) / 2**0.5)
    assert (result.output.answers, result.output.tokens, result.output.truncated) == (2, 300, 1)
    assert len(fake.indices) == 1
    # An engine counts the next task's answers in the same place.
    fake.output.answers = 0
    assert result.output.answers == 2


def test_greedy_keeps_the_stop_texts_of_the_task(monkeypatch):
    fake, _ = run(monkeypatch, [{"x": [1.0, 0.0]}], sampling={"max_tokens": 9})
    asked = fake.calls[0]["gen_kwargs"]
    assert asked["do_sample"] is False
    assert "until" not in asked


def test_several_tasks_count_as_one(monkeypatch):
    scores = [{"x": [1.0, 0.0], "y": [1.0, 1.0, 1.0, 0.0]}]
    fake, result = run(monkeypatch, scores, harness=["x", "y"], lengths=[4096])
    figure = result.figures["exact_match"]
    assert figure.value == pytest.approx((0.5 + 0.75) / 2)
    assert result.documents == 6
    assert fake.indices == [
        {"include_path": None, "include_defaults": True,
         "metadata": {"max_seq_lengths": [4096], "tokenizer": "the tokenizer"}}
    ]  # fmt: skip


def test_the_filter_is_the_one_asked_for(monkeypatch):
    metrics = {"exact_match": {"filter": "flexible", "higher_is_better": False}}
    _, result = run(monkeypatch, [{"x": [1.0, 0.0]}], chosen="flexible", metrics=metrics)
    figure = result.figures["exact_match"]
    assert (figure.value, figure.higher_is_better) == (0.5, False)
    with pytest.raises(EvaluationError, match="no metric 'exact_match' with filter 'none'; it has"):
        run(monkeypatch, [{"x": [1.0, 0.0]}], chosen="flexible")
    with pytest.raises(EvaluationError, match=r"it has exact_match,none: correct metrics\.acc in"):
        run(monkeypatch, [{"x": [1.0, 0.0]}], metrics={"acc": {}})


@pytest.mark.parametrize("values", [[1.0, 0.0], [(1, 2), (3, 4)]])
def test_a_metric_that_is_no_mean_over_documents_has_no_error(monkeypatch, values):
    fake = FakeHarness(monkeypatch, [{"x": [1.0, 0.0]}])
    honest = fake.simple_evaluate

    def other(**asked):
        result = honest(**asked)
        result["results"]["x"]["exact_match,none"] = 0.9
        for sample, value in zip(result["samples"]["x"], values * 2, strict=True):
            sample["exact_match"] = value
        return result

    monkeypatch.setattr("lm_eval.simple_evaluate", other)
    figure = harness.run_task(task(), FakeBackend(), 0, None, None).figures["exact_match"]
    assert (figure.value, figure.stderr, figure.documents) == (0.9, None, None)


def test_what_has_no_room(monkeypatch):
    small = FakeBackend(context=300)
    with pytest.raises(SuiteError, match=r"task t: sampling\.max_tokens is 300, .* 300 tokens;"):
        run(monkeypatch, [{"x": [1.0]}], backend=small, sampling=SAMPLED)
    with pytest.raises(SuiteError, match=r"its prompts have 4096 tokens, .* room for 300; raise"):
        run(monkeypatch, [{"x": [1.0]}], backend=small, lengths=[4096])


def test_whatever_the_harness_raises_is_one_line(monkeypatch):
    fake = FakeHarness(monkeypatch, [{"x": [1.0]}])
    fake.error = KeyError("gpqa is gated\nsecond line")
    with pytest.raises(EvaluationError, match=r"task t: .* failed with KeyError: .*; the log"):
        harness.run_task(task(), FakeBackend(), 0, None, None)
    fake.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        harness.run_task(task(), FakeBackend(), 0, None, None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("no aiohttp"), r"task t: no aiohttp; pip install 'vllm-nanoquant\[eval\]'"),
        (OSError("no tokenizer.json\nhere"), r"use the model: no tokenizer.json; .* --tokenizer"),
        (EvaluationError("as it is"), "^as it is$"),
    ],
)
def test_a_model_that_the_harness_cannot_use(monkeypatch, error, said):
    FakeHarness(monkeypatch, [{"x": [1.0]}])
    backend = FakeBackend()

    def refuse(task):
        raise error

    monkeypatch.setattr(backend, "harness_model", refuse)
    with pytest.raises(EvaluationError, match=said):
        harness.run_task(task(), backend, 0, None, None)


def test_names_are_looked_up_first(monkeypatch, tmp_path):
    FakeHarness(monkeypatch, [{"x": [1.0]}])
    harness.check_names([task()], tmp_path)
    with pytest.raises(SuiteError, match="task t: lm-evaluation-harness has no task 'livecode'"):
        harness.check_names([task(harness=["x", "livecode"])], None)
    with pytest.raises(SuiteError, match=r"--task-folder .* is not a folder that exists"):
        harness.check_names([task()], tmp_path / "nowhere")


def test_the_harness_own_tasks_are_only_read_where_they_are_needed(monkeypatch, tmp_path):
    fake = FakeHarness(monkeypatch, [{"x": [1.0]}], known=["x"])
    harness.check_names([task(), task(name="again")], tmp_path)
    assert [index["include_defaults"] for index in fake.indices] == [False]


def test_without_the_harness(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(SuiteError, match=r"not installed; pip install 'vllm-nanoquant\[eval\]'"):
        harness.check_installed()
