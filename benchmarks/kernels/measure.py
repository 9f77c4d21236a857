# SPDX-License-Identifier: Apache-2.0
"""Measuring the contestants on one layer, side by side."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

from benchmarks.kernels.accuracy import MOST_ERROR, poison
from benchmarks.kernels.layers import Layer
from benchmarks.kernels.peers import FLOOR
from benchmarks.kernels.peers.base import Peer, Refused, Weight, as_refusal, prepare_largest_group
from benchmarks.kernels.peers.read_floor import packed_words
from benchmarks.kernels.report import Report
from vllm_nanoquant.kernels.accuracy import relative_error
from vllm_nanoquant.kernels.timing import (
    LONG_CALL_US,
    WARM_UP_US,
    Call,
    Times,
    copies_needed,
    warm_up_for,
)

SEED = 0
# As of a model's weights; it decides nothing but that no scale is 0.
STANDARD_DEVIATION = 0.02
# How often the contestants follow one another where a call takes more than LONG_CALL_US.
TURNS_OF_LONG_CALLS = 3
# Idle before each contestant is timed, so that none finds the GPU as hot and slow as the one before
# or the products in fp64 have left it.
PAUSE_SECONDS = 0.1
# The read floor is what few tokens are compared with: it is timed after each number up to this.
FLOOR_TOKENS = 16


class WarmTimer(Protocol):
    """`time_in_graph`, or a fake in a test."""

    def __call__(self, calls: Sequence[Call], replays: int, warm_up_us: float) -> Times:
        """Time one call, given one per copy of the weight, after so many microseconds of them."""


@dataclass(frozen=True)
class Floor:
    """The least time in which the packed integers can be read.

    Attributes:
        calls: one read per copy.
        found: their times so far.
    """

    calls: list[Call]
    found: list[Times]


@dataclass(frozen=True)
class Bench:
    """What does not change from layer to layer.

    Attributes:
        peers: the contestants, in the order in which they are measured.
        with_floor: whether the read floor is measured too.
        tokens: numbers of tokens.
        group_size: columns per scale that are asked of the contestants.
        replays: how often each graph is timed.
        timer: what times.
        device: where.
        report: what is found goes there.
    """

    peers: Sequence[Peer]
    with_floor: bool
    tokens: Sequence[int]
    group_size: int
    replays: int
    timer: WarmTimer
    device: torch.device
    report: Report

    def measure(self, layer: Layer) -> None:
        """Measure every contestant at every number of tokens, and free the memory again."""
        floor = self._prepare_floor(layer) if self.with_floor else None
        random = torch.Generator(self.device).manual_seed(SEED)
        prepared = self._prepare(layer, random)
        for tokens in filter(layer.takes, self.tokens):
            x = torch.randn(
                tokens, layer.k, generator=random, dtype=torch.bfloat16, device=self.device
            )
            wanted = [each for each in prepared if each[0].is_measured_at(tokens)]
            self._measure_in_turns(layer, wanted, x)
            if floor and tokens <= FLOOR_TOKENS:
                floor.found.append(self._time(floor.calls))
        if floor:
            self.report.measured(layer, None, FLOOR, None, together(floor.found), None)
        self._note_gaps(layer, [peer for peer, _ in prepared])
        del prepared, floor
        gc.collect()
        self._free()

    def _prepare(self, layer: Layer, random: torch.Generator) -> list[tuple[Peer, list[Weight]]]:
        """Each contestant that takes the layer, with enough copies of its form of the weight."""
        dense = torch.randn(
            layer.n, layer.k, generator=random, dtype=torch.bfloat16, device=self.device
        )
        dense.mul_(STANDARD_DEVIATION)
        prepared = []
        for peer in self.peers:
            try:
                weight = prepare_largest_group(peer, dense, self.group_size)
                copies = [weight.copy() for _ in range(copies_needed(weight.nbytes) - 1)]
            except Exception as error:
                self.report.refuse(layer, peer.name, as_refusal(error))
            else:
                prepared.append((peer, [weight, *copies]))
            self._free()
        return prepared

    def _measure_in_turns(
        self, layer: Layer, prepared: Sequence[tuple[Peer, list[Weight]]], x: torch.Tensor
    ) -> None:
        """One figure per contestant, or the reason why there is none; x is bf16 [M, K].

        Long calls heat the GPU and its clock drifts, so those are timed in several turns. All are
        checked before any is timed: the products in fp64 heat it too.
        """
        warm_up_us = warm_up_for(x.shape[0])
        times: dict[str, list[Times]] = {}
        errors: dict[str, float] = {}
        for peer, copies in prepared:
            try:
                errors[peer.name] = _checked_error(copies[0], x, layer.n)
                times[peer.name] = []
            except Exception as failure:
                self.report.refuse(layer, peer.name, as_refusal(failure), x.shape[0])
        for turn in range(TURNS_OF_LONG_CALLS):
            for peer, copies in prepared:
                found = times.get(peer.name)
                if found is None or (turn and found[0].median <= LONG_CALL_US):
                    continue
                try:
                    found.append(self._time([_call(weight, x) for weight in copies], warm_up_us))
                except Exception as failure:
                    del times[peer.name]
                    self.report.refuse(layer, peer.name, as_refusal(failure), x.shape[0])
        for peer, copies in prepared:
            if peer.name in times:
                size = copies[0].group_size
                figure = together(times[peer.name])
                self.report.measured(layer, x.shape[0], peer.name, size, figure, errors[peer.name])

    def _prepare_floor(self, layer: Layer) -> Floor | None:
        """The fastest way to read the packed integers, timed once; None where none runs."""
        fastest: Floor | None = None
        try:
            for words in packed_words(layer.n, layer.k, self.device):
                words.check()
                copies = [words.copy() for _ in range(copies_needed(words.nbytes))]
                calls = [each.read for each in copies]
                floor = Floor(calls, [self._time(calls)])
                if fastest is None or floor.found[0].median < fastest.found[0].median:
                    fastest = floor
        except Exception as error:
            self.report.refuse(layer, FLOOR, as_refusal(error))
            return None
        return fastest

    def _note_gaps(self, layer: Layer, peers: Sequence[Peer]) -> None:
        """Record the figures that were never wanted."""
        for peer in peers:
            beyond = [tokens for tokens in self.tokens if not layer.takes(tokens)]
            if beyond:
                reason = f"not measured: no more than {layer.most_tokens} tokens reach this layer"
                self.report.skip(layer, peer.name, beyond, reason)
            within = filter(layer.takes, self.tokens)
            unwanted = [tokens for tokens in within if not peer.is_measured_at(tokens)]
            if unwanted:
                self.report.skip(layer, peer.name, unwanted, f"not measured: {peer.limits()}")

    def _time(self, calls: Sequence[Call], warm_up_us: float = WARM_UP_US) -> Times:
        """One call, after a rest and so many microseconds of calls that do not count."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            time.sleep(PAUSE_SECONDS)
        return self.timer(calls, self.replays, warm_up_us)

    def _free(self) -> None:
        """Give memory that nothing holds any more back to the GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def together(turns: Sequence[Times]) -> Times:
    """Several turns as one: the median of their medians, the least and the greatest of all."""
    return Times(
        median(each.median for each in turns),
        min(each.least for each in turns),
        max(each.greatest for each in turns),
    )


def _checked_error(weight: Weight, x: torch.Tensor, n: int) -> float:
    """Mean relative error of a first call, x being bf16 [M, K]; Refused if the result is wrong."""
    poison(x, n)
    y = weight.call(x)
    if y.shape != (x.shape[0], n):
        raise Refused(f"wrong result: shape {list(y.shape)}, not {[x.shape[0], n]}")
    error = relative_error(y, x, weight.exact())
    if not error <= MOST_ERROR:  # true of NaN as well
        raise Refused(f"wrong result: mean relative error {error:.1e}")
    return error


def _call(weight: Weight, x: torch.Tensor) -> Call:
    """A call on one of the copies."""
    return lambda: weight.call(x)
