# SPDX-License-Identifier: Apache-2.0
"""How replays of a CUDA graph become figures; the graph is a fake."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, repeat

import pytest
import torch

from vllm_nanoquant.kernels import timing

CALLS = [lambda: torch.zeros(1)] * 10
ONE_CALL = 100.0
ONE_ROUND = timing.GRAPH_US


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls each graph makes, in the order in which they are captured."""
    counts: list[int] = []
    monkeypatch.setattr(timing, "_captured", lambda calls: counts.append(len(calls)))
    return counts


@pytest.fixture
def replays(captured: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Iterator[float]]:
    """Holds the microseconds of the replays to come, for a test to fill in: first of one call."""
    given: list[Iterator[float]] = []
    monkeypatch.setattr(timing, "_replay", lambda graph: next(given[0]))
    return given


def test_slow_replays_at_first_do_not_count(replays: list[Iterator[float]]) -> None:
    """As after a product in fp64."""
    replays.append(chain([ONE_CALL, ONE_ROUND], repeat(1180.0, 3), repeat(1000.0)))
    assert timing.time_in_graph(CALLS, 9) == timing.Times(100.0, 100.0, 100.0)


def test_a_longer_warm_up_can_be_asked_for(replays: list[Iterator[float]]) -> None:
    """The GPU slows down with the thirtieth replay."""
    replays.append(chain([ONE_CALL, ONE_ROUND], repeat(1000.0, 30), repeat(1100.0)))
    assert timing.time_in_graph(CALLS, 9, 10 * timing.WARM_UP_US).median == 110.0


def test_a_figure_is_the_median_of_a_call(replays: list[Iterator[float]]) -> None:
    replays.append(iter([ONE_CALL, ONE_ROUND, timing.WARM_UP_US, 110.0, 90.0, 130.0]))
    assert timing.time_in_graph(CALLS, 3) == timing.Times(11.0, 9.0, 13.0)


def test_long_calls_are_replayed_less_often(replays: list[Iterator[float]]) -> None:
    one_call = timing.LONGEST_GRAPH_US / 10
    timed = [10.0 * timing.LONG_CALL_US + 10] * timing.LONG_CALL_REPLAYS
    replays.append(iter([one_call, ONE_ROUND, timing.WARM_UP_US, *timed]))
    assert timing.time_in_graph(CALLS, 9).median == timing.LONG_CALL_US + 1


def test_a_short_graph_goes_round_until_launching_it_costs_nothing(
    replays: list[Iterator[float]], captured: list[int]
) -> None:
    """One round takes a third of what a graph should: the second graph has three."""
    replays.append(iter([ONE_CALL, ONE_ROUND / 3 + 1, timing.WARM_UP_US, *[990.0] * 3]))
    assert timing.time_in_graph(CALLS, 3).median == 33.0
    assert captured == [1, 10, 30]


@pytest.mark.parametrize(("one_call", "kept"), [(500.0, 4), (1e4, 1)])
def test_a_graph_of_long_calls_makes_few(
    one_call: float, kept: int, replays: list[Iterator[float]], captured: list[int]
) -> None:
    """Or a contestant with more copies would be timed for longer, and hence slower."""
    replays.append(chain([one_call], repeat(one_call * kept)))
    assert timing.time_in_graph(CALLS, 3).median == one_call
    assert captured == [1, kept]
