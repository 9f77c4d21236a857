# SPDX-License-Identifier: Apache-2.0
"""What a contestant is: how it takes a weight, multiplies by it, and says that it cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Protocol

import torch

# Where a contestant cannot take the group size that was asked for, smaller ones are tried.
GROUP_SIZES = (128, 64, 32)


class Refused(Exception):
    """A contestant cannot run here; the message says why."""


class GroupRefused(Refused):
    """A contestant cannot run with this group size, but perhaps with a smaller one."""


def as_refusal(error: Exception) -> Refused:
    """The error in one line, named after its type unless it is a refusal already."""
    if isinstance(error, Refused):
        return error
    lines = str(error).strip().splitlines() or ["no message"]
    return Refused(f"{type(error).__name__}: {lines[0]}")


class Weight(Protocol):
    """A weight [N, K] in the form that one contestant multiplies by."""

    @property
    def group_size(self) -> int | None:
        """Columns per group; None for a weight that is not quantized."""

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads of it."""

    def copy(self) -> Weight:
        """The same weight in other memory."""

    def call(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x, bf16 [M, K], by the transposed weight: bf16 [M, N]."""

    def exact(self) -> torch.Tensor:
        """What `call` multiplies by, were there no rounding: fp64 [N, K]."""


@dataclass(frozen=True)
class Peer:
    """A contestant.

    Attributes:
        name: what results call it.
        prepare: makes its form of a weight, bf16 [N, K] on the device of the run, with groups of
            so many columns; raises Refused where it cannot.
        most_tokens: the most that it is measured at, where more would take long and tell nothing.
        only_tokens: the only numbers of tokens that it is measured at, where each takes seconds.
    """

    name: str
    prepare: Callable[[torch.Tensor, int], Weight]
    most_tokens: int | None = None
    only_tokens: frozenset[int] | None = None

    def is_measured_at(self, tokens: int) -> bool:
        """Whether this many tokens is a figure that we want of it."""
        if self.only_tokens is not None and tokens not in self.only_tokens:
            return False
        return self.most_tokens is None or tokens <= self.most_tokens

    def limits(self) -> str:
        """In words, at how many tokens it is measured."""
        if self.only_tokens is not None:
            return f"measured at {', '.join(map(str, sorted(self.only_tokens)))} tokens only"
        if self.most_tokens is not None:
            return f"measured up to {self.most_tokens} tokens only"
        return "measured at any number of tokens"


def prepare_largest_group(peer: Peer, dense: torch.Tensor, group_size: int) -> Weight:
    """Make a contestant's form of dense, bf16 [N, K], with the largest groups that it takes.

    Args:
        peer: the contestant.
        dense: the weight.
        group_size: the size that is wanted; smaller ones are tried after it.

    Raises:
        Refused: it takes no group size, or cannot run for another reason.
    """
    reasons = []
    for size in (group_size, *(size for size in GROUP_SIZES if size < group_size)):
        try:
            return peer.prepare(dense, size)
        except GroupRefused as refusal:
            reasons.append(str(refusal))
    raise Refused("; ".join(reasons))


def require_whole_groups(in_features: int, group_size: int) -> None:
    """Raise GroupRefused unless the groups divide K."""
    if in_features % group_size:
        raise GroupRefused(f"K = {in_features} is not a multiple of the group size {group_size}")


def importable(name: str) -> ModuleType:
    """Import a module of a package that need not be installed.

    Raises:
        Refused: it is missing, or fails to load.
    """
    try:
        return import_module(name)
    except Exception as error:  # a package that is broken is no better than one that is missing
        raise Refused(f"cannot import {name}: {error}") from error
