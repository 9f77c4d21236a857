# SPDX-License-Identifier: Apache-2.0
"""Result files: one for each task, so that a run can be resumed, and one of the whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from vllm_nanoquant import __version__
from vllm_nanoquant.checkpoint.errors import printable
from vllm_nanoquant.evaluation.errors import EvaluationError, SuiteError
from vllm_nanoquant.evaluation.figures import Recovery, Result, recovery
from vllm_nanoquant.evaluation.suite import HarnessTask, TextTask
from vllm_nanoquant.files import write_durable

FORMAT = 1
"""Version of the result files."""
WHOLE = "results.json"

_SAME_IN_BASELINE = ("task_digest", "limit", "text_sha256")
_MAX_BYTES = 1 << 28


@dataclass(frozen=True)
class TaskRecord:
    """A task's result and the conditions that it holds under."""

    conditions: dict[str, Any]
    result: Result
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """For the files."""
        return {
            "format": FORMAT,
            "conditions": self.conditions,
            "seconds": round(self.seconds, 3),
            **self.result.as_json(),
        }


@dataclass(frozen=True)
class Judgement:
    """A metric beside the baseline's."""

    task: str
    metric: str
    baseline: float
    recovery: Recovery | None
    threshold: float

    @property
    def passed(self) -> bool:
        """Whether enough is left; where the baseline is 0 there is nothing to compare with."""
        return self.recovery is not None and self.recovery.percent >= self.threshold


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Ours, and those of these packages that are installed."""
    found = {"vllm-nanoquant": __version__}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_task(folder: Path, name: str, record: TaskRecord) -> None:
    """Write a task's file, whole or not at all."""
    _write(_task_file(folder, name), record.as_json())


def write_whole_result(folder: Path, content: dict[str, Any]) -> Path:
    """Write the file of the whole run, whole or not at all, and return its path."""
    path = folder / WHOLE
    _write(path, {"format": FORMAT, **content})
    return path


def find_task(folder: Path, name: str, conditions: dict[str, Any]) -> TaskRecord | None:
    """The result that an earlier run left; None where there is none.

    Raises:
        SuiteError: it was obtained under other conditions, and must not count for these.
        EvaluationError: the file cannot be read.
    """
    path = _task_file(folder, name)
    if not path.exists():
        return None
    record = _record(path, _read(path))
    if record.conditions != conditions:
        differing = ", ".join(_differences(record.conditions, conditions))
        raise SuiteError(
            f"{path} is the result of other conditions ({differing}); choose another --output, or "
            "run the tasks again with --fresh"
        )
    return record


def read_baseline(path: Path) -> tuple[dict[str, TaskRecord], str]:
    """Results by task, and the SHA-256, of another run's file.

    Raises:
        EvaluationError: it cannot be read, or is no result.
    """
    content = _read(path)
    tasks = content.get("tasks")
    if not isinstance(tasks, dict):
        raise EvaluationError(f"{path} is no result of nanoquant eval; give its {WHOLE}")
    records = {name: _record(path, entry) for name, entry in tasks.items()}
    return records, hashlib.sha256(path.read_bytes()).hexdigest()


def check_baseline(
    path: Path, baseline: dict[str, TaskRecord], conditions: dict[str, dict[str, Any]]
) -> None:
    """Check that a baseline answered the same questions in the same way.

    Args:
        path: of the baseline.
        baseline: its results by task.
        conditions: of the run to compare, by task.

    Raises:
        SuiteError: a task is missing in it, or was another one.
    """
    for name, wanted in conditions.items():
        if name not in baseline:
            raise SuiteError(
                f"{path} has no task {name}; it has {', '.join(sorted(baseline))}: run the same "
                "suite for it, or choose tasks with --task"
            )
        given = baseline[name].conditions
        for key in _SAME_IN_BASELINE:
            if given.get(key) != wanted.get(key):
                raise SuiteError(
                    f"{path}: task {name} was another one there ({key} is {given.get(key)}, here "
                    f"{wanted.get(key)}); run the baseline with this suite, text and limit"
                )


def judge(task: HarnessTask | TextTask, ours: Result, baseline: Result) -> list[Judgement]:
    """Compare a task's figures with the baseline's.

    Raises:
        EvaluationError: the baseline lacks a metric.
    """
    judgements = []
    for name, figure in ours.figures.items():
        if name not in baseline.figures:
            raise EvaluationError(f"the baseline's task {task.name} has no {name}; run it again")
        before = baseline.figures[name]
        compared = recovery(figure, before)
        threshold = _threshold(task, name)
        judgements.append(Judgement(task.name, name, before.value, compared, threshold))
    return judgements


def _threshold(task: HarnessTask | TextTask, metric: str) -> float:
    if isinstance(task, HarnessTask):
        return task.metrics[metric].threshold
    return {str(key): value for key, value in task.thresholds.items()}.get(metric, 99.0)


def _task_file(folder: Path, name: str) -> Path:
    return folder / "tasks" / f"{name}.json"


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durable(path, (json.dumps(content, indent=1) + "\n").encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise EvaluationError(f"{path} is too large for a result; give another file")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path}: {error.strerror}; give a result's {WHOLE}") from None
    except (ValueError, RecursionError):
        raise EvaluationError(f"{path} is not JSON; give a result's {WHOLE}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EvaluationError(
            f"{path} is no result of nanoquant eval in format {FORMAT}; give its {WHOLE}"
        )
    return content


def _record(path: Path, content: Any) -> TaskRecord:
    try:
        conditions = dict(content["conditions"])
        return TaskRecord(conditions, Result.from_json(content), float(content["seconds"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise EvaluationError(
            f"{path} is damaged, or no result of nanoquant eval; remove it and run again"
        ) from None


def _differences(before: dict[str, Any], now: dict[str, Any], place: str = "") -> list[str]:
    """Where two sets of conditions differ, and how."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{place}{key}.")
        else:
            found.append(f"{place}{key}: {printable(str(a))} there, {printable(str(b))} here")
    return found
