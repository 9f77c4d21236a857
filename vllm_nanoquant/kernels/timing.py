# SPDX-License-Identifier: Apache-2.0
"""The time of one call on a GPU, with weights that no cache holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# One round over the copies of a weight reads at least this much: 20 times an H200's L2 cache. Words
# that are marked to be dropped first may drop one another and leave older ones: of 256 MiB some
# were still there after a round, and `decode` was 3 to 5 % faster.
ROTATED_BYTES = 1 << 30
# A graph goes round the copies until it takes this many microseconds, so that launching it, which
# takes some, costs a call hardly anything, however few copies there are.
GRAPH_US = 1_000
# It makes no more calls than fill so many, so that all contestants are timed over about the same
# span: an H200 that multiplies for some 100 milliseconds on end slows down by 13 %, and the lighter
# a weight is, the more copies are in rotation. A call that takes long moves more than a cache holds
# and needs no rotation.
LONGEST_GRAPH_US = 2_000
# Replays before the first that counts take at least so many microseconds: after a product in fp64,
# with which results are checked, an H200 is up to 17 % slower for a millisecond or two, and for ten
# after a rest, where a large weight is all that is read.
WARM_UP_US = 20_000
# From this many tokens on a GPU has multiplied for this long when a product is timed, and an H200
# slowed down to the clock that it can hold, as in a server that reads prompts. On the way there the
# replays of one product differed by up to 13 %.
BUSY_TOKENS = 256
BUSY_WARM_UP_US = 200_000
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


def warm_up_for(tokens: int) -> float:
    """Microseconds of replays before those of a product with so many tokens count."""
    return BUSY_WARM_UP_US if tokens >= BUSY_TOKENS else WARM_UP_US


def time_in_graph(calls: Sequence[Call], replays: int, warm_up_us: float = WARM_UP_US) -> Times:
    """Time calls by replaying a CUDA graph that makes them in their order, once or more often.

    Args:
        calls: one per copy of the weight, which do the same.
        replays: how often the graph is timed; less often when a call takes long.
        warm_up_us: microseconds of replays before the first that counts, at least.
    """
    calls[0]()
    one_call = _replay(_captured(calls[:1]))
    calls = calls[: max(1, int(LONGEST_GRAPH_US / one_call))]
    for call in calls[1:]:
        call()
    graph = _captured(calls)
    rounds = math.ceil(GRAPH_US / _replay(graph))
    if rounds > 1:
        graph = _captured(list(calls) * rounds)
    count = len(calls) * rounds
    warm_up = 0.0
    while warm_up < warm_up_us:
        warm_up += _replay(graph)
    times = [_replay(graph) / count]
    if times[0] > LONG_CALL_US:
        replays = min(replays, LONG_CALL_REPLAYS)
    times += [_replay(graph) / count for _ in range(replays - 1)]
    return Times(statistics.median(times), min(times), max(times))


def _captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of these calls, replayed once, so that it is where it is needed."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds of one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3
