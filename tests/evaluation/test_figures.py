# SPDX-License-Identifier: Apache-2.0
"""Errors and recovery, against the standard library and against resampling."""

import json
import math
import statistics

import numpy as np
import pytest

from vllm_nanoquant.evaluation.backend import Output
from vllm_nanoquant.evaluation.figures import Figure, Result, recovery


def mean_figure(documents, runs=(), up=True):
    value = statistics.mean(statistics.mean(part) for part in documents.values())
    return Figure("mean", value, up, list(runs), documents)


def perplexity_figure(losses):
    return Figure("perplexity", math.exp(statistics.mean(losses)), False, [], {"windows": losses})


def test_errors_of_a_mean():
    figure = mean_figure({"a": [1.0, 0.0, 0.25, 1.0]}, runs=[0.5, 0.6, 0.7])
    assert figure.stderr == pytest.approx(statistics.stdev([1, 0, 0.25, 1]) / 2)
    assert figure.run_stderr == pytest.approx(0.1 / math.sqrt(3))
    assert mean_figure({"a": [1.0]}, runs=[1.0]).stderr is None
    assert mean_figure({"a": [1.0]}, runs=[1.0]).run_stderr is None
    assert Figure("mean", 1.0, True, [1.0], None).stderr is None


def test_parts_count_alike_whatever_their_size():
    figure = mean_figure({"a": [0.0, 1.0], "b": [1.0, 1.0, 0.0, 0.5, 1.0]})
    errors = [statistics.stdev(part) / math.sqrt(len(part)) for part in figure.documents.values()]
    assert figure.stderr == pytest.approx(math.hypot(*errors) / 2)


def test_error_of_a_perplexity():
    losses = [3.0, 3.2, 3.1, 3.4]
    figure = perplexity_figure(losses)
    error = statistics.stdev(losses) / 2
    around = [math.exp(statistics.mean(losses) + sign * error / 100) for sign in (-1, 1)]
    assert figure.stderr == pytest.approx((around[1] - around[0]) / 2 * 100, rel=1e-4)


@pytest.mark.parametrize("up", [True, False])
def test_recovery_of_means_and_its_error(up):
    random = np.random.default_rng(0)
    before = (random.random((2, 400)) < 0.7).astype(float)
    ours = before * (random.random(before.shape) < 0.5)
    parts = [
        mean_figure({str(i): list(map(float, row)) for i, row in enumerate(rows)}, up=up)
        for rows in (ours, before)
    ]
    found = recovery(*parts)
    top, bottom = (ours, before) if up else (before, ours)
    assert found.percent == pytest.approx(100 * top.mean() / bottom.mean())
    ratios = []
    for _ in range(4000):
        chosen = random.integers(0, 400, (2, 400))
        drawn = [np.take_along_axis(values, chosen, 1).mean() for values in (top, bottom)]
        ratios.append(100 * drawn[0] / drawn[1])
    assert found.stderr == pytest.approx(np.std(ratios), rel=0.05)


def test_recovery_of_a_perplexity_and_its_error():
    random = np.random.default_rng(1)
    before = random.normal(3.2, 0.2, 300)
    ours = before + random.normal(0.01, 0.02, 300)
    found = recovery(perplexity_figure(list(ours)), perplexity_figure(list(before)))
    assert found.percent == pytest.approx(100 * math.exp(before.mean() - ours.mean()))
    drawn = random.integers(0, 300, (4000, 300))
    ratios = 100 * np.exp((before - ours)[drawn].mean(axis=1))
    assert found.stderr == pytest.approx(ratios.std(), rel=0.05)


def test_a_baseline_of_0_and_documents_that_do_not_match():
    ours, zero = mean_figure({"a": [0.5, 0.5]}), mean_figure({"a": [0.0, 0.0]})
    assert recovery(ours, zero) is None
    assert recovery(zero, ours).percent == 0
    other = mean_figure({"a": [0.5, 0.5, 0.5]})
    assert recovery(ours, other).stderr is None
    assert recovery(ours, other).percent == 100


def test_a_result_survives_its_file():
    result = Result(
        {"m": mean_figure({"a": [1.0, 0.5]}, [0.7, 0.8]), "p": perplexity_figure([3.0, 3.5])},
        2, 2, Output(4, 400, 1),
    )  # fmt: skip
    stored = json.loads(json.dumps(result.as_json()))
    assert stored["output"]["mean_tokens"] == 100
    assert Result.from_json(stored) == result
    nothing = Result({}, 1, 1, None)
    assert Result.from_json(nothing.as_json()) == nothing
