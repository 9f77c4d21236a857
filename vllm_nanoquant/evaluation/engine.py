# SPDX-License-Identifier: Apache-2.0
"""A vLLM engine in this process."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_nanoquant.evaluation.backend import Output, WindowScore, window_score
from vllm_nanoquant.evaluation.errors import EvaluationError, SuiteError
from vllm_nanoquant.evaluation.suite import HarnessTask
from vllm_nanoquant.evaluation.tokenizers import without_code
from vllm_nanoquant.recipe import METHOD, ServingOptions

_OURS = {
    "model": "--model",
    "quantization": "--recipe",
    "hf_overrides": "--recipe",
    "trust_remote_code": None,
}
"""Engine options that come from elsewhere; None: never."""


class Engine:
    """Implements `Backend`.

    Args:
        model: folder or id of the Hugging Face Hub.
        recipe: options of our quantization; None serves the checkpoint as it is.
        options: more arguments of vLLM's ``LLM``.
        for_harness: whether lm-evaluation-harness will run tasks on it.

    Raises:
        SuiteError: an option that belongs elsewhere.
    """

    def __init__(
        self,
        model: str,
        recipe: ServingOptions | None,
        options: dict[str, Any],
        for_harness: bool,
    ) -> None:
        for name in _OURS.keys() & options.keys():
            way_out = f"use {_OURS[name]}" if _OURS[name] else "no remote code runs here; remove it"
            raise SuiteError(f"--engine {name}: {way_out}")
        self.model = model
        self._recipe = recipe
        self._options = options
        self._for_harness = for_harness
        self._harness: Any = None
        self._output = Output()

    @cached_property
    def _llm(self) -> Any:
        """The engine, started when it is first needed: a finished evaluation never does.

        Raises:
            EvaluationError: vLLM is not there, or does not load the model.
        """
        arguments = {"trust_remote_code": False, **self._options}
        if self._recipe is not None:
            arguments["quantization"] = METHOD
        if chosen := self._given:
            arguments["hf_overrides"] = {"quantization_config": chosen}
        # vLLM reads it when it is imported: standard output is for the result.
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        try:
            if not self._for_harness:
                from vllm import LLM

                return LLM(model=self.model, **arguments)
            from vllm_nanoquant.evaluation.harness_models import engine_model

            self._harness, self._output = engine_model({"pretrained": self.model, **arguments})
            return self._harness.model
        except EvaluationError:
            raise
        except ImportError as error:
            raise EvaluationError(
                f"vLLM does not import ({_first_line(error)}); nanoquant doctor says more, and a "
                "server elsewhere can be evaluated with --base-url"
            ) from error
        except (ValueError, RuntimeError, OSError, TypeError) as error:
            raise EvaluationError(
                f"vLLM does not load {self.model}: {_first_line(error)}; its log above says more"
            ) from error

    @property
    def _given(self) -> dict[str, Any]:
        """The options of the recipe that were given; the others are defaults, or a checkpoint's."""
        return (
            {} if self._recipe is None else self._recipe.model_dump(mode="json", exclude_unset=True)
        )

    def describe(self) -> dict[str, Any]:
        """The model, the options of the recipe that were given, and the engine's options."""
        return {
            "through": "engine",
            "model": self.model,
            "quantization": None if self._recipe is None else METHOD,
            "recipe": self._given,
            "engine": self._options,
        }

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return int(self._llm.model_config.max_model_len)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        ids = self._llm.get_tokenizer().encode(text, add_special_tokens=False)
        return [int(token) for token in ids]

    def score(self, windows: Sequence[list[int]]) -> Iterator[WindowScore]:
        """Score windows of a text, in order."""
        from vllm import SamplingParams

        asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": window} for window in windows]
        answers = self._llm.generate(prompts, asked, use_tqdm=False)
        for window, answer in zip(windows, answers, strict=True):
            places = [
                {token: (entry.logprob, entry.rank) for token, entry in (place or {}).items()}
                for place in answer.prompt_logprobs
            ]
            yield window_score(window, places)

    def harness_model(self, task: HarnessTask) -> tuple[Any, Output]:
        """The harness's model, and a fresh count of what it will generate."""
        _ = self._llm  # starts it
        self._output.answers = self._output.tokens = self._output.truncated = 0
        self._harness.think_end_token = task.think_end
        return self._harness, self._output

    def tokenizer_folder(self) -> AbstractContextManager[Path]:
        """A folder with the tokenizer and without code."""
        return without_code(self.model)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
