# SPDX-License-Identifier: Apache-2.0
"""The options on a `vllm serve` command line, found by name however they are spelt.

vLLM's own parser is not asked: importing it takes as long as importing vLLM, and it differs between
releases. What is needed here is only whether an option was given, and the values of a few.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vllm_nanoquant.checkpoint.errors import UsageError

_SHORT = {
    "-q": "--quantization",
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
}
_ATTACHED = "-q"
_CONFIG = "--config"
_MODEL = "--model"
_SHORTEST = len("--x")


class Option(NamedTuple):
    """One option: ``--hf-overrides.quantization_config.preset full`` has two keys behind its name.

    The value is text from the command line, and what YAML made of it from a config file; None where
    there is none.
    """

    name: str
    keys: tuple[str, ...]
    value: Any


@dataclass(frozen=True)
class Given:
    """What the user gave.

    Attributes:
        model: the positional argument, or that of ``--model``; None where the config file names it.
        words: everything else, as it is passed on.
        options: those of the config file, then those of the command line.
    """

    model: str | None
    words: tuple[str, ...]
    options: tuple[Option, ...]

    @classmethod
    def parse(cls, arguments: Sequence[str]) -> Given:
        """Read what follows ``nanoquant serve``, without our own options.

        Raises:
            UsageError: there is no model, or two; or the config file cannot be read.
        """
        model, words = _take_model(arguments)
        words = _split_config(words)
        options = (*_options_of_config(words), *_options_of(words))
        given = cls(model, tuple(words), options)
        if model is None and not isinstance(given.value(_MODEL), str):
            raise UsageError("which model? nanoquant serve MODEL, and vLLM's options after it")
        return given

    @property
    def model_name(self) -> str:
        """The model, wherever it was given."""
        return self.model if self.model is not None else str(self.value(_MODEL))

    def has(self, name: str) -> bool:
        """Whether an option was given: as it is, as ``--no-...``, or abbreviated."""
        return any(_means(option.name, name) for option in self.options)

    def value(self, name: str) -> Any:
        """The value that counts, which is the last; None where the option was not given."""
        values = [
            option.value for option in self.options if _means(option.name, name) and not option.keys
        ]
        return values[-1] if values else None

    def mapping(self, name: str) -> dict[str, Any]:
        """The object that an option of JSON holds, from dotted options too; empty if there is none.

        Dotted options replace one given as JSON, as they do with vLLM.

        Raises:
            UsageError: the option's value is not a JSON object.
        """
        dotted = [option for option in self.options if _means(option.name, name) and option.keys]
        merged: dict[str, Any] = {}
        for option in dotted:
            _put(merged, option.keys, option.value)
        if dotted:
            return merged
        value = self.value(name)
        if isinstance(value, Mapping):
            return dict(value)
        if value is None:
            return {}
        read = _json_or_text(str(value))
        if not isinstance(read, dict):
            raise UsageError(f"{name} {value!r} is not a JSON object")
        return read

    def has_whole(self, name: str) -> bool:
        """Whether an option of JSON was given as one value, which dotted options would replace."""
        return any(_means(option.name, name) and not option.keys for option in self.options)


def _take_model(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model and the other words."""
    words = list(arguments)
    models = [words.pop(0)] if words and not words[0].startswith("-") else []
    rest: list[str] = []
    while words:
        word = words.pop(0)
        if word == _MODEL and words:
            models.append(words.pop(0))
        elif word.startswith(f"{_MODEL}="):
            models.append(word.partition("=")[2])
        else:
            rest.append(word)
    if len(models) > 1:
        raise UsageError(f"two models are given: {models[0]} and {models[1]}")
    return (models[0] if models else None), rest


def _split_config(words: Sequence[str]) -> list[str]:
    """``--config=FILE`` as two words: vLLM (0.26 to 0.33) does not read the file otherwise."""
    split: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        split += [name, value] if name == _CONFIG and equals else [word]
    return split


def _options_of_config(words: Sequence[str]) -> Iterator[Option]:
    """What the file behind ``--config`` gives."""
    if _CONFIG not in words[:-1]:
        return
    path = Path(words[words.index(_CONFIG) + 1])
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--config {path} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} does not hold options, one to a line: NAME: VALUE")
    for name, value in content.items():
        yield Option(_spelt(f"--{name}"), (), value)


def _options_of(words: Sequence[str]) -> Iterator[Option]:
    for word, after in pairwise((*words, "-")):
        if not word.startswith("-") or _is_number(word):
            continue
        name, equals, value = word.partition("=")
        if not name.startswith("--") and name not in _SHORT and name.startswith(_ATTACHED):
            name, equals, value = _ATTACHED, "=", word.removeprefix(_ATTACHED)
        name, *keys = _SHORT.get(name, name).split(".")
        text = value if equals else after if _is_value(after) else None
        yield Option(_spelt(name), tuple(keys), text)


def _spelt(name: str) -> str:
    """Write a name as vLLM does, which takes underscores for dashes."""
    return name.replace("_", "-")


def _is_value(word: str) -> bool:
    return not word.startswith("-") or _is_number(word)


def _is_number(word: str) -> bool:
    return word.removeprefix("-").replace(".", "", 1).isdecimal()


def _means(given: str, name: str) -> bool:
    """Whether what was given is this option or its no, perhaps abbreviated as argparse allows."""
    if len(given) < _SHORTEST or given == "--no":
        return False
    return any(form.startswith(given) for form in (name, f"--no-{name.removeprefix('--')}"))


def _put(target: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Store a value under keys behind one another; ``key+``, vLLM's way to add to a list, too."""
    *parents, last = keys
    for key in parents:
        if not isinstance(target.get(key), dict):
            target[key] = {}
        target = target[key]
    target[last.removesuffix("+")] = _json_or_text(value) if isinstance(value, str) else value


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
