# SPDX-License-Identifier: Apache-2.0
"""What a task needs of the thing it runs on: a server, or an engine in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_nanoquant.evaluation.suite import HarnessTask


@dataclass
class Output:
    """What was generated, added up over all answers, as vLLM counts it.

    Attributes:
        answers: how many there were.
        tokens: their tokens, reasoning and end of sequence included.
        truncated: how many of them ended because they were too long.
    """

    answers: int = 0
    tokens: int = 0
    truncated: int = 0

    def add(self, tokens: int, finish_reason: str | None) -> None:
        """Count one answer."""
        self.answers += 1
        self.tokens += tokens
        self.truncated += finish_reason == "length"


@dataclass(frozen=True)
class WindowScore:
    """What the model makes of one window of text.

    Attributes:
        loss: sum of -log p(token | those before it) over all tokens but the first, in nats.
        hits: how many of these tokens the model finds the likeliest.
        tokens: how many they are.
    """

    loss: float
    hits: int
    tokens: int


def window_score(window: Sequence[int], places: Sequence[Any]) -> WindowScore:
    """Add up the scores of a window's tokens.

    Args:
        window: token ids.
        places: for each token a dictionary with `logprob` and `rank` under its id; the first is
            not looked at, because nothing goes before it.
    """
    loss, hits = 0.0, 0
    for token, choices in zip(window[1:], places[1:], strict=True):
        logprob, rank = choices[token]
        loss -= logprob
        hits += rank == 1
    return WindowScore(loss, hits, len(window) - 1)


class Backend(Protocol):
    """A served model."""

    def describe(self) -> dict[str, Any]:
        """What the figures depend on, for the result: model, recipe, versions."""

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    def score(self, windows: Sequence[list[int]]) -> Iterator[WindowScore]:
        """Score windows of a text, in order."""

    def harness_model(self, task: HarnessTask) -> tuple[Any, Output]:
        """A model for lm-evaluation-harness, and the count of what it will generate."""

    def tokenizer_folder(self) -> AbstractContextManager[Path]:
        """A folder with the model's tokenizer and without code, while the context lasts."""
