# SPDX-License-Identifier: Apache-2.0
"""A running vLLM server, through its OpenAI-compatible interface."""

from __future__ import annotations

import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from vllm_nanoquant.checkpoint.errors import printable
from vllm_nanoquant.evaluation.backend import Output, WindowScore, window_score
from vllm_nanoquant.evaluation.errors import EvaluationError, SuiteError
from vllm_nanoquant.evaluation.suite import HarnessTask
from vllm_nanoquant.evaluation.tokenizers import without_code

ANSWER_SECONDS = 6 * 3600
"""Longest wait for one answer: 32768 tokens of a slow machine are allowed for."""
KEY = "OPENAI_API_KEY"
"""Environment variable with the server's key, where it wants one; the harness reads the same."""


class Server:
    """Implements `Backend`.

    Args:
        url: address, with or without ``/v1``.
        model: name under which the model is served; None takes the only one.
        tokenizer: folder or id of its tokenizer; None takes the path that the server reports.
        concurrency: requests at once.

    Raises:
        SuiteError: the address is none, or the model is not there.
        EvaluationError: nothing answers, or not as vLLM does.
    """

    def __init__(
        self, url: str, model: str | None, tokenizer: str | None, concurrency: int
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SuiteError(
                f"--base-url {printable(url)} is no address; give one as in http://127.0.0.1:8000"
            )
        self.root = url.rstrip("/").removesuffix("/v1")
        self.concurrency = concurrency
        self._opener = _opener(parts.hostname)
        self._card = self._find(model)
        self.model: str = self._card["id"]
        self._tokenizer = tokenizer

    def describe(self) -> dict[str, Any]:
        """The server, its release and the model, as far as it tells."""
        try:
            release = self._ask("/version").get("version")
        except EvaluationError:
            release = None
        return {
            "through": "server",
            "model": self.model,
            "path": self._card.get("root"),
            "max_model_len": self.context,
            "server_vllm": release,
        }

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its answer together."""
        length = self._card.get("max_model_len")
        if not isinstance(length, int):
            raise EvaluationError(
                f"{self.root} does not say how long a prompt may be, so it is not vLLM; evaluate "
                "with vLLM's server"
            )
        return length

    @cached_property
    def tokenizer(self) -> str:
        """Folder or id of the tokenizer."""
        found = self._tokenizer or self._card.get("root")
        if not isinstance(found, str):
            raise SuiteError(f"{self.root} does not say where its tokenizer is; give --tokenizer")
        return found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens, by the server's own tokenizer."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        tokens = self._ask("/tokenize", body).get("tokens")
        if not isinstance(tokens, list):
            raise EvaluationError(f"{self.root}/tokenize gave no tokens; evaluate with vLLM")
        return tokens

    def score(self, windows: Sequence[list[int]]) -> Iterator[WindowScore]:
        """Score windows of a text, in order, `concurrency` at once."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            yield from pool.map(self._score, windows)

    def _score(self, window: list[int]) -> WindowScore:
        body = {
            "model": self.model,
            "prompt": window,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 0,
        }
        try:
            places = self._ask("/v1/completions", body)["choices"][0]["prompt_logprobs"]
            read = [
                {int(token): (entry["logprob"], entry["rank"]) for token, entry in place.items()}
                for place in places[1:]
            ]
            return window_score(window, [{}, *read])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, EvaluationError):
                raise
            raise EvaluationError(
                f"{self.root}/v1/completions gave no prompt_logprobs; they are vLLM's own, so "
                "evaluate with vLLM's server"
            ) from None

    def harness_model(self, task: HarnessTask) -> tuple[Any, Output]:
        """The harness's model for this server, and the count of what it will generate."""
        from vllm_nanoquant.evaluation.harness_models import server_model

        chat = task.mode == "chat"
        settings = {
            "model": self.model,
            "base_url": f"{self.root}/v1/{'chat/' if chat else ''}completions",
            "num_concurrent": self.concurrency,
            "timeout": ANSWER_SECONDS,
            "max_length": self.context,
        }
        if chat:
            settings["think_end_token"] = task.think_end
        else:
            settings |= {"tokenizer": self.tokenizer, "tokenizer_backend": "huggingface"}
        return server_model(chat, settings)

    def tokenizer_folder(self) -> AbstractContextManager[Path]:
        """A folder with the tokenizer and without code."""
        return without_code(self.tokenizer)

    def _find(self, model: str | None) -> dict[str, Any]:
        cards = self._ask("/v1/models").get("data")
        if not isinstance(cards, list) or not cards:
            raise EvaluationError(f"{self.root}/v1/models lists no model; is this vLLM's server?")
        names = [card["id"] for card in cards]
        if model is None and len(cards) > 1:
            raise SuiteError(
                f"{self.root} serves {', '.join(names)}; choose one with --served-model"
            )
        for card in cards:
            if model in (None, card["id"]):
                return dict(card)
        raise SuiteError(f"{self.root} serves {', '.join(names)}, not {printable(str(model))}")

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers with."""
        url = self.root + path
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers)
        try:
            with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
                content = json.load(answer)
        except urllib.error.HTTPError as error:
            said = printable(error.read(2000).decode("utf-8", "replace"))
            raise EvaluationError(f"{url} answered {error.code}: {said}") from None
        except OSError as error:
            reason = getattr(error, "reason", error)
            raise EvaluationError(
                f"{url} does not answer ({reason}); is the server up? nanoquant serve MODEL"
            ) from None
        except ValueError:
            raise EvaluationError(f"{url} did not answer with JSON; is it vLLM's?") from None
        if not isinstance(content, dict):
            raise EvaluationError(f"{url} did not answer with a JSON object; is it vLLM's?")
        return content


def _opener(host: str) -> urllib.request.OpenerDirector:
    """Opens addresses through the environment's proxies, those of this machine without."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    return urllib.request.build_opener(urllib.request.ProxyHandler({} if local else None))
