# SPDX-License-Identifier: Apache-2.0
"""Time a mixture of int4 experts beside its rivals, in the geometry of Nemotron 3 Nano 30B-A3B.

    python benchmarks/kernels/moe.py --output benchmarks/kernels/results/h200-moe.json

Method: a CUDA graph of several calls, each with tokens and routes of its own, so that the weights
that one call reads are not in a cache when the next begins; the median of its timed replays divided
by the number of calls. Routes are random, or the same for all tokens of a call ("popular"). Beside
each time stands the error against the fp64 result of the contestant's own dequantized weights, for
the first tokens of a call, mean |y - expected| / mean |expected|. Routing itself is not timed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from benchmarks.common import NO_GPU, versions  # noqa: E402
from benchmarks.kernels.moe_peers import CONTESTANTS, Contestant, Experts  # noqa: E402
from benchmarks.kernels.peers.base import Refused  # noqa: E402
from benchmarks.kernels.report import describe_device  # noqa: E402
from vllm_nanoquant.kernels.timing import time_in_graph  # noqa: E402

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 6, 2688, 1856
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Calls of a graph: what they read together no cache holds.
CALLS = 12
REPLAYS = 15
# Tokens of a call whose result is computed in fp64.
CHECKED_TOKENS = 4
SEED = 0

Route = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def random_experts(device: torch.device) -> Experts:
    """Normal weights that keep the size of their input, about; bf16."""

    def normal(rows: int, columns: int) -> torch.Tensor:
        return torch.stack(
            [
                (torch.randn(rows, columns, device=device) / columns**0.5).bfloat16()
                for _ in range(EXPERTS)
            ]
        )

    return Experts(normal(INTERMEDIATE, HIDDEN), normal(HIDDEN, INTERMEDIATE))


def random_route(tokens: int, popular: bool, device: torch.device) -> Route:
    """Tokens [M, H], top-k weights and ids [M, top_k]; no token has an expert twice."""
    x = torch.randn(tokens, HIDDEN, device=device, dtype=torch.bfloat16)
    weights = torch.rand(tokens, TOP_K, device=device)
    scores = torch.rand(1 if popular else tokens, EXPERTS, device=device)
    ids = scores.topk(TOP_K, dim=1).indices.int().expand(tokens, TOP_K).contiguous()
    return x, weights, ids


def relative_error(contestant: Contestant, route: Route) -> float:
    """Error of the first tokens; NaN where any of their values is."""
    x, weights, ids = route
    y = contestant.call(x, weights, ids)[:CHECKED_TOKENS].double()
    expected = torch.zeros_like(y)
    for token in range(len(y)):
        for slot, expert in enumerate(ids[token].tolist()):
            w13, w2 = contestant.exact(expert)
            h = (w13 @ x[token].double()).clamp(min=0) ** 2
            expected[token] += weights[token, slot].double() * (w2 @ h)
    return float((y - expected).abs().mean() / expected.abs().mean())


def measure(contestant: Contestant, tokens: int, popular: bool, device: torch.device) -> Any:
    """Times and error of one contestant at one number of tokens."""
    torch.manual_seed(SEED + tokens)
    count = CALLS if tokens <= 256 else 3
    routes = [random_route(tokens, popular, device) for _ in range(count)]
    calls = [functools.partial(contestant.call, *route) for route in routes]
    times = time_in_graph(calls, REPLAYS)
    return {
        "us": times.median,
        "least_us": times.least,
        "greatest_us": times.greatest,
        "error": relative_error(contestant, routes[0]),
    }


def benchmark(names: Sequence[str], device: torch.device) -> dict[str, Any]:
    """All figures, one contestant after the other: not all of their weights need fit in memory."""
    results, refused = [], []
    torch.manual_seed(SEED)
    experts = random_experts(device)
    for name in names:
        try:
            contestant = CONTESTANTS[name](experts)
        except Refused as refusal:
            refused.append({"peer": name, "reason": str(refusal)})
            print(f"{name}: refused: {refusal}", flush=True)
            continue
        for popular in (False, True):
            for tokens in TOKENS:
                if popular and not 1 < tokens <= 64:
                    continue
                figures = measure(contestant, tokens, popular, device)
                routes = "popular" if popular else "random"
                row = {"peer": name, "tokens": tokens, "routes": routes}
                row |= {"group_size": contestant.group_size, "nbytes": contestant.nbytes, **figures}
                results.append(row)
                text = f"{figures['us']:8.1f} us, error {figures['error']:.1e}"
                print(f"{name:12} {routes:8} {tokens:5} tokens {text}", flush=True)
        del contestant
        gc.collect()
        torch.cuda.empty_cache()
    return {"results": results, "refused": refused}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 if a contestant was refused, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--peers", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # before a contestant imports vLLM
    device = torch.device("cuda", torch.cuda.current_device())
    problem = {
        "what": "routed experts of one layer, squared ReLU; microseconds per call",
        "model": "Nemotron 3 Nano 30B-A3B",
        "experts": EXPERTS,
        "top_k": TOP_K,
        "hidden": HIDDEN,
        "intermediate": INTERMEDIATE,
        "calls_per_graph": CALLS,
        "replays": REPLAYS,
        "seed": SEED,
        "error": f"mean |y - expected| / mean |expected| of the first {CHECKED_TOKENS} tokens, "
        "expected in fp64 of what was packed",
    }
    found = benchmark(options.peers, device)
    report = {
        "problem": problem,
        "device": describe_device(device),
        "packages": versions(),
        **found,
    }
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    return int(bool(found["refused"]))


if __name__ == "__main__":
    sys.exit(main())
