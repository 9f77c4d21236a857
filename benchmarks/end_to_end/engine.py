# SPDX-License-Identifier: Apache-2.0
"""Start one vLLM engine, wait for its turn, measure it, print one JSON line.

Run by run.py, one process an engine. It says when it has started; a line on its standard input says
that it is its turn.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

from vllm import LLM, SamplingParams

PROMPT = 32
"""Tokens of a decode prompt."""


def prompts(count: int, length: int, salt: int) -> list[dict[str, Any]]:
    """`count` different prompts of `length` token ids."""
    return [
        {"prompt_token_ids": [100 + (7 * i + 31 * j + salt) % 1500 for i in range(length)]}
        for j in range(count)
    ]


def seconds(llm: LLM, batch: list[dict[str, Any]], tokens: int) -> float:
    """Wall seconds to generate exactly `tokens` tokens for each prompt of a batch."""
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(batch, sampling, use_tqdm=False)
    return time.perf_counter() - start


def decode_rate(llm: LLM, batch_size: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Decode tokens per second, all sequences together, prefill taken out.

    The time for `tokens` tokens less the time for one, over the tokens between.
    """
    rates = []
    seconds(llm, prompts(batch_size, PROMPT, 1), 1)  # the first call of a shape is slower
    for repeat in range(repeats):
        batch = prompts(batch_size, PROMPT, 1000 * repeat)
        first = seconds(llm, batch, 1)
        rates.append(batch_size * (tokens - 1) / (seconds(llm, batch, tokens) - first))
    return {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}


def time_to_first_token(llm: LLM, length: int, repeats: int) -> dict[str, Any]:
    """Milliseconds from a prompt of `length` tokens to its first token."""
    times = [1e3 * seconds(llm, prompts(1, length, 500 + repeat), 1) for repeat in range(repeats)]
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def main() -> None:
    """Measure the engine that the arguments describe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", type=json.loads, required=True, help="arguments of LLM()")
    parser.add_argument("--ready", required=True, help="line to print when started")
    parser.add_argument("--batches", type=json.loads, default=[1, 2, 4, 8])
    parser.add_argument("--prefill", type=json.loads, default=[2048])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    start = time.perf_counter()
    llm = LLM(**arguments.engine)
    result: dict[str, Any] = {"start_seconds": time.perf_counter() - start}
    if arguments.batches:
        seconds(llm, prompts(max(arguments.batches), PROMPT, 1), arguments.tokens)
    print(arguments.ready, flush=True)
    sys.stdin.readline()
    result["decode_tokens_per_second"] = {
        size: decode_rate(llm, size, arguments.tokens, arguments.repeats)
        for size in arguments.batches
    }
    for length in arguments.prefill:
        time_to_first_token(llm, length, 1)
    result["time_to_first_token_ms"] = {
        length: time_to_first_token(llm, length, 2 * arguments.repeats + 1)
        for length in arguments.prefill
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
