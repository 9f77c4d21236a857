# SPDX-License-Identifier: Apache-2.0
"""Reading a result file again, for tables and plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels.peers import CONTESTANTS, FLOOR

OURS = "ours"
LABELS = {
    OURS: "ours",
    "bf16": "BF16 (cuBLAS)",
    "marlin": "Marlin",
    "machete": "Machete",
    "triton_w4a16": "vLLM's Triton",
    "humming": "Humming",
    "gemlite": "GemLite",
    FLOOR: "read floor",
}
PACKAGE_LABELS = {
    "torch": "torch",
    "triton": "Triton",
    "vllm": "vLLM",
    "gemlite": "GemLite",
    "humming-kernels": "Humming",
}


@dataclass(frozen=True)
class Results:
    """A result file.

    Attributes:
        name: of the file, without folders.
        data: its content.
        rows: the figures by layer, tokens (None for the read floor) and contestant.
    """

    name: str
    data: dict[str, Any]
    rows: dict[tuple[str, int | None, str], dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file that run.py wrote.

        Raises:
            ValueError: it is missing, is not JSON, or is something else; the message says which.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            rows = {(row["layer"], row["tokens"], row["peer"]): row for row in data["results"]}
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of run.py: {error!r}") from error
        return cls(path.name, data, rows)

    def layers(self) -> dict[str, tuple[int, int]]:
        """(N, K) of each layer, by name, in the order of the file."""
        return {row["layer"]: (row["n"], row["k"]) for row in self.rows.values()}

    def tokens(self) -> list[int]:
        """Every number of tokens in the file, ascending."""
        return sorted({tokens for _, tokens, _ in self.rows if tokens is not None})

    def peers(self) -> list[str]:
        """Every contestant in the file that multiplies, in the order of CONTESTANTS."""
        found = {peer for _, _, peer in self.rows}
        return [name for name in CONTESTANTS if name in found]

    def us(self, layer: str, tokens: int | None, peer: str) -> float | None:
        """Median microseconds, or None where there is no figure."""
        row = self.rows.get((layer, tokens, peer))
        return None if row is None else row["us"]

    def group_size(self, layer: str, peer: str) -> int | None:
        """Columns per scale of a contestant's weight; None: not quantized, or no figure."""
        for tokens in self.tokens():
            if row := self.rows.get((layer, tokens, peer)):
                return row["group_size"]
        return None

    def floor_share(self, layer: str, tokens: int, peer: str) -> float | None:
        """Time of reading the integers alone over the contestant's time."""
        floor = self.us(layer, None, FLOOR)
        us = self.us(layer, tokens, peer)
        return None if floor is None or us is None else floor / us

    def gain(self, peer: str, least: int, most: int) -> float | None:
        """Geometric mean of the contestant's time over ours, from `least` to `most` tokens.

        Over every layer and number of tokens with figures of both; None where there are none.
        """
        logarithms = []
        for layer in self.layers():
            for tokens in self.tokens():
                ours, other = self.us(layer, tokens, OURS), self.us(layer, tokens, peer)
                if least <= tokens <= most and ours is not None and other is not None:
                    logarithms.append(math.log(other / ours))
        return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None

    def greatest_error(self, peer: str) -> float | None:
        """The greatest mean relative error of a contestant, at any layer and number of tokens."""
        errors = [row["error"] for (_, _, name), row in self.rows.items() if name == peer]
        return max((error for error in errors if error is not None), default=None)

    def machine(self) -> str:
        """GPU and versions in words."""
        packages = self.data["packages"]
        known = [
            f"{label} {packages[name]}"
            for name, label in PACKAGE_LABELS.items()
            if name in packages
        ]
        return f"one {self.data['device']['name']} ({', '.join(known)})"


def first(values: Sequence[float | None]) -> float | None:
    """The least of the values that are there, or None."""
    return min((value for value in values if value is not None), default=None)
