# SPDX-License-Identifier: Apache-2.0
"""Suites: YAML files that say which tasks to run, how to sample, and what counts as recovered."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from vllm_nanoquant.checkpoint.errors import printable
from vllm_nanoquant.evaluation.errors import SuiteError

SHIPPED = Path(__file__).with_name("suites")
"""Folder of the suites that come with the package."""

PERPLEXITY = "perplexity"
ACCURACY = "accuracy"

_MAX_BYTES = 1 << 20
_NEVER = "trust_remote_code"
_TASK_NAME = r"^[a-z0-9][a-z0-9._-]*$"

Percent = Annotated[float, Field(gt=0, le=100)]
Mode = Literal["chat", "template", "plain"]


def _one_or_many(value: Any) -> Any:
    """A single name may be given as a plain string."""
    return [value] if isinstance(value, str) else value


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Metric(_Strict):
    """One figure of a harness task, and how much of BF16's is enough."""

    threshold: Percent = 99.0
    """Least recovery, in percent of the baseline's figure."""
    filter: str = "none"
    """The harness's filter, where a task has several ways to find the answer in a text."""
    higher_is_better: bool = True


class Sampling(_Strict):
    """How tokens are chosen."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Annotated[int, Field(ge=1)] = 1024
    """Longest answer, reasoning included."""
    stop: list[str] | None = None
    """Texts that end an answer; None leaves those of the task."""


class HarnessTask(_Strict):
    """One or more tasks of lm-evaluation-harness, counted as one: the mean of their figures."""

    kind: Literal["harness"]
    name: Annotated[str, Field(pattern=_TASK_NAME)]
    harness: Annotated[list[str], BeforeValidator(_one_or_many), Field(min_length=1)]
    """The harness's names."""
    metrics: Annotated[dict[str, Metric], Field(min_length=1)]
    mode: Mode = "chat"
    """chat: the server applies the chat template; template: we do; plain: nobody does."""
    system: str | None = None
    """System prompt, with which Nemotron's reasoning is switched on or off."""
    think_end: str | None = None
    """What ends the reasoning; only the text after it is judged."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Examples in the prompt; None leaves what the task says."""
    repeats: Annotated[int, Field(ge=1, le=64)] = 1
    """Answers to each question, each run with another seed."""
    sampling: Sampling | None = None
    """None for tasks that generate nothing."""
    lengths: list[Annotated[int, Field(ge=128)]] | None = None
    """Tokens of a prompt, for tasks such as RULER whose texts the harness makes to measure."""

    @model_validator(mode="after")
    def _repeats_need_chance(self) -> HarnessTask:
        if self.repeats > 1 and not (self.sampling and self.sampling.temperature > 0):
            raise ValueError(
                "repeats above 1 need a temperature above 0, or every run gives the same"
            )
        return self


class TextTask(_Strict):
    """Perplexity and next-token accuracy of a text, in windows that do not overlap."""

    kind: Literal["text"]
    name: Annotated[str, Field(pattern=_TASK_NAME)]
    text: str | None = None
    """Path of the text, from the suite's folder; None wants it on the command line."""
    window: Annotated[int, Field(ge=2)] = 512
    """Tokens of a window; each but its first is predicted from those before it."""
    thresholds: dict[Literal["perplexity", "accuracy"], Percent] = {}
    """Least recovery by metric, in percent; 99 where nothing is said."""


Task = Annotated[HarnessTask | TextTask, Field(discriminator="kind")]


class Suite(_Strict):
    """A list of tasks."""

    description: str = ""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the first run of each task; the following runs count up."""
    tasks: Annotated[list[Task], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Suite:
        names = [task.name for task in self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two tasks are named {twice[0]!r}; results are kept by name")
        return self


@dataclass(frozen=True)
class LoadedSuite:
    """A suite and where it came from."""

    name: str
    path: Path
    sha256: str
    suite: Suite


def load(name_or_path: str) -> LoadedSuite:
    """Read a suite: the name of a shipped one, or the path of a YAML file.

    Raises:
        SuiteError: there is none, or it is not as it should be; the text names file, key, way out.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name_or_path}.yaml"
        if name_or_path not in shipped_names():
            raise SuiteError(
                f"there is no suite {printable(name_or_path)!r}; shipped are "
                f"{', '.join(shipped_names())}, and a file of your own ends in .yaml"
            )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SuiteError(f"{path}: {error.strerror}; give a suite's name or a YAML file") from None
    if len(data) > _MAX_BYTES:
        raise SuiteError(f"{path}: {len(data)} bytes are too many for a suite; give another file")
    suite = _parse(path, data)
    return LoadedSuite(path.stem, path, hashlib.sha256(data).hexdigest(), suite)


def shipped_names() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def task_digest(task: HarnessTask | TextTask, seed: int) -> str:
    """Digest of all that a task's figures depend on; thresholds are judged later, and are not."""
    settings = task.model_dump(exclude={"thresholds"})
    for metric in settings.get("metrics", {}).values():
        del metric["threshold"]
    return hashlib.sha256(json.dumps([settings, seed], sort_keys=True).encode()).hexdigest()[:16]


def _parse(path: Path, data: bytes) -> Suite:
    try:
        content = yaml.safe_load(data)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise SuiteError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SuiteError(f"{path} holds no mapping; a suite begins with the key tasks")
    for place in _places_of(_NEVER, content):
        raise SuiteError(
            f"{path}: {place}: a suite cannot switch remote code on, and nothing here runs it; "
            "remove the key"
        )
    try:
        return Suite.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_explain(problem) for problem in error.errors())
        raise SuiteError(f"{path}: {problems}") from None


def _places_of(key: str, content: Any) -> Iterator[str]:
    """Where a key stands in nested YAML; what aliases repeat is looked at once."""
    seen: set[int] = set()
    left = [("", content)]
    while left:
        place, value = left.pop()
        if id(value) in seen or not isinstance(value, dict | list):
            continue
        seen.add(id(value))
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if name == key:
                yield f"{place}{name}"
            left.append((f"{place}{name}.", inner))


_SCHEMAS: dict[str, type[BaseModel]] = {"harness": HarnessTask, "text": TextTask}


def _explain(problem: Any) -> str:
    """One pydantic problem as a sentence: the key, what is wrong and what would be right."""
    place = list(problem["loc"])
    kind = place.pop(2) if len(place) > 2 and place[0] == "tasks" else None
    where = ".".join(map(str, place)) or "the suite"
    if problem["type"] == "extra_forbidden":
        schema = _schema_at(place[:-1], kind)
        known = list(schema.model_fields)
        near = difflib.get_close_matches(str(place[-1]), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {where}; {hint}known: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"{where} is missing; add it"
    if problem["type"].startswith("union_tag"):
        return f"{where}.kind must be 'harness' or 'text'; add or correct it"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(problem["input"], dict | list | BaseModel):
        return f"{where}: {message}"
    return f"{where} = {printable(str(problem['input']))}: {message}"


def _schema_at(place: list[Any], kind: Any) -> type[BaseModel]:
    """The model that stands at a place of the suite."""
    if "sampling" in place:
        return Sampling
    if "metrics" in place:
        return Metric
    return _SCHEMAS.get(str(kind), Suite)
