# SPDX-License-Identifier: Apache-2.0
"""Perplexity and next-token accuracy of a text: no harness, no network."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from vllm_nanoquant.evaluation.backend import Backend
from vllm_nanoquant.evaluation.errors import SuiteError
from vllm_nanoquant.evaluation.figures import Figure, Result, mean_of
from vllm_nanoquant.evaluation.suite import ACCURACY, PERPLEXITY, TextTask


def find_text(task: TextTask, suite: Path, given: Path | None) -> Path:
    """The text of a task: the one given on the command line, else the suite's.

    Raises:
        SuiteError: there is none.
    """
    if given is not None:
        path = given
    elif task.text is not None:
        path = suite.parent / task.text
    else:
        raise SuiteError(
            f"task {task.name} needs a text, and the suite names none; give one with --text FILE"
        )
    if not path.is_file():
        raise SuiteError(f"task {task.name}: the text {path} is not a file that exists")
    return path


def digest(path: Path) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def cut(tokens: list[int], window: int) -> list[list[int]]:
    """Windows that do not overlap; what is left at the end is left out, as in benchmarks/."""
    return [tokens[start : start + window] for start in range(0, len(tokens) - window, window)]


def run_task(task: TextTask, backend: Backend, path: Path, limit: int | None) -> Result:
    """Score a text.

    Args:
        task: to run.
        backend: to run it on.
        path: of the text, UTF-8.
        limit: most windows; None takes all.

    Raises:
        SuiteError: the text is not UTF-8 or shorter than two windows, or a window is too long.
        EvaluationError: by the backend.
    """
    if task.window >= backend.context:
        raise SuiteError(
            f"task {task.name}: a window of {task.window} tokens needs room for one more, and "
            f"there is room for {backend.context}; raise --max-model-len, or lower window in a "
            "suite of your own"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SuiteError(f"{path} is not UTF-8 (at byte {error.start}); convert it") from None
    tokens = backend.tokenize(text)
    windows = cut(tokens, task.window)[:limit]
    if len(windows) < 2 and limit != 1:
        raise SuiteError(
            f"{path} has {len(tokens)} tokens, which is less than two windows of {task.window} and "
            "one more; give a longer text, or lower window in a suite of your own"
        )
    scores = list(backend.score(windows))
    losses = [score.loss / score.tokens for score in scores]
    hits = [score.hits / score.tokens for score in scores]
    loss, accuracy = math.exp(mean_of(losses)), mean_of(hits)
    figures = {
        PERPLEXITY: Figure("perplexity", loss, False, [loss], {"windows": losses}),
        ACCURACY: Figure("mean", accuracy, True, [accuracy], {"windows": hits}),
    }
    return Result(figures, len(windows), 1, None)
