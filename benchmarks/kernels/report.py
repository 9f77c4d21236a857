# SPDX-License-Identifier: Apache-2.0
"""What a run found: rows, refusals and circumstances, printed as they come and kept as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.layers import Layer
from vllm_nanoquant.files import write_whole
from vllm_nanoquant.kernels.timing import Times


@dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
        layer, n, k: the weight [N, K] and its name.
        tokens: M; None for the read floor, which has none.
        peer: the contestant.
        group_size: columns per scale; None where nothing is quantized.
        us: median microseconds per call.
        us_least: of the fastest replay.
        us_greatest: of the slowest replay.
        error: mean |y - expected| / mean |expected|; None for the read floor.
    """

    layer: str
    n: int
    k: int
    tokens: int | None
    peer: str
    group_size: int | None
    us: float
    us_least: float
    us_greatest: float
    error: float | None

    def line(self) -> str:
        """The figure as a line for a person."""
        tokens = "" if self.tokens is None else f"M={self.tokens}"
        error = "" if self.error is None else f"  error {self.error:.1e}"
        group = "" if self.group_size is None else f"  groups of {self.group_size}"
        return (
            f"{self.layer:10} {tokens:7} {self.peer:13} {self.us:9.2f} us "
            f"({self.us_least:.2f} to {self.us_greatest:.2f}){error}{group}"
        )


@dataclass
class Report:
    """All that goes into the result file, in the order in which it was found.

    Attributes:
        problem: what was measured, and how.
        device: what it was measured on.
        packages: versions.
        results: the figures.
        refused: contestants that did not run: layer, peer, tokens (None: at any), reason.
        not_measured: what nobody wanted to know: layer, peer, tokens, reason.
        complete: whether the run came to its end.
    """

    problem: dict[str, Any]
    device: dict[str, Any]
    packages: dict[str, str]
    results: list[Result] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)
    not_measured: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    def measured(
        self,
        layer: Layer,
        tokens: int | None,
        peer: str,
        group_size: int | None,
        times: Times,
        error: float | None,
    ) -> None:
        """Print and keep a figure; `times` are microseconds."""
        result = Result(
            layer=layer.name,
            n=layer.n,
            k=layer.k,
            tokens=tokens,
            peer=peer,
            group_size=group_size,
            us=round(times.median, 2),
            us_least=round(times.least, 2),
            us_greatest=round(times.greatest, 2),
            error=None if error is None else float(f"{error:.3g}"),
        )
        self.results.append(result)
        print(result.line(), flush=True)

    def refuse(self, layer: Layer, peer: str, reason: Exception, tokens: int | None = None) -> None:
        """Print and keep that a contestant did not run, at one number of tokens or at all."""
        at = "" if tokens is None else f" at {tokens} tokens"
        print(f"{layer.name:10} {peer} refused{at}: {reason}", flush=True)
        self.refused.append(
            {"layer": layer.name, "peer": peer, "tokens": tokens, "reason": str(reason)}
        )

    def skip(self, layer: Layer, peer: str, tokens: Sequence[int], reason: str) -> None:
        """Keep that a contestant is not measured at some numbers of tokens."""
        self.not_measured.append(
            {"layer": layer.name, "peer": peer, "tokens": list(tokens), "reason": reason}
        )

    def write(self, path: Path | None) -> None:
        """Write the JSON file whole or, if anything fails, not at all; None: nowhere."""
        if path is None:
            return
        write_whole(path, json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")


def describe_device(device: torch.device) -> dict[str, Any]:
    """The GPU in figures."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
