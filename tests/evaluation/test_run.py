# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation on a fake model: resuming, conditions, baselines, exit status."""

import json
import math

import pytest
import yaml

from tests.serving.engines import heldout_windows
from vllm_nanoquant.cli import evaluate as command
from vllm_nanoquant.cli.main import main
from vllm_nanoquant.evaluation import harness, text

from .fakes import FakeBackend, FakeHarness

TEXT = {"kind": "text", "name": "first", "window": 16, "text": "own.txt"}
HARNESS = {
    "kind": "harness",
    "name": "second",
    "harness": "x",
    "metrics": {"exact_match": {"threshold": 90}},
    "sampling": {"max_tokens": 64},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A suite and its text in the folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    write_suite(TEXT)
    (tmp_path / "own.txt").write_text("abcdefgh" * 20)
    return tmp_path


def write_suite(*tasks, name="own.yaml"):
    with open(name, "w") as file:  # noqa: PTH123
        yaml.safe_dump({"tasks": list(tasks)}, file)


@pytest.fixture
def go(folder, monkeypatch, capsys):
    """Runs `nanoquant eval` on a fake model; gives exit status, output and errors."""
    harness._index.cache_clear()

    def run(*arguments, backend=None):
        backend = backend or FakeBackend()
        monkeypatch.setattr(command, "_backend", lambda options, for_harness: backend)
        status = main(["eval", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def stored(folder, name="results.json"):
    return json.loads((folder / name).read_text())


def test_a_text_is_scored_and_written(go, folder):
    backend = FakeBackend(loss=3.0)
    status, out, err = go("own.yaml", "--output", "out", backend=backend)
    assert (status, err) == (0, "first: running\n")
    assert [len(window) for window in backend.scored] == [16] * 9
    assert bytes(backend.scored[1]) == b"abcdefgh" * 2
    result = stored(folder, "out/results.json")
    task = result["tasks"]["first"]
    losses = [3.0 + i / 10 for i in range(9)]
    assert task["figures"]["perplexity"]["documents"]["windows"] == pytest.approx(losses)
    assert task["figures"]["perplexity"]["value"] == pytest.approx(math.exp(3.4))
    assert task["figures"]["accuracy"]["value"] == pytest.approx(5 / 15)
    assert task["documents"] == 9
    assert f"{math.exp(3.4):.4f}" in out
    assert "written to out/results.json" in out
    assert result["served"] == {"through": "fake", "model": "fake"}
    assert len(result["suite"]["sha256"]) == 64
    assert set(task["conditions"]) == {
        *("task_digest", "limit", "text_sha256", "label", "served", "versions")
    }
    assert task["conditions"]["versions"]["vllm-nanoquant"]
    assert task == stored(folder, "out/tasks/first.json")
    assert sorted(path.name for path in (folder / "out").rglob("*")) == [
        *("first.json", "results.json", "tasks")
    ]


def test_windows_are_those_of_the_benchmarks(tiny_model):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    ids = tokenizer.encode((tiny_model / "heldout.txt").read_text(), add_special_tokens=False).ids
    for window in (128, 512):
        assert text.cut(ids, window) == heldout_windows(tiny_model, window, 10**9)
    assert text.cut(list(range(9)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert text.cut(list(range(8)), 4) == [[0, 1, 2, 3]]


def test_a_text_of_the_command_line_and_a_limit(go, folder):
    (folder / "other.txt").write_text("z" * 100)
    backend = FakeBackend()
    go("own.yaml", "--output", "out", "--text", "other.txt", "--limit", 3, backend=backend)
    assert [bytes(window) for window in backend.scored] == [b"z" * 16] * 3
    conditions = stored(folder, "out/tasks/first.json")["conditions"]
    assert conditions["limit"] == 3
    go("own.yaml", "--output", "again")
    assert (
        stored(folder, "again/tasks/first.json")["conditions"]["text_sha256"]
        != (conditions["text_sha256"])
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text": None}, "first needs a text, and the suite names none; give one with --text"),
        ({"text": "gone.txt"}, "the text gone.txt is not a file that exists"),
        ({"window": 100}, "has 160 tokens, which is less than two windows of 100 and one more"),
        ({"window": 1000}, "needs room for one more, and there is room for 1000"),
    ],
)
def test_texts_that_cannot_be_scored(go, folder, change, said):
    write_suite({**TEXT, **change})
    status, _, err = go("own.yaml", "--output", "out", backend=FakeBackend(context=1000))
    assert status == 2
    assert said in err
    assert not (folder / "out/results.json").exists()


def test_a_text_that_is_not_utf8(go, folder):
    (folder / "own.txt").write_bytes(b"abc\xff")
    status, _, err = go("own.yaml", "--output", "out")
    assert (status, "own.txt is not UTF-8 (at byte 3); convert it" in err) == (2, True)


def test_what_has_a_result_is_not_run_again(go, folder, monkeypatch):
    fake = FakeHarness(monkeypatch, [{"x": [1.0, 0.0]}, {"x": [1.0, 1.0]}])
    fake.error = RuntimeError("the GPU is on fire")
    write_suite(TEXT, HARNESS)
    status, _, err = go("own.yaml", "--output", "out")
    assert status == 1
    assert "task second: lm-evaluation-harness failed with RuntimeError: the GPU is on fire" in err
    assert (folder / "out/tasks/first.json").exists()
    assert not (folder / "out/results.json").exists()

    fake.error, fake.calls, backend = None, [], FakeBackend()
    status, _, err = go("own.yaml", "--output", "out", backend=backend)
    assert (status, backend.scored) == (0, [])
    assert err == ("first: has a result already\nsecond: running\nthe harness prints\n")
    assert stored(folder, "out/results.json")["tasks"]["second"]["documents"] == 2

    backend = FakeBackend()
    assert go("own.yaml", "--output", "out", backend=backend)[0] == 0
    assert (backend.scored, len(fake.calls)) == ([], 1)
    status, _, err = go("own.yaml", "--output", "out", "--fresh", backend=backend)
    assert (status, len(backend.scored), len(fake.calls)) == (0, 9, 2)
    assert (
        stored(folder, "out/results.json")["tasks"]["second"]["figures"]["exact_match"]["value"]
        == 1
    )


def test_results_of_other_conditions_do_not_count(go, folder):
    assert go("own.yaml", "--output", "out", "--label", "BF16")[0] == 0
    for arguments, backend, said in (
        (["--label", "int4"], None, "(label: BF16 there, int4 here); choose another --output, or"),
        (["--label", "BF16", "--limit", 4], None, "(limit: None there, 4 here)"),
        (["--label", "BF16"], FakeBackend(name="m2"), "(served.model: fake there, m2 here)"),
    ):
        status, _, err = go("own.yaml", "--output", "out", *arguments, backend=backend)
        assert (status, said in err) == (2, True), err
    (folder / "own.txt").write_text("another text" * 20)
    status, _, err = go("own.yaml", "--output", "out", "--label", "BF16")
    assert (status, "text_sha256: " in err) == (2, True)
    assert go("own.yaml", "--output", "out", "--label", "BF16", "--fresh")[0] == 0


def test_a_changed_threshold_needs_no_new_run(go, folder):
    go("own.yaml", "--output", "out")
    write_suite({**TEXT, "thresholds": {"perplexity": 50}})
    backend = FakeBackend()
    assert go("own.yaml", "--output", "out", backend=backend)[0] == 0
    assert backend.scored == []


@pytest.mark.parametrize(
    ("loss", "thresholds", "status", "below"),
    [
        (2.0, {}, 0, []),
        (2.009, {}, 0, []),
        (2.011, {}, 1, ["perplexity"]),
        (2.011, {"perplexity": 98}, 0, []),
        (2.2, {"perplexity": 98}, 1, ["perplexity"]),
    ],
)
def test_recovery_and_its_exit_status(go, folder, loss, thresholds, status, below):
    write_suite({**TEXT, "thresholds": thresholds})
    go("own.yaml", "--output", "bf16", backend=FakeBackend(name="bf16"))
    arguments = ["own.yaml", "--output", "int4", "--baseline", "bf16/results.json"]
    found, out, _ = go(*arguments, backend=FakeBackend(loss=loss))
    assert found == status
    assert f"{100 * math.exp(2 - loss):.2f} ± 0.00 %" in out
    assert [line for line in out.splitlines() if line.startswith("below")] == [
        f"below the threshold: first, {metric}" for metric in below
    ]
    recovery = {entry["metric"]: entry for entry in stored(folder, "int4/results.json")["recovery"]}
    assert recovery["perplexity"]["recovery"]["percent"] == pytest.approx(100 * math.exp(2 - loss))
    assert recovery["perplexity"]["passed"] is not bool(below)
    assert recovery["accuracy"]["recovery"]["percent"] == 100


def test_a_baseline_of_0_is_never_enough(go, monkeypatch):
    FakeHarness(monkeypatch, [{"x": [0.0, 0.0]}, {"x": [1.0, 1.0]}])
    write_suite(HARNESS)
    go("own.yaml", "--output", "bf16")
    status, out, _ = go("own.yaml", "--output", "int4", "--baseline", "bf16/results.json")
    assert (status, "none: the baseline is 0" in out) == (1, True)


def test_baselines_that_cannot_be_compared_with_stop_it_before_it_runs(go, folder):
    go("own.yaml", "--output", "bf16")
    write_suite(TEXT, {**TEXT, "name": "more"}, name="more.yaml")
    write_suite({**TEXT, "window": 32}, name="other.yaml")
    good = stored(folder, "bf16/results.json")
    (folder / "damaged.json").write_text(json.dumps({**good, "tasks": {"first": {"a": 1}}}))
    (folder / "strange.json").write_text('{"results": 1}')
    (folder / "broken.json").write_text('{"results"')
    base = "bf16/results.json"
    for suite, file, rest, status, said in (
        ("own.yaml", base, ["--limit", 2], 2, "task first was another one there (limit is None"),
        ("other.yaml", base, [], 2, "task first was another one there (task_digest is"),
        ("more.yaml", base, [], 2, "has no task more; it has first"),
        ("own.yaml", "gone.json", [], 1, "gone.json: No such file or directory; give a result's"),
        ("own.yaml", "strange.json", [], 1, "is no result of nanoquant eval in format 1"),
        ("own.yaml", "broken.json", [], 1, "broken.json is not JSON"),
        ("own.yaml", "damaged.json", [], 1, "damaged.json is damaged, or no result"),
    ):
        backend = FakeBackend()
        found = go(suite, "--output", "int4", "--baseline", file, *rest, backend=backend)
        assert (found[0], said in found[2]) == (status, True), found
        assert backend.scored == []
    assert go("more.yaml", "--output", "int4", "--baseline", base, "--task", "first")[0] == 0


def test_the_length_of_answers_stands_beside_the_accuracy(go, folder, monkeypatch):
    fake, backend = FakeHarness(monkeypatch, [{"x": [1.0, 0.0]}]), FakeBackend()
    fake.output = backend.output
    write_suite(HARNESS)
    _, out, _ = go("own.yaml", "--output", "out", backend=backend)
    assert out.splitlines()[1].split() == [
        *("second", "exact_match", "0.5000", "0.5000", "2", "100", "100.0", "%")
    ]
    output = stored(folder, "out/results.json")["tasks"]["second"]["output"]
    assert output == {"answers": 1, "tokens": 100, "truncated": 1, "mean_tokens": 100}


def test_a_result_is_written_whole_or_not_at_all(go, folder, monkeypatch):
    go("own.yaml", "--output", "out")
    before = (folder / "out/results.json").read_bytes()

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("vllm_nanoquant.files._flush_to_disk", full)
    status, _, err = go("own.yaml", "--output", "out", "--fresh", "--label", "x")
    assert status == 1
    assert "No space left on device; run the same command again to go on" in err
    assert (folder / "out/results.json").read_bytes() == before


def test_json_is_the_result_file_and_nothing_else(go, folder, monkeypatch):
    FakeHarness(monkeypatch, [{"x": [1.0, 0.0]}])
    write_suite(HARNESS)
    status, out, _ = go("own.yaml", "--output", "out", "--json")
    assert (status, json.loads(out)) == (0, stored(folder, "out/results.json"))
    status, out, _ = go("own.yaml", "--output", "out", "--json", "--limit", 1)
    assert (status, list(json.loads(out))) == (2, ["error"])


def test_a_damaged_task_file(go, folder):
    go("own.yaml", "--output", "out")
    (folder / "out/tasks/first.json").write_text("{")
    status, _, err = go("own.yaml", "--output", "out")
    assert (status, "first.json is not JSON" in err) == (1, True)


def test_ctrl_c_says_how_to_go_on(go, monkeypatch):
    fake = FakeHarness(monkeypatch, [{"x": [1.0]}])
    fake.error = KeyboardInterrupt()
    write_suite(HARNESS)
    status, _, err = go("own.yaml", "--output", "out")
    assert (status, "interrupted; run the same command again to go on" in err) == (130, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "o"], "give SUITE and --output DIR, or --list"),
        (["offline"], "give SUITE and --output DIR, or --list"),
        (["offlin", "--output", "o"], "there is no suite 'offlin'"),
        (["offline", "--output", "o", "--task", "x"], "offline has no task x; it has heldout"),
        (["offline", "--output", "o"], "give either --base-url URL of a server or --model"),
        (["offline", "--output", "o", "--base-url", "http://a", "--model", "m"], "give either"),
        (["offline", "--output", "o", "--model", "m", "--tokenizer", "t"],
         "--tokenizer belongs to --base-url"),
        (["offline", "--output", "o", "--model", "m", "--served-model", "t"],
         "--served-model belongs to --base-url"),
        (["offline", "--output", "o", "--base-url", "http://a", "--recipe", "ssm"],
         "--recipe belongs to --model"),
        (["offline", "--output", "o", "--model", "m", "--engine", "[]"], "--engine is no JSON ob"),
        (["offline", "--output", "o", "--model", "m", "--engine", "{"], "--engine is not JSON"),
        (["offline", "--output", "o", "--model", "m", "--recipe", "fast"], "preset = 'fast'"),
        (["offline", "--output", "o", "--model", "m", "--recipe", '{"x": 1}'], "unknown option"),
        (["offline", "--output", "o", "--model", "m", "--recipe", "balanced"], "needs a text"),
        (["offline", "--output", "o", "--limit", "0"], "'0' is not a number of at least 1"),
        (["offline", "--output", "o", "--model", "m", "--engine", '{"trust_remote_code": true}'],
         "--engine trust_remote_code: no remote code runs here; remove it"),
    ],
)  # fmt: skip
def test_wrong_usage(folder, capsys, arguments, said):
    assert main(["eval", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not (folder / "o").exists()


def test_recipes(folder):
    (folder / "r.json").write_text('{"preset": "ssm", "group_size": 64}')
    assert command._recipe("none") is None
    assert command._recipe(None).model_dump(exclude_unset=True) == {}
    assert command._recipe("full").preset == "full"
    assert command._recipe(' {"group_size": 32}').group_size == 32
    assert command._recipe("r.json").group_size == 64


def test_the_list(capsys, folder):
    assert main(["eval", "--list"]) == 0
    out = capsys.readouterr().out
    for text_ in ("offline: perplexity", "aime-2025", "minerva_math500", "13 tasks", "ourselves"):
        assert text_ in out
    assert main(["eval", "own.yaml", "--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["own"]["tasks"][0]["window"] == 16
