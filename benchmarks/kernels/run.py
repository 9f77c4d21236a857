# SPDX-License-Identifier: Apache-2.0
"""Time the W4A16 op beside its rivals on the layers of Nemotron-Nano-9B-v2.

    python benchmarks/kernels/run.py --output benchmarks/kernels/results/h200.json

Method: for each contestant and layer, enough copies of the weight that one round over them reads
at least 1 GiB (no cache holds much of that); a CUDA graph that makes one call per copy, round after
round until it takes a millisecond, but no more calls than take two; after 0.1 s of rest and 20 ms
of replays, from 256 tokens on 200 ms, the median of the timed ones divided by the number of calls,
and the least and the greatest beside it. So every contestant is timed over the same span. For each
number of tokens they follow one another in one process, in several turns where calls are long. The
read floor is timed first and after each number of tokens up to 16; the median of these counts.
Beside each time stands the error against the fp64 product of the contestant's own dequantized
weights, mean |y - expected| / mean |expected|, taken in memory that was full of NaN before. Memory
is freed between layers, and the result file is written after each.

A contestant that cannot run is refused with a reason, which is printed and kept. The status is 1
if that happened to ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from benchmarks.common import NO_GPU, versions  # noqa: E402
from benchmarks.kernels.layers import MODEL  # noqa: E402
from benchmarks.kernels.measure import (  # noqa: E402
    PAUSE_SECONDS,
    SEED,
    TURNS_OF_LONG_CALLS,
    Bench,
    WarmTimer,
)
from benchmarks.kernels.options import Options, parse_options  # noqa: E402
from benchmarks.kernels.peers import CONTESTANTS, FLOOR, load  # noqa: E402
from benchmarks.kernels.peers.base import Peer  # noqa: E402
from benchmarks.kernels.report import Report, describe_device  # noqa: E402
from vllm_nanoquant.kernels.timing import (  # noqa: E402
    BUSY_TOKENS,
    BUSY_WARM_UP_US,
    GRAPH_US,
    LONG_CALL_REPLAYS,
    LONG_CALL_US,
    LONGEST_GRAPH_US,
    ROTATED_BYTES,
    WARM_UP_US,
    time_in_graph,
)


def benchmark(
    options: Options, peers: Sequence[Peer], timer: WarmTimer, device: torch.device, report: Report
) -> Report:
    """Measure peers on every layer, and write the report after each; what it holds then.

    Args:
        options: what to measure; of its peers only whether the read floor is among them counts.
        peers: the contestants.
        timer: times calls in microseconds.
        device: where the weights lie.
        report: what is found is added to it.
    """
    bench = Bench(
        peers=peers,
        with_floor=FLOOR in options.peers,
        tokens=options.tokens,
        group_size=options.group_size,
        replays=options.replays,
        timer=timer,
        device=device,
        report=report,
    )
    for layer in options.layers:
        bench.measure(layer)
        report.complete = layer is options.layers[-1]
        report.write(options.output)
    return report


def selects(options: Options, peers: Sequence[Peer]) -> bool:
    """Whether any of the peers is measured on any of the layers at all."""
    return any(
        layer.takes(tokens) and peer.is_measured_at(tokens)
        for layer in options.layers
        for tokens in options.tokens
        for peer in peers
    )


def describe_problem(options: Options) -> dict[str, object]:
    """What is measured, and how."""
    return {
        "what": "y [M, N] = x [M, K] bf16 times a weight [N, K]; microseconds per call",
        "model": MODEL,
        "group_size": options.group_size,
        "tokens": options.tokens,
        "rotated_bytes": ROTATED_BYTES,
        "graph_us": GRAPH_US,
        "longest_graph_us": LONGEST_GRAPH_US,
        "warm_up_us": WARM_UP_US,
        "busy_tokens": BUSY_TOKENS,
        "busy_warm_up_us": BUSY_WARM_UP_US,
        "pause_seconds": PAUSE_SECONDS,
        "replays": options.replays,
        "replays_of_long_calls": min(options.replays, LONG_CALL_REPLAYS),
        "turns_of_long_calls": TURNS_OF_LONG_CALLS,
        "long_call_us": LONG_CALL_US,
        "seed": SEED,
        "error": "mean |y - expected| / mean |expected|, expected in fp64 of what was packed",
        "read_floor": "reads the packed integers alone, 16 bytes a load, in the fastest of a few "
        "block sizes, after the contestants of each number of tokens up to 16",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line per figure, and write the JSON file; the exit status."""
    options = parse_options(arguments)
    peers = [load(name) for name in options.peers if name in CONTESTANTS]
    if peers and not selects(options, peers):
        print(
            f"nothing to measure: no contestant is measured at {options.tokens} tokens on "
            f"{', '.join(layer.name for layer in options.layers)}; give other --tokens or --layers",
            file=sys.stderr,
        )
        return 2
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    # Before a contestant imports vLLM, which they do when they are measured.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    device = torch.device("cuda", torch.cuda.current_device())
    report = Report(describe_problem(options), describe_device(device), versions())
    benchmark(options, peers, time_in_graph, device, report)
    return int(any(refusal["peer"] == "ours" for refusal in report.refused))


if __name__ == "__main__":
    sys.exit(main())
