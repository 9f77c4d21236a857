# SPDX-License-Identifier: Apache-2.0
"""Tables and plots of a small result file, written here by hand."""

import json
from pathlib import Path

import pytest

from benchmarks.kernels import plot, sections, table
from benchmarks.kernels.results import Results


def row(layer, tokens, name, us, group_size=128, error=1.4e-3):
    n, k = {"in_proj": (22656, 4480), "mlp_down": (4480, 15680)}[layer]
    times = {"us": us, "us_least": us - 1, "us_greatest": us + 1}
    return (
        {"layer": layer, "n": n, "k": k, "tokens": tokens, "peer": name}
        | times
        | {
            "group_size": group_size,
            "error": error,
        }
    )


RESULT = {
    "problem": {"group_size": 128},
    "device": {"name": "NVIDIA H200"},
    "packages": {"python": "3.12.1", "torch": "2.11.0", "vllm": "0.26.0"},
    "results": [
        row("in_proj", None, "read_floor", 15.0, None, None),
        row("in_proj", 1, "ours", 20.0),
        row("in_proj", 1, "bf16", 51.07, None),
        row("in_proj", 1, "marlin", 24.0),
        row("in_proj", 1, "machete", 30.0),
        row("in_proj", 512, "ours", 140.0),
        row("in_proj", 512, "bf16", 134.4, None),
        row("mlp_down", 1, "ours", 20.0, error=1.5e-3),
        row("mlp_down", 1, "bf16", 40.0, None),
        row("mlp_down", 1, "marlin", 54.0, 64),
    ],
    "refused": [
        {"layer": layer, "peer": "humming", "tokens": None, "reason": "cannot import | humming"}
        for layer in ("in_proj", "mlp_down")
    ],
    "not_measured": [],
    "complete": True,
}


@pytest.fixture
def result(tmp_path):
    path = tmp_path / "h200.json"
    path.write_text(json.dumps(RESULT))
    return path


def test_summary(result):
    text = sections.summary(Results.read(result))
    assert "`h200.json`: one NVIDIA H200 (torch 2.11.0, vLLM 0.26.0)." in text
    assert "Groups of 128. Marlin takes mlp_down in groups of 64 only." in text
    assert text.splitlines()[-4:] == [
        "| layer | N x K | 1 token | 512 |",
        "| --- | --- | --- | --- |",
        "| in_proj | 22656 x 4480 | **20.0** / 24.0 / 51.1 | 140 / - / **134** |",
        "| mlp_down | 4480 x 15680 | **20.0** / 54.0 / 40.0 | - / - / - |",
    ]


def test_full_tables(result):
    text = sections.full(Results.read(result))
    # Geometric means: sqrt(24 / 20 * 54 / 20) and sqrt(51.07 / 20 * 40 / 20).
    assert "| gain over | 1 to 8 tokens | 129 to 8192 tokens |" in text
    assert "| Marlin | 1.80 | - |" in text
    assert "| BF16 (cuBLAS) | 2.26 | 0.96 |" in text
    assert "| layer | floor, us | 1 token |" in text and "| in_proj | 15.0 | 75 % |" in text
    assert "in_proj, 22656 x 4480, microseconds:" in text
    assert "| Machete | 30.0 | - |" in text
    assert "| Marlin, groups of 64 | 54.0 |" in text
    assert "ours 1.5e-03" in text
    assert "- Humming, in_proj, mlp_down: cannot import \\| humming" in text


def test_check_fails_when_stale_and_write_puts_it_right(result, tmp_path, capsys):
    readme, docs = tmp_path / "README.md", tmp_path / "benchmarks.md"
    for path in (readme, docs):
        path.write_text(f"before\n{table.BEGIN}\n{table.END}\nafter\n")

    assert table.main([str(result), "--check", str(readme), str(docs)]) == 1
    assert f"{readme}: is not up to date" in capsys.readouterr().out
    assert readme.read_text().count("\n") == 4
    assert table.main([str(result), "--write", str(readme), str(docs)]) == 0
    assert table.main([str(result), "--check", str(readme), str(docs)]) == 0
    assert readme.read_text().startswith(f"before\n{table.BEGIN}\nMade by")
    assert docs.read_text().endswith(f"\n{table.END}\nafter\n")
    assert "gain over" in docs.read_text() and "gain over" not in readme.read_text()

    result.write_text(json.dumps(RESULT | {"complete": False}))
    assert table.main([str(result), "--check", str(readme)]) == 1
    docs.write_text(docs.read_text().replace("| 1.80 |", "| 2.80 |"))
    assert table.main([str(result), "--check", str(docs)]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("{", "is not a result of run.py"),
        ('{"results": [{}]}', "is not a result of run.py"),
    ],
)
def test_a_wrong_result_file_is_named(content, message, tmp_path, capsys):
    path = tmp_path / "result.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit):
        table.main([str(path)])
    error = capsys.readouterr().err
    assert message in error and str(path) in error


def test_a_file_without_markers_is_named(result, tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text("nothing here")
    with pytest.raises(SystemExit):
        table.main([str(result), "--write", str(path)])
    assert f"{path}: it needs one line {table.BEGIN}" in capsys.readouterr().err


def test_plots_are_the_same_each_time_and_small(result, tmp_path):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        assert plot.main([str(result), "--output", str(folder)]) == 0
    for name in (plot.TIMES, plot.SHARES):
        content = (first / name).read_bytes()
        assert content == (second / name).read_bytes()
        assert b"in_proj, 22656 x 4480" in content and b"dc:date" not in content
        assert len(content) < 300_000


def test_the_tables_of_the_repository_are_up_to_date():
    root = Path(__file__).parents[2]
    result = root / "benchmarks/kernels/results/h200.json"
    files = [str(root / "README.md"), str(root / "docs/benchmarks.md")]
    assert table.main([str(result), "--check", *files]) == 0
