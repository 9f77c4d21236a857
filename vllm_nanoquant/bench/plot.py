# SPDX-License-Identifier: Apache-2.0
"""A picture of a result of `nanoquant bench serve`. Needs matplotlib, which is an extra."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HOW_TO_INSTALL = "pip install 'vllm-nanoquant[bench]'"
FORMS = (".svg", ".png", ".pdf")
"""Endings of the files that can be drawn."""
_INCHES = (6.0, 3.8)
_SETTINGS = {
    "svg.hashsalt": "vllm-nanoquant",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "font.size": 9,
}


def can_plot() -> bool:
    """Whether matplotlib is installed; it is not imported."""
    return find_spec("matplotlib") is not None


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw tokens per second against concurrency: of one request, p10 to p90, and of all together.

    The ending of `path` decides the form: .svg, .png or .pdf.
    """
    matplotlib = import_module("matplotlib")
    figure_class = import_module("matplotlib.figure").Figure
    rows = result["results"]
    places = [row["concurrency"] for row in rows]
    speeds = [row["decode_tokens_per_second"] for row in rows]
    with matplotlib.rc_context(_SETTINGS):
        figure = figure_class(figsize=_INCHES, layout="constrained")
        axes = figure.add_subplot()
        low, high = [each["p10"] for each in speeds], [each["p90"] for each in speeds]
        axes.fill_between(places, low, high, alpha=0.25, color="#d55e00", linewidth=0)
        axes.plot(
            places,
            [each["p50"] for each in speeds],
            marker="o",
            color="#d55e00",
            label="one request: p50, and p10 to p90",
        )
        axes.plot(
            places,
            [row["tokens_per_second"] for row in rows],
            marker="s",
            color="#0072b2",
            label="all requests together",
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests at once")
        axes.set_ylabel("tokens per second")
        axes.set_title(result["conditions"]["model"])
        axes.legend()
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata)
