# SPDX-License-Identifier: Apache-2.0
"""The time of one call on a GPU, with weights that no cache holds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# One round over the copies of a weight reads at least this much.
ROTATED_BYTES = 256 << 20
# A call that takes longer than this many microseconds is replayed at most so many times.
LONG_CALL_US = 200
LONG_CALL_REPLAYS = 5

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Times:
    """Microseconds of one call, each replay of the graph giving one figure.

    Attributes:
        median: over the replays.
        least: of the fastest replay.
        greatest: of the slowest replay.
    """

    median: float
    least: float
    greatest: float


class Timer(Protocol):
    """Whatever can time calls: a CUDA graph, or a fake in a test."""

    def __call__(self, calls: Sequence[Call], replays: int) -> Times:
        """Time one call, given one call per copy of the weight and the replays wanted."""


def copies_needed(nbytes: int) -> int:
    """Number of weights of that size that together make at least ROTATED_BYTES."""
    return -(-ROTATED_BYTES // nbytes)


def time_in_graph(calls: Sequence[Call], replays: int) -> Times:
    """Time calls by replaying a CUDA graph that makes each of them once, in their order.

    Args:
        calls: one per copy of the weight; each has compiled what it needs.
        replays: how often the graph is timed; less often when a call takes long.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = [_replay(graph) / len(calls)]
    if times[0] > LONG_CALL_US:
        replays = min(replays, LONG_CALL_REPLAYS)
    times += [_replay(graph) / len(calls) for _ in range(replays - 1)]
    return Times(statistics.median(times), min(times), max(times))


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
