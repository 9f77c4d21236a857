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


def spread(figures: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(figures), "min": min(figures), "max": max(figures)}


def decode_rate(llm: LLM, batch_size: int, tokens: int, repeats: int) -> dict[str, float]:
    """Decode tokens per second, all sequences together, prefill taken out.

    From the time of each run of `tokens` tokens the median time of runs of one token is taken off.
    """
    seconds(llm, prompts(batch_size, PROMPT, 1), 1)  # the first call of a shape is slower
    first, whole = [], []
    for repeat in range(repeats):
        batch = prompts(batch_size, PROMPT, 1000 * repeat)
        first.append(seconds(llm, batch, 1))
        whole.append(seconds(llm, batch, tokens))
    prefill = statistics.median(first)
    return spread([batch_size * (tokens - 1) / (each - prefill) for each in whole])


def time_to_first_token(llm: LLM, length: int, repeats: int) -> dict[str, float]:
    """Milliseconds from a prompt of `length` tokens to its first token."""
    times = [1e3 * seconds(llm, prompts(1, length, 500 + repeat), 1) for repeat in range(repeats)]
    return spread(times)


def replay_graph(worker: Any, size: int, repeats: int) -> list[float]:
    """Milliseconds that the CUDA graph of a decode step takes on the GPU; none without a graph.

    Called in vLLM's worker, after a step of this size, whose inputs the graph reads again. Each
    figure is of ten replays in a row, so the GPU does not wait for the host. Logits and sampling
    are not part of the graph.
    """
    import torch

    in_a_row = 10
    runner = worker.model_runner
    if manager := getattr(runner, "cudagraph_manager", None):  # of vLLM's second model runner
        captured = manager.graphs.items()
    else:
        entries = getattr(runner.model, "concrete_cudagraph_entries", {})
        captured = [(descriptor, entry.cudagraph) for descriptor, entry in entries.items()]
    graphs = [
        graph
        for descriptor, graph in captured
        if descriptor.num_tokens == size and graph is not None
    ]
    times = []
    for graph in graphs[:1] * (repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(in_a_row):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / in_a_row)
    return times[1:]  # the first is slower


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
    rates: dict[int, Any] = {}
    graphs: dict[int, Any] = {}
    for size in arguments.batches:
        rates[size] = decode_rate(llm, size, arguments.tokens, arguments.repeats)
        print(f"{size} sequences, tokens per second:", rates[size], flush=True)
        if times := llm.collective_rpc(replay_graph, args=(size, arguments.repeats))[0]:
            graphs[size] = spread(times)
            print(f"{size} sequences, milliseconds of the graph:", graphs[size], flush=True)
    result["decode_tokens_per_second"] = rates
    result["decode_graph_ms"] = graphs
    for length in arguments.prefill:
        time_to_first_token(llm, length, 1)
    result["time_to_first_token_ms"] = {
        length: time_to_first_token(llm, length, 2 * arguments.repeats + 1)
        for length in arguments.prefill
    }
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
