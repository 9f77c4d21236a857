# SPDX-License-Identifier: Apache-2.0
"""Plot a result file as two SVGs: times, and how near they are to reading the weight alone.

    python benchmarks/kernels/plot.py RESULT.json --output docs/plots

The same file gives the same bytes with the same matplotlib.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.peers import FLOOR
from benchmarks.kernels.results import LABELS, OURS, Results

TIMES = "kernels-time.svg"
SHARES = "kernels-floor.svg"
SHARE_TOKENS = 16
COLUMNS = 4
PANEL_INCHES = (3.1, 2.6)
# Distinct for the colour-blind too; each contestant keeps its own from file to file.
COLOURS = {
    OURS: "#d55e00",
    "bf16": "#555555",
    "marlin": "#0072b2",
    "machete": "#009e73",
    "triton_w4a16": "#cc79a7",
    "humming": "#e69f00",
    "gemlite": "#56b4e9",
}
SETTINGS = {
    "svg.hashsalt": "vllm-nanoquant",
    "svg.fonttype": "none",
    "font.size": 8,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.4,
    "lines.linewidth": 1.1,
}

# Draws one layer's panel: axes of matplotlib, the results, the layer's name.
Panel = Callable[[Any, Results, str], None]


def draw_times(axes: Any, results: Results, layer: str) -> None:
    """Microseconds against tokens, both logarithmic, and the read floor as a line."""
    for peer in results.peers():
        points = [(tokens, results.us(layer, tokens, peer)) for tokens in results.tokens()]
        _line(axes, peer, points)
    if (floor := results.us(layer, None, FLOOR)) is not None:
        axes.axhline(floor, color="black", linewidth=0.8, linestyle=":", label=LABELS[FLOOR])
    ticker = import_module("matplotlib.ticker")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(base=4))
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(ticker.NullLocator())
    axes.set_xlabel("tokens")
    axes.set_ylabel("microseconds")


def draw_shares(axes: Any, results: Results, layer: str) -> None:
    """The read floor's time over each contestant's, for few tokens."""
    few = [tokens for tokens in results.tokens() if tokens <= SHARE_TOKENS]
    for peer in results.peers():
        points = [(tokens, results.floor_share(layer, tokens, peer)) for tokens in few]
        _line(axes, peer, points)
    axes.set_xticks(few, [str(tokens) for tokens in few])
    axes.set_ylim(0, max(1.05, axes.get_ylim()[1]))
    axes.set_xlabel("tokens")
    axes.set_ylabel("read floor / time")


def _line(axes: Any, peer: str, points: Sequence[tuple[int, float | None]]) -> None:
    """One contestant's points (tokens, value), those that exist."""
    known = [(tokens, value) for tokens, value in points if value is not None]
    if known:
        axes.plot(
            [tokens for tokens, _ in known],
            [value for _, value in known],
            color=COLOURS[peer],
            marker="o",
            markersize=2.5 if peer != OURS else 3.5,
            linewidth=1.1 if peer != OURS else 1.8,
            zorder=2 if peer != OURS else 3,
            label=LABELS[peer],
        )


def save(results: Results, draw: Panel, path: Path) -> None:
    """Draw a panel per layer, with one legend, into an SVG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib = import_module("matplotlib")
    figure_class = import_module("matplotlib.figure").Figure
    layers = results.layers()
    columns = min(COLUMNS, len(layers) + 1)
    rows = math.ceil((len(layers) + 1) / columns)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
        size = (columns * PANEL_INCHES[0], rows * PANEL_INCHES[1])
        figure = figure_class(figsize=size, layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        labelled: dict[str, Any] = {}
        for axes, (layer, (n, k)) in zip(panels, layers.items(), strict=False):
            draw(axes, results, layer)
            axes.set_title(f"{layer}, {n} x {k}")
            lines, labels = axes.get_legend_handles_labels()
            labelled.update(zip(labels, lines, strict=True))
        for axes in panels[len(layers) :]:
            axes.set_axis_off()
        panels[len(layers)].legend(labelled.values(), labelled.keys(), loc="center")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="JSON file of run.py")
    parser.add_argument("--output", type=Path, required=True, help="folder for the plots")
    options = parser.parse_args(arguments)
    try:
        results = Results.read(options.result)
        options.output.mkdir(parents=True, exist_ok=True)
        for name, draw in ((TIMES, draw_times), (SHARES, draw_shares)):
            save(results, draw, options.output / name)
            print(options.output / name)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except ModuleNotFoundError as error:
        parser.error(f"plots need matplotlib: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
