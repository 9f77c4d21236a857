# SPDX-License-Identifier: Apache-2.0
"""docs/evaluation.md: its commands parse, its suite loads, its list is the real one."""

import re
import shlex
from pathlib import Path

import pytest

from vllm_nanoquant.cli.main import main, make_parser
from vllm_nanoquant.evaluation import suite

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


COMMANDS = [
    line
    for block in blocks("sh")
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("nanoquant ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    options = make_parser().parse_args(shlex.split(command)[1:])
    if options.suite and not options.suite.endswith(".yaml"):
        suite.load(options.suite)


def test_the_page_has_commands():
    assert len(COMMANDS) >= 6


def test_the_suite_of_the_page_loads(tmp_path):
    (block,) = blocks("yaml")
    (tmp_path / "own.yaml").write_text(block)
    tasks = suite.load(str(tmp_path / "own.yaml")).suite.tasks
    assert [task.name for task in tasks] == ["manual", "gsm8k"]


def test_the_list_of_the_page_is_the_real_one(capsys):
    assert main(["eval", "--list"]) == 0
    assert capsys.readouterr().out in blocks("")


def test_figures_of_the_page_are_those_of_the_benchmark():
    import json

    results = json.loads(
        (Path(__file__).parents[2] / "benchmarks/results/tiny-perplexity.json").read_text()
    )["results"]
    for recipe in ("bf16", "full, minmax", "full", "balanced"):
        assert f"{results[recipe]['perplexity']:.4f}" in PAGE
