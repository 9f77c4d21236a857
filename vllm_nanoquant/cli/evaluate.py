# SPDX-License-Identifier: Apache-2.0
"""``nanoquant eval``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_nanoquant.cli.output import (
    OK,
    PROBLEM,
    RUN_AGAIN,
    add_command,
    add_json_option,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from vllm_nanoquant.evaluation.backend import Backend
    from vllm_nanoquant.evaluation.run import Report, Request
    from vllm_nanoquant.recipe import ServingOptions

_DESCRIPTION = """\
Run a suite of tasks on a model, through a running vLLM server or in process, and compare the
figures with those of BF16. A task that has a result in the output folder is not run again.
"""

_EXAMPLES = """\
examples:
  nanoquant eval --list
  nanoquant eval offline --text FILE --model nvidia/NVIDIA-Nemotron-Nano-9B-v2 --recipe none \\
      --output bf16
  nanoquant eval offline --text FILE --model nvidia/NVIDIA-Nemotron-Nano-9B-v2 \\
      --output int4 --baseline bf16/results.json
  nanoquant eval reasoning --base-url http://127.0.0.1:8000 --output int4 \\
      --baseline bf16/results.json

exit status: 0 all is well; 1 a task failed, or less is left of the baseline than the suite asks for
"""

_AS_IT_IS = "none"


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = add_command(commands, "eval", "measure a model's accuracy", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("suite", nargs="?", metavar="SUITE", help="a shipped suite, or a YAML file")
    parser.add_argument("--list", action="store_true", help="list suites and their tasks, and end")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the results")
    server = parser.add_argument_group("through a server")
    server.add_argument("--base-url", metavar="URL", help="vLLM's server: http://127.0.0.1:8000")
    server.add_argument("--served-model", metavar="NAME", help="where it serves several")
    server.add_argument(
        "--tokenizer", metavar="DIR", help="folder or id; default: where the server has it from"
    )
    server.add_argument(
        "--concurrency", type=_count, metavar="N", help="requests at once (default: 8)"
    )
    engine = parser.add_argument_group("in process")
    engine.add_argument("--model", metavar="MODEL", help="folder, or id of the Hugging Face Hub")
    engine.add_argument(
        "--recipe",
        metavar="RECIPE",
        help="a preset, a JSON object of options or a file of one; none: the checkpoint as it is "
        "(default: nanoquant_w4a16 with its defaults, or what an int4 checkpoint says)",
    )
    engine.add_argument(
        "--engine", metavar="JSON", help="""vLLM's arguments, as '{"max_model_len": 8192}'"""
    )
    what = parser.add_argument_group("what is run")
    what.add_argument("--text", type=Path, metavar="FILE", help="for tasks that score a text")
    what.add_argument(
        "--task", action="append", default=[], metavar="NAME", help="only this one; repeatable"
    )
    what.add_argument("--limit", type=_count, metavar="N", help="most documents of a task")
    what.add_argument(
        "--task-folder",
        type=Path,
        metavar="DIR",
        help="task files of your own for lm-evaluation-harness, which may hold Python code",
    )
    what.add_argument("--fresh", action="store_true", help="run tasks again that have a result")
    what.add_argument("--label", metavar="TEXT", help="what is evaluated, for the result")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="results.json of BF16")
    add_json_option(parser)
    parser.set_defaults(run=run, after_interrupt=RUN_AGAIN)


def _count(text: str) -> int:
    """A number of at least 1, for argparse.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Carry the command out.

    Raises:
        SuiteError, EvaluationError, RecipeError: as `evaluation.run.evaluate`.
    """
    # Not at the top: this imports pydantic.
    from vllm_nanoquant.evaluation import harness, suite
    from vllm_nanoquant.evaluation.errors import SuiteError
    from vllm_nanoquant.evaluation.run import Request, choose, evaluate

    if options.list:
        _list([options.suite] if options.suite else suite.shipped_names(), options.json)
        return OK
    if options.suite is None or options.output is None:
        raise SuiteError("give SUITE and --output DIR, or --list; see nanoquant eval --help")
    loaded = suite.load(options.suite)
    tasks = choose(loaded, options.task)
    for_harness = any(isinstance(task, suite.HarnessTask) for task in tasks)
    if for_harness:
        harness.check_installed()
    request = Request(
        loaded=loaded,
        tasks=tasks,
        output=options.output,
        text=options.text,
        limit=options.limit,
        task_folder=options.task_folder,
        baseline=options.baseline,
        fresh=options.fresh,
        label=options.label,
    )
    backend = _backend(options, for_harness)
    report = evaluate(request, backend, lambda line: print(line, file=sys.stderr))
    if options.json:
        print_json(json.loads(report.path.read_text(encoding="utf-8")))
    else:
        _tell(request, report)
    return OK if all(judgement.passed for judgement in report.judgements) else PROBLEM


