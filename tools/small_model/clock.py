# SPDX-License-Identifier: Apache-2.0
"""A training schedule that follows the clock, so that it always ends where it should."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

WARM_UP = 0.04
"""Share of the training with a rising learning rate."""
STEADY = 0.3
"""Where the learning rate begins to fall, in a straight line to zero."""


@dataclass
class Clock:
    """How much of a training is done, which goes evenly from where it begins to 1 in the time left.

    Attributes:
        done: share that was done before, as a checkpoint says it.
        seconds_left: for the rest.
        now: the time in seconds.
    """

    done: float
    seconds_left: float
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._begun = self.now()

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1."""
        if self.seconds_left <= 0:
            return 1.0
        share = (self.now() - self._begun) / self.seconds_left
        return min(1.0, self.done + (1 - self.done) * share)


def learning_rate(peak: float, progress: float) -> float:
    """Rises to `peak`, stays, and falls to a thousandth of it."""
    rise = min(1.0, progress / WARM_UP + 0.01)
    fall = min(1.0, (1 - progress) / (1 - STEADY))
    return peak * rise * max(fall, 1e-3)
