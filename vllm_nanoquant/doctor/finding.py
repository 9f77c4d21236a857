# SPDX-License-Identifier: Apache-2.0
"""What a check has found, and what checks are given to judge."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PLUGIN = "vllm-nanoquant"
"""Name of this distribution."""

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    """What was checked."""
    status: Status
    """``fail``: nanoquant_w4a16 will not work here; ``warn``: it may not, or not as it should."""
    found: str
    way_out: str = ""
    """What to do about it; empty where nothing is to be done."""


@dataclass(frozen=True)
class Answer:
    """What a probe in another process has found out: a value, or why there is none."""

    value: Mapping[str, Any] | None = None
    error: str = ""


@dataclass(frozen=True)
class Facts:
    """Everything that checks look at, so that they can be tried with any surroundings."""

    python: str
    """Version of Python."""
    requires_python: str | None
    """Versions that the installed plugin is for; None where it is not installed."""
    versions: Mapping[str, str]
    """Version of each distribution of interest that is installed, by name."""
    providers: tuple[str, ...]
    """Distributions that bring a module ``vllm``."""
    pins: Mapping[str, str]
    """Versions of ``torch`` that vLLM, and of ``triton`` that torch, were built for."""
    modules: frozenset[str]
    """Modules of interest that are there to import."""
    entry_points: tuple[str, ...]
    """Values of vLLM's general plugins that are called nanoquant."""
    environ: Mapping[str, str]
    vllm_command: str | None
    """A ``vllm`` that the shell would run, and that is of another environment than this Python."""
    compilers: frozenset[str]
    """Which of ``c``, ``c++`` and ``Python.h`` are there."""
    answers: Mapping[str, Answer] = field(default_factory=dict)
    """By probe: those of `probes`, ``nvidia-smi`` among them."""
    folders: Mapping[str, Answer] = field(default_factory=dict)
    """By the cache's name: what its folder is like."""

    def value(self, probe: str) -> Mapping[str, Any]:
        """What a probe has found out; empty where it failed or was not tried."""
        return self.answers.get(probe, Answer()).value or {}
