# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness: run, repeated, and summed up document by document."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_nanoquant.evaluation.backend import Backend, Output
from vllm_nanoquant.evaluation.errors import EvaluationError, SuiteError
from vllm_nanoquant.evaluation.figures import Figure, Result, mean_of
from vllm_nanoquant.evaluation.suite import HarnessTask

EXTRA = "pip install 'vllm-nanoquant[eval]'"


def check_installed() -> None:
    """Raise SuiteError where lm-evaluation-harness is not installed."""
    if find_spec("lm_eval") is None:
        raise SuiteError(f"this suite needs lm-evaluation-harness, which is not installed; {EXTRA}")


def check_names(tasks: list[HarnessTask], folder: Path | None) -> None:
    """Ask the harness whether it has these tasks, before a model is loaded.

    Args:
        tasks: whose names are looked up.
        folder: more task files, on top of the harness's own.

    Raises:
        SuiteError: it lacks one, or the folder is not there.
    """
    if folder is not None and not folder.is_dir():
        raise SuiteError(f"--task-folder {folder} is not a folder that exists")
    for task in tasks:
        known = _manager(task.harness, folder, {}).all_tasks
        for name in task.harness:
            if name not in known:
                raise SuiteError(
                    f"task {task.name}: lm-evaluation-harness has no task {name!r}; correct the "
                    "key harness, or give a folder of task files with --task-folder"
                )


def run_task(
    task: HarnessTask, backend: Backend, seed: int, limit: int | None, folder: Path | None
) -> Result:
    """Run a task as often as it says.

    Args:
        task: to run.
        backend: to run it on.
        seed: of the first run; the following ones count up.
        limit: most documents of each of the harness's tasks; None takes all.
        folder: more task files.

    Raises:
        SuiteError: answers are longer than the server allows.
        EvaluationError: the harness fails, or gives another figure than was asked for.
    """
    room = backend.context
    if task.sampling and task.sampling.max_tokens >= room:
        raise SuiteError(
            f"task {task.name}: sampling.max_tokens is {task.sampling.max_tokens}, and prompt and "
            f"answer have room for {room} tokens; raise --max-model-len, or lower max_tokens in a "
            "suite of your own"
        )
    longest = max(task.lengths or [0])
    if longest >= room:
        raise SuiteError(
            f"task {task.name}: its prompts have {longest} tokens, and prompt and answer have room "
            f"for {room}; raise --max-model-len"
        )
    model, output = _model(task, backend)
    with ExitStack() as stack:
        metadata: dict[str, Any] = {}
        if task.lengths:
            tokenizer = stack.enter_context(backend.tokenizer_folder())
            metadata = {"max_seq_lengths": task.lengths, "tokenizer": str(tokenizer)}
        runs = [
            _run_once(task, model, seed + run, limit, folder, metadata)
            for run in range(task.repeats)
        ]
    figures = {name: _figure(task, name, runs) for name in task.metrics}
    documents = sum(runs[0]["n-samples"][name]["effective"] for name in runs[0]["results"])
    # A copy: an engine counts every task's answers in the same place.
    counted = replace(output) if output.answers else None
    return Result(figures, documents, task.repeats, counted)


def _model(task: HarnessTask, backend: Backend) -> tuple[Any, Output]:
    """The harness's model, and the count of what it will generate."""
    try:
        return backend.harness_model(task)
    except EvaluationError:
        raise
    except ImportError as error:
        raise EvaluationError(f"task {task.name}: {error}; {EXTRA}") from error
    except (OSError, ValueError) as error:
        said = next(iter(str(error).splitlines()), "")
        raise EvaluationError(
            f"task {task.name}: the harness cannot use the model: {said}; where it is the "
            "tokenizer, give a folder with --tokenizer"
        ) from error


def _manager(names: list[str], folder: Path | None, metadata: dict[str, Any]) -> Any:
    """The harness's index of tasks; that of its own ones is left out if it can be: it is slow."""
    given = json.dumps(metadata)
    if folder is not None:
        own = _index(folder, False, given)
        if set(names) <= set(own.all_tasks):
            return own
    return _index(folder, True, given)