def _backend(options: argparse.Namespace, for_harness: bool) -> Backend:
    from vllm_nanoquant.evaluation.engine import Engine
    from vllm_nanoquant.evaluation.errors import SuiteError
    from vllm_nanoquant.evaluation.server import Server

    if (options.base_url is None) == (options.model is None):
        raise SuiteError("give either --base-url URL of a server or --model MODEL")
    names = (
        ("recipe", "engine") if options.base_url else ("served_model", "tokenizer", "concurrency")
    )
    for name in names:
        if getattr(options, name) is not None:
            flag, wanted = name.replace("_", "-"), "model" if options.base_url else "base-url"
            raise SuiteError(f"--{flag} belongs to --{wanted}; remove it, or give that instead")
    if options.base_url:
        return Server(
            options.base_url, options.served_model, options.tokenizer, options.concurrency or 8
        )
    arguments = _json_object("--engine", options.engine or "{}")
    return Engine(options.model, _recipe(options.recipe), arguments, for_harness)


def _recipe(text: str | None) -> ServingOptions | None:
    """The recipe that ``--recipe`` means; None serves the checkpoint as it is."""
    from vllm_nanoquant.recipe import ServingOptions

    if text == _AS_IT_IS:
        return None
    if text is None:
        return ServingOptions()
    if text.lstrip().startswith("{"):
        return ServingOptions.parse(_json_object("--recipe", text))
    if text.endswith(".json"):
        content = Path(text).read_text(encoding="utf-8")
        return ServingOptions.parse(_json_object(f"--recipe {text}", content))
    return ServingOptions.parse({"preset": text})


def _json_object(place: str, text: str) -> dict[str, Any]:
    from vllm_nanoquant.evaluation.errors import SuiteError

    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SuiteError(f"{place} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise SuiteError(f"{place} is no JSON object; give one as in '{{\"key\": value}}'")
    return content


def _list(names: list[str], as_json: bool) -> None:
    """What suites there are, and what is in them."""
    from vllm_nanoquant.evaluation.suite import HarnessTask, load

    loaded = [load(name) for name in names]
    if as_json:
        print_json(
            {
                entry.name: {"sha256": entry.sha256, **entry.suite.model_dump(mode="json")}
                for entry in loaded
            }
        )
        return
    for entry in loaded:
        print(f"{entry.name}: {entry.suite.description}")
    print()
    rows = []
    for entry in loaded:
        for task in entry.suite.tasks:
            if isinstance(task, HarnessTask):
                metrics, times = list(task.metrics), task.repeats
                by = task.harness[0] if len(task.harness) == 1 else f"{len(task.harness)} tasks"
            else:
                metrics, times, by = ["perplexity", "accuracy"], 1, "ourselves"
            rows.append((entry.name, task.name, by, ", ".join(metrics), str(times)))
    print_table(("suite", "task", "run by", "metrics", "repeats"), rows)


def _tell(request: Request, report: Report) -> None:
    """The result for people."""
    judged = {(entry.task, entry.metric): entry for entry in report.judgements}
    head = ["task", "metric", "value", "stderr", "documents", "tokens", "cut off"]
    if judged:
        head += ["baseline", "recovery", "at least"]
    rows = []
    for name, record in report.records.items():
        output = record.result.output
        generated = ["", ""]
        if output is not None:
            generated = [
                f"{output.tokens / output.answers:.0f}",
                f"{100 * output.truncated / output.answers:.1f} %",
            ]
        for metric, figure in record.result.figures.items():
            row = [name, metric, f"{figure.value:.4f}", _number(figure.stderr)]
            row += [str(record.result.documents), *generated]
            if entry := judged.get((name, metric)):
                row += [f"{entry.baseline:.4f}", _recovered(entry), f"{entry.threshold:g} %"]
            rows.append(row)
    print_table(head, rows)
    below = [entry for entry in report.judgements if not entry.passed]
    for entry in below:
        print(f"below the threshold: {entry.task}, {entry.metric}")
    print(f"written to {report.path}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _recovered(entry: Any) -> str:
    if entry.recovery is None:
        return "none: the baseline is 0"
    error = entry.recovery.stderr
    return f"{entry.recovery.percent:.2f}" + ("" if error is None else f" ± {error:.2f}") + " %"
