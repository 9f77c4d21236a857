# SPDX-License-Identifier: Apache-2.0
"""Decode speed of a running server, by the client of `vllm bench serve`, at several concurrencies.

A run is as many requests at once as the concurrency says, each with a prompt of random tokens and
an answer of fixed length. The decode speed of a request is its tokens after the first, over the
seconds from the first token to the last: the prompt does not count.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_nanoquant.bench.server import ServedModel
from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError, printable

PERCENTILES = (10, 50, 90)
WHAT = (
    "decode_tokens_per_second: of one request, its tokens after the first over the seconds from "
    "the first to the last; tokens_per_second: of all requests together, prompts' time included"
)
_CLIENT = "vllm_nanoquant.bench.client"
_SHOWN_LINES = 3


class BenchmarkError(CheckpointError):
    """A measurement that failed; the text says at what."""


@dataclass(frozen=True)
class Load:
    """What is asked of the server.

    Attributes:
        concurrencies: how many requests at once, one measurement each.
        runs: measured runs at each concurrency.
        warm_ups: runs before them that do not count.
        prompt_tokens: tokens of a prompt.
        output_tokens: tokens of an answer.
    """

    concurrencies: tuple[int, ...] = (1, 2, 4, 8)
    runs: int = 20
    warm_ups: int = 3
    prompt_tokens: int = 128
    output_tokens: int = 128

    def check(self, model: ServedModel) -> None:
        """Refuse requests that the server would.

        Raises:
            UsageError: too long, or too short to have a speed.
        """
        if self.output_tokens < 2:
            raise UsageError("--output-tokens: a decode speed needs 2 tokens or more")
        length = self.prompt_tokens + self.output_tokens
        if model.max_model_len is not None and length > model.max_model_len:
            raise UsageError(
                f"--prompt-tokens {self.prompt_tokens} and --output-tokens {self.output_tokens} "
                f"make {length}, and the server takes {model.max_model_len} (--max-model-len)"
            )


def client_arguments(model: ServedModel, tokenizer: str, load: Load) -> list[list[str]]:
    """What `vllm bench serve` is given, for each concurrency."""
    return [
        [
            *("--base-url", model.url, "--model", model.name, "--tokenizer", tokenizer),
            *("--dataset-name", "random", "--random-input-len", str(load.prompt_tokens)),
            *("--random-output-len", str(load.output_tokens), "--ignore-eos"),
            *("--num-prompts", str(load.runs * concurrency)),
            *("--num-warmups", str(load.warm_ups * concurrency)),
            *("--max-concurrency", str(concurrency)),
            # Other prompts each time, or the server's prefix cache would know them.
            *("--seed", str(concurrency), "--temperature", "0"),
            *("--save-detailed", "--disable-tqdm"),
        ]
        for concurrency in load.concurrencies
    ]


def measure(
    model: ServedModel, tokenizer: str, load: Load, told: Callable[[Mapping[str, Any]], None]
) -> list[dict[str, Any]]:
    """Measure every concurrency, in their order.

    Args:
        model: the running server.
        tokenizer: folder or repository, to make prompts with.
        load: what to ask.
        told: is given each result as soon as it is there.

    Raises:
        BenchmarkError: the client or a request failed.
    """
    results: list[dict[str, Any]] = []
    for raw in _run_client(client_arguments(model, tokenizer, load)):
        result = summarise(load.concurrencies[len(results)], raw)
        told(result)
        results.append(result)
    return results


def summarise(concurrency: int, raw: Mapping[str, Any]) -> dict[str, Any]:
    """One row of the result, of what the client found.

    Raises:
        BenchmarkError: a request failed, or had no tokens after the first.
    """
    # Not at the top: reading options is quick.
    import numpy as np

    failed = [str(error) for error in raw["errors"] if error]
    if failed or not raw["itls"]:
        first = printable(failed[0].strip().splitlines()[-1]) if failed else "no answer"
        count = f"{len(failed)} of {len(raw['errors'])}"
        raise BenchmarkError(f"concurrency {concurrency}: {count} requests failed: {first}")
    seconds = [sum(gaps) for gaps in raw["itls"]]
    if not all(seconds):
        raise BenchmarkError(
            f"concurrency {concurrency}: an answer came in one piece, so it has no decode speed; "
            "ask for longer ones with --output-tokens"
        )
    speeds = [(tokens - 1) / each for tokens, each in zip(raw["output_lens"], seconds, strict=True)]

    def spread(values: Sequence[float], digits: int) -> dict[str, float]:
        found = np.percentile(values, PERCENTILES)
        return {f"p{p}": round(float(v), digits) for p, v in zip(PERCENTILES, found, strict=True)}

    return {
        "concurrency": concurrency,
        "requests": len(speeds),
        "output_tokens": sum(raw["output_lens"]),
        "seconds": round(raw["duration"], 3),
        "decode_tokens_per_second": spread(speeds, 2),
        "tokens_per_second": round(sum(raw["output_lens"]) / raw["duration"], 2),
        "ms_to_first_token": spread([1e3 * each for each in raw["ttfts"]], 1),
    }


def _run_client(arguments: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """What the client finds, in a process of its own: it imports vLLM, once for all."""
    with tempfile.TemporaryFile() as log:
        command = [sys.executable, "-m", _CLIENT, json.dumps(arguments)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as client:
            assert client.stdout is not None
            for line in client.stdout:
                yield json.loads(line)
        if client.returncode:
            log.seek(0)
            lines = log.read().decode(errors="replace").strip().splitlines()
            said = " | ".join(line.strip() for line in lines[-_SHOWN_LINES:])
            raise BenchmarkError(
                f"vLLM's benchmark client ended with status {client.returncode}: {said}"
            )


def conditions(model: ServedModel, tokenizer: str, load: Load) -> dict[str, Any]:
    """Under which circumstances the figures were taken."""
    from vllm_nanoquant.bench.surroundings import describe_machine, versions

    return {
        **asdict(load),
        "model": model.name,
        "model_root": _without_folders(model.root),
        "tokenizer": _without_folders(tokenizer),
        "server_vllm": model.vllm,
        "max_model_len": model.max_model_len,
        "device": describe_machine() if model.is_local else None,
        "client": versions(),
    }


def _without_folders(place: str) -> str:
    """A repository as it is, and of a folder's path the last part: a result may be published."""
    return Path(place).name if Path(place).is_absolute() else place
