# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/evidence.md as SVGs; the same files give the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.evidence.tables import Results
from benchmarks.kernels.plot import SETTINGS

Draw = Callable[[Any, Results, dict[str, Any]], None]

OURS, THEIRS, FP8 = "#d55e00", "#0072b2", "#009e73"
COLOURS = {
    "balanced-g128-minmax": "#e69f00",
    "balanced-g128-mse": "#56b4e9",
    "balanced-g128-gptq": "#d55e00",
    "full-g128-gptq": "#cc79a7",
    "linears-g128-rtn-sym": "#0072b2",
    "linears-g128-gptq-mse-sym": "#555555",
    "balanced-fp8-w8a8": "#009e73",
}


def draw_curve(axes: Any, _: Results, training: dict[str, Any]) -> None:
    """Held-out perplexity as training goes."""
    points = training["curve"]
    tokens = [point["tokens"] / 1e6 for point in points]
    axes.plot(tokens, [point["heldout_perplexity"] for point in points], marker="o", color=OURS)
    axes.set_yscale("log")
    ticks = [10, 20, 50, 100]
    axes.set_yticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("training tokens seen, millions")
    axes.set_ylabel("perplexity of held-out text")


def draw_kinds(axes: Any, results: Results, _: dict[str, Any]) -> None:
    """What each kind of weight costs alone."""
    places: dict[str, int] = {}
    for colour, method, shift in ((THEIRS, "mse", 0.2), (OURS, "gptq", -0.2)):
        rows = {
            name.removeprefix("only-").removesuffix(f"-{method}"): row
            for name, row in results.items()
            if row["section"] == "kinds" and name.endswith(f"-{method}")
        }
        order = sorted(rows, key=lambda name: rows[name]["kl_divergence"])
        if method == "mse":
            places = {name: place for place, name in enumerate(order)}
            axes.set_yticks(range(len(order)), order)
        known = [name for name in order if name in places]
        if not known:
            continue
        axes.barh(
            [places[name] + shift for name in known],
            [1e3 * rows[name]["kl_divergence"] for name in known],
            xerr=[1e3 * rows[name]["kl_divergence_error"] for name in known],
            height=0.4,
            color=colour,
            label=method,
        )
    axes.set_xlabel("KL divergence from BF16 with these weights alone in int4, 10^-3 nats")
    axes.legend(loc="lower right")


def draw_positions(axes: Any, results: Results, _: dict[str, Any]) -> None:
    """KL divergence against the position in a long document."""
    for name, colour in COLOURS.items():
        if "long" not in results.get(name, {}):
            continue
        parts = results[name]["long"]["positions"]
        axes.errorbar(
            [(part["first"] + part["stop"]) / 2 for part in parts],
            [1e3 * part["kl_divergence"] for part in parts],
            yerr=[1e3 * part["kl_divergence_error"] for part in parts],
            color=colour,
            marker="o",
            markersize=3,
            capsize=2,
            label=name,
        )
    axes.set_xscale("log", base=2)
    ticks = [64, 256, 1024, 4096, 16384]
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("position in the document, tokens")
    axes.set_ylabel("KL divergence from BF16, 10^-3 nats")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))


def draw_bits(axes: Any, results: Results, _: dict[str, Any]) -> None:
    """Bits of a weight against KL divergence: methods on the same modules."""
    for name, row in results.items():
        if not name.startswith("linears-"):
            continue
        method = name.split("-", 2)[2]
        colour = OURS if method in ("minmax", "mse", "gptq") else THEIRS
        axes.errorbar(
            row["bits"],
            1e3 * row["kl_divergence"],
            yerr=1e3 * row["kl_divergence_error"],
            color=colour,
            marker="o" if "gptq" in method else "s",
            markersize=4,
        )
        axes.annotate(
            f"{method} {name.split('-')[1]}",
            (row["bits"], 1e3 * row["kl_divergence"]),
            xytext=(4, -7 if method == "minmax" else 2),
            textcoords="offset points",
            fontsize=5.5,
            color=colour,
        )
    axes.margins(x=0.12)
    axes.text(0.98, 0.97, "ours", color=OURS, ha="right", va="top", transform=axes.transAxes)
    simulated = "llm-compressor's methods, simulated"
    axes.text(0.98, 0.92, simulated, color=THEIRS, ha="right", va="top", transform=axes.transAxes)
    axes.set_xlabel("bits of a weight, scales and zero points included")
    axes.set_ylabel("KL divergence from BF16, 10^-3 nats")


PLOTS: dict[str, tuple[Draw, tuple[float, float]]] = {
    "evidence-curve.svg": (draw_curve, (5.0, 2.8)),
    "evidence-bits.svg": (draw_bits, (6.5, 4.2)),
    "evidence-kinds.svg": (draw_kinds, (6.5, 4.2)),
    "evidence-positions.svg": (draw_positions, (6.5, 3.6)),
}


def save_all(results: Results, training: dict[str, Any], folder: Path) -> None:
    """Draw every plot.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    matplotlib = import_module("matplotlib")
    figure_class = import_module("matplotlib.figure").Figure
    folder.mkdir(parents=True, exist_ok=True)
    for name, (draw, size) in PLOTS.items():
        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS}):
            figure = figure_class(figsize=size, layout="constrained")
            draw(figure.subplots(), results, training)
            metadata = {"Date": None, "Creator": None}
            figure.savefig(folder / name, format="svg", metadata=metadata)
