# SPDX-License-Identifier: Apache-2.0
"""Time a mixture of int4 experts beside its rivals, in the geometry of Nemotron 3 Nano 30B-A3B.

    python benchmarks/kernels/moe.py --output benchmarks/kernels/results/h200-moe.json

Method: a CUDA graph of several calls, each with tokens and routes of its own, so that the weights
that one call reads are not in a cache when the next begins; the median of its timed replays divided
by the number of calls. Routes are random, or the same for all tokens of a call ("popular"). Beside
each time stands the error against the fp64 result of the contestant's own dequantized weights,
mean |y - expected| / mean |expected| of all tokens of a call, in memory that was full of NaN
before. A result that is wrong is refused. Routing itself is not timed. The file is written after
each contestant; one that fails costs the others nothing, and its reason is kept.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run as a script, only this folder is on the path

from benchmarks.common import NO_GPU, output_file, versions, write_json  # noqa: E402
from benchmarks.kernels.accuracy import MOST_ERROR, poison  # noqa: E402
from benchmarks.kernels.moe_peers import CONTESTANTS, Contestant, Experts  # noqa: E402
from benchmarks.kernels.peers.base import Refused, as_refusal  # noqa: E402
from benchmarks.kernels.report import describe_device  # noqa: E402
from vllm_nanoquant.kernels.accuracy import mean_relative_error  # noqa: E402
from vllm_nanoquant.kernels.timing import time_in_graph  # noqa: E402

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 128, 6, 2688, 1856
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Calls of a graph: what they read together no cache holds.
CALLS = 12
REPLAYS = 15
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


def exact_result(contestant: Contestant, route: Route) -> torch.Tensor:
    """What a call of the contestant would give, were there no rounding: fp64 [M, H]."""
    x, weights, ids = route
    expected = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():  # by experts: each has its weights made once
        tokens, slots = (ids == expert).nonzero(as_tuple=True)
        w13, w2 = contestant.exact(expert)
        h = (x[tokens].double() @ w13.t()).clamp(min=0) ** 2
        expected[tokens] += weights[tokens, slots, None].double() * (h @ w2.t())
    return expected


def checked_error(contestant: Contestant, route: Route) -> float:
    """Mean relative error of all tokens of a call; Refused if the result is wrong."""
    expected = exact_result(contestant, route)
    poison(route[0], HIDDEN)
    y = contestant.call(*route)
    if y.shape != expected.shape:
        raise Refused(f"wrong result: shape {list(y.shape)}, not {list(expected.shape)}")
    error = mean_relative_error(y, expected)
    if not error <= MOST_ERROR:  # true of NaN as well
        raise Refused(f"wrong result: mean relative error {error:.1e}")
    return error


def measure(contestant: Contestant, tokens: int, popular: bool, device: torch.device) -> Any:
    """Times and error of one contestant at one number of tokens; Refused if it is wrong."""
    torch.manual_seed(SEED + tokens)
    count = CALLS if tokens <= 256 else 3
    routes = [random_route(tokens, popular, device) for _ in range(count)]
    calls = [functools.partial(contestant.call, *route) for route in routes]
    times = time_in_graph(calls, REPLAYS)
    return {
        "us": times.median,
        "least_us": times.least,
        "greatest_us": times.greatest,
        # After the times: products in fp64 heat the GPU.
        "error": checked_error(contestant, routes[0]),
    }


def measure_all(name: str, experts: Experts, device: torch.device, report: dict[str, Any]) -> None:
    """Add all figures of one contestant to the report, and why there are none where it fails."""

    def refuse(error: Exception, **at: Any) -> None:
        reason = str(as_refusal(error))
        report["refused"].append({"peer": name, **at, "reason": reason})
        print(name, *at.values(), f"refused: {reason}", flush=True)

    try:
        contestant = CONTESTANTS[name](experts)
    except Exception as error:  # one contestant must not cost the others
        refuse(error)
        return
    for popular in (False, True):
        for tokens in TOKENS:
            if popular and not 1 < tokens <= 64:
                continue
            routes = "popular" if popular else "random"
            try:
                figures = measure(contestant, tokens, popular, device)
            except Exception as error:
                refuse(error, routes=routes, tokens=tokens)
                continue
            row = {"peer": name, "tokens": tokens, "routes": routes}
            row |= {"group_size": contestant.group_size, "nbytes": contestant.nbytes, **figures}
            report["results"].append(row)
            text = f"{figures['us']:8.1f} us, error {figures['error']:.1e}"
            print(f"{name:12} {routes:8} {tokens:5} tokens {text}", flush=True)


def benchmark(
    names: Sequence[str], device: torch.device, report: dict[str, Any], output: Path
) -> None:
    """Measure one contestant after the other: not all of their weights need fit in memory.

    Args:
        names: of the contestants, each once.
        device: where the weights lie.
        report: what is found is added to it, and it is written after each contestant.
        output: where to.
    """
    report |= {"results": [], "refused": [], "complete": False}
    torch.manual_seed(SEED)
    experts = random_experts(device)
    for name in names:
        measure_all(name, experts, device, report)
        gc.collect()
        torch.cuda.empty_cache()
        report["complete"] = name == names[-1]
        write_json(output, report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the status is 1 if anything was refused, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=output_file, required=True, help="JSON file to write")
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
        "error": "mean |y - expected| / mean |expected| of all tokens of a call, expected in fp64 "
        "of what was packed, in memory that was full of NaN before",
    }
    report: dict[str, Any] = {
        "problem": problem,
        "device": describe_device(device),
        "packages": versions(),
    }
    benchmark(list(dict.fromkeys(options.peers)), device, report, options.output)
    return int(bool(report["refused"]))


if __name__ == "__main__":
    sys.exit(main())
