# SPDX-License-Identifier: Apache-2.0
"""Figures of a task, their errors, and how much of a baseline's they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vllm_nanoquant.evaluation.backend import Output


def mean_of(values: Sequence[float]) -> float:
    """Arithmetic mean; not a number where there are none."""
    return math.fsum(values) / len(values) if values else math.nan


def _variance_of_mean(values: Sequence[float]) -> float:
    """Square of the standard error of the mean; not a number for fewer than two values."""
    if len(values) < 2:
        return math.nan
    mean = mean_of(values)
    return math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values)


@dataclass(frozen=True)
class Figure:
    """One metric of one task.

    Attributes:
        kind: mean: of what is in `documents`; perplexity: exp of that mean.
        value: the figure; of several runs the mean.
        higher_is_better: which way is up.
        runs: the figure of each run.
        documents: by part of the task, each document's figure (for a perplexity its mean loss in
            nats), mean over the runs; None where the metric is no mean over documents.
    """

    kind: Literal["mean", "perplexity"]
    value: float
    higher_is_better: bool
    runs: list[float]
    documents: dict[str, list[float]] | None

    @property
    def stderr(self) -> float | None:
        """Standard error over the documents; None where it is not known.

        Answers to one question are not independent, so repeats are averaged first: they make the
        error smaller only as far as chance within a question goes.
        """
        if self.documents is None:
            return None
        scale = self.value if self.kind == "perplexity" else 1.0
        return _known(scale * _error_of_means(self.documents))

    @property
    def run_stderr(self) -> float | None:
        """Standard error of `value` from the spread of the runs alone: chance in the sampling."""
        return _known(math.sqrt(_variance_of_mean(self.runs)))


@dataclass(frozen=True)
class Recovery:
    """How much of the baseline's figure is left, in percent.

    Attributes:
        percent: 100 where both are equal, more where ours is better.
        stderr: its standard error, by pairs of the same documents; None where it is not known.
    """

    percent: float
    stderr: float | None


def recovery(ours: Figure, baseline: Figure) -> Recovery | None:
    """Compare two figures of the same task; None where the baseline's is 0."""
    above, below = (ours, baseline) if ours.higher_is_better else (baseline, ours)
    if below.value == 0 or baseline.value == 0:
        return None
    ratio = above.value / below.value
    return Recovery(100 * ratio, _ratio_error(above, below, ratio))


def _ratio_error(above: Figure, below: Figure, ratio: float) -> float | None:
    if above.documents is None or below.documents is None:
        return None
    sizes = {part: len(values) for part, values in above.documents.items()}
    if sizes != {part: len(values) for part, values in below.documents.items()}:
        return None
    # To first order, ratio of means: d(a / b) = (da - ratio db) / b; of perplexities, exp(a - b):
    # d = ratio (da - db).
    weight, scale = (ratio, 1 / below.value) if above.kind == "mean" else (1.0, ratio)
    differences = {
        part: [a - weight * b for a, b in zip(values, below.documents[part], strict=True)]
        for part, values in above.documents.items()
    }
    return _known(100 * abs(scale) * _error_of_means(differences))


def _error_of_means(parts: dict[str, list[float]]) -> float:
    """Standard error of the mean over parts of the mean over each part's documents."""
    variance = math.fsum(_variance_of_mean(values) for values in parts.values())
    return math.sqrt(variance) / len(parts)


def _documents(content: Any) -> dict[str, list[float]] | None:
    if content is None:
        return None
    return {str(part): [float(value) for value in values] for part, values in content.items()}


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True)
class Result:
    """What came out of one task.

    Attributes:
        figures: by metric.
        documents: questions, or windows of text.
        repeats: answers to each question.
        output: what was generated; None for tasks that generate nothing.
    """

    figures: dict[str, Figure]
    documents: int
    repeats: int
    output: Output | None

    def as_json(self) -> dict[str, Any]:
        """For the result file."""
        output = self.output
        return {
            "documents": self.documents,
            "repeats": self.repeats,
            "figures": {
                name: {
                    "kind": figure.kind,
                    "value": figure.value,
                    "stderr": figure.stderr,
                    "run_stderr": figure.run_stderr,
                    "higher_is_better": figure.higher_is_better,
                    "runs": figure.runs,
                    "documents": figure.documents,
                }
                for name, figure in self.figures.items()
            },
            "output": None
            if output is None
            else {**asdict(output), "mean_tokens": output.tokens / output.answers},
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Result:
        """Of a result file.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is none.
        """
        figures = {
            name: Figure(
                entry["kind"],
                float(entry["value"]),
                bool(entry["higher_is_better"]),
                [float(value) for value in entry["runs"]],
                _documents(entry["documents"]),
            )
            for name, entry in content["figures"].items()
        }
        output = content["output"]
        counted = (
            None
            if output is None
            else Output(int(output["answers"]), int(output["tokens"]), int(output["truncated"]))
        )
        return cls(figures, int(content["documents"]), int(content["repeats"]), counted)