@lru_cache
def _index(folder: Path | None, defaults: bool, metadata: str) -> Any:
    from lm_eval.tasks import TaskManager

    include = None if folder is None else str(folder)
    return TaskManager(
        include_path=include, include_defaults=defaults, metadata=json.loads(metadata)
    )


def _run_once(
    task: HarnessTask,
    model: Any,
    seed: int,
    limit: int | None,
    folder: Path | None,
    metadata: dict[str, Any],
) -> dict[str, Any]:
    """The harness's result of one run, without its groups."""
    from lm_eval import simple_evaluate

    manager = _manager(task.harness, folder, metadata)
    try:
        result: dict[str, Any] = simple_evaluate(
            model=model,
            tasks=list(task.harness),
            num_fewshot=task.fewshot,
            limit=limit,
            gen_kwargs=_generation(task, seed),
            apply_chat_template=task.mode != "plain",
            system_instruction=task.system,
            task_manager=manager,
            random_seed=0,
            numpy_random_seed=0,
            torch_random_seed=0,
            fewshot_random_seed=0,
            bootstrap_iters=0,
        )
    # The harness has no error class of its own, and its tasks raise what they like.
    except Exception as error:
        said = next(iter(str(error).splitlines()), "")
        raise EvaluationError(
            f"task {task.name}: lm-evaluation-harness failed with {type(error).__name__}: {said}; "
            "the log above says more"
        ) from error
    result["results"] = {
        name: figures for name, figures in result["results"].items() if name in result["samples"]
    }
    return result


def _generation(task: HarnessTask, seed: int) -> dict[str, Any] | None:
    """Sampling in the harness's words; None leaves a task's own."""
    sampling = task.sampling
    if sampling is None:
        return None
    words: dict[str, Any] = {
        "do_sample": sampling.temperature > 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_gen_toks": sampling.max_tokens,
        "seed": seed,
    }
    if sampling.stop is not None:
        words["until"] = list(sampling.stop)
    return words


def _figure(task: HarnessTask, name: str, runs: list[dict[str, Any]]) -> Figure:
    """One metric over all runs, and over all of the harness's tasks that count as one."""
    metric = task.metrics[name]
    key = f"{name},{metric.filter}"
    for part, figures in runs[0]["results"].items():
        if key not in figures:
            has = sorted(found for found in figures if "," in found and "_stderr" not in found)
            raise EvaluationError(
                f"task {task.name}: the harness's {part} has no metric {name!r} with filter "
                f"{metric.filter!r}; it has {'; '.join(has)}: correct metrics.{name} in the suite"
            )
    scores = [mean_of([float(part[key]) for part in run["results"].values()]) for run in runs]
    by_part: dict[str, list[float]] = {}
    for part in runs[0]["results"]:
        values = _by_document(part, name, metric.filter, runs)
        mean = mean_of([float(run["results"][part][key]) for run in runs])
        # Some metrics are no mean over documents; those have no error over documents either.
        if values is None or not math.isclose(mean_of(values), mean, rel_tol=1e-9, abs_tol=1e-9):
            return Figure("mean", mean_of(scores), metric.higher_is_better, scores, None)
        by_part[part] = values
    return Figure("mean", mean_of(scores), metric.higher_is_better, scores, by_part)


def _by_document(
    part: str, metric: str, chosen: str, runs: list[dict[str, Any]]
) -> list[float] | None:
    """Each document's figure, mean over the runs; None where it has no number."""
    sums: dict[int, float] = {}
    for run in runs:
        for sample in run["samples"][part]:
            if sample["filter"] != chosen:
                continue
            value = sample.get(metric)
            if not isinstance(value, int | float):
                return None
            sums[sample["doc_id"]] = sums.get(sample["doc_id"], 0.0) + float(value)
    return [sums[document] / len(runs) for document in sorted(sums)]
