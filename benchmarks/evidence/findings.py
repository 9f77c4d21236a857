# SPDX-License-Identifier: Apache-2.0
"""What the figures say, in sentences that are only there if the figures are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.evidence.tables import Results, change, divergence
from benchmarks.quality.metrics import paired_difference

TARGETS = {"mse": 0.02, "gptq": 0.01}
"""Perplexity over BF16 that preset balanced may cost, without and with calibration."""
_SURE = 2.0
"""Standard errors that a difference must have to be called one."""
_LONG_FROM, _SHORT_FROM, _SHORT_TO = 8192, 512, 2048


def findings(results: Results) -> Iterator[str]:
    """Sentences about all that was measured."""
    yield from _targets(results)
    yield from _algorithms(results)
    yield from _zeros(results)
    yield from _peers(results)
    yield from _kinds(results)
    yield from _quality(results)
    yield from _positions(results)


def verdict(value: float, error: float, limit: float) -> str:
    """Whether a value is under a limit, as sure as its error allows."""
    if value + _SURE * error <= limit:
        return "met"
    return "missed" if value - _SURE * error > limit else "undecided, within two errors of it"


def compare(results: Results, one: str, other: str) -> str | None:
    """Which of two cases has the smaller KL divergence, in pairs of windows; None if not there."""
    if one not in results or other not in results:
        return None
    mean, error = paired_difference(results[one]["kl_by_window"], results[other]["kl_by_window"])
    figures = f"KL {1e3 * mean:+.2f} ± {1e3 * error:.2f} thousandths of a nat"
    if abs(mean) <= _SURE * error:
        return f"`{one}` and `{other}` cannot be told apart ({figures})"
    word = "nearer to" if mean < 0 else "further from"
    return f"`{one}` is {word} BF16 than `{other}` ({figures})"


def _targets(results: Results) -> Iterator[str]:
    for method, limit in TARGETS.items():
        row = results.get(f"balanced-g128-{method}")
        if row is None:
            continue
        text = "with" if method == "gptq" else "without"
        found = verdict(row["perplexity_change"], row["perplexity_change_error"], limit)
        yield (
            f"Preset `balanced` {text} calibration (`{method}`) costs {change(row)} of perplexity; "
            f"the target of {100 * limit:.0f} % is {found}."
        )


def _algorithms(results: Results) -> Iterator[str]:
    for preset in ("balanced", "full"):
        for better, plain in (("mse", "minmax"), ("gptq", "mse")):
            sentence = compare(results, f"{preset}-g128-{better}", f"{preset}-g128-{plain}")
            if sentence:
                yield sentence + "."


def _zeros(results: Results) -> Iterator[str]:
    for group_size in (128, 32):
        for method in ("minmax", "mse", "gptq"):
            name = f"balanced-g{group_size}-{method}"
            sentence = compare(results, name, f"{name}-int")
            if sentence:
                yield f"Zero points that are not whole numbers: {sentence}."


def _peers(results: Results) -> Iterator[str]:
    for group_size in (128, 32):
        ours = f"linears-g{group_size}-gptq"
        for peer in ("gptq-sym", "gptq-mse-sym", "gptq-asym"):
            theirs = f"linears-g{group_size}-{peer}"
            sentence = compare(results, ours, theirs)
            if sentence:
                bits = f"{results[ours]['bits']:.2f} and {results[theirs]['bits']:.2f} bits"
                yield f"Against llm-compressor's GPTQ, simulated: {sentence}, in {bits}."
    # More bits must not be what makes ours better: smaller groups of theirs have as many.
    sentence = compare(results, "linears-g128-gptq", "linears-g32-gptq-sym")
    if sentence:
        yield f"And with more bits on their side: {sentence}."


def _kinds(results: Results) -> Iterator[str]:
    names = ("in_proj", "out_proj", "up_proj", "down_proj", "qkv", "o_proj", "lm_head")
    rows = {name: results.get(f"only-{name}-mse") for name in names}
    found: dict[str, dict[str, Any]] = {name: row for name, row in rows.items() if row}
    if len(found) < 2:
        return
    order = sorted(found, key=lambda name: -found[name]["kl_divergence"])
    dearest = ", ".join(f"{name} {divergence(found[name])}" for name in order)
    yield f"Each kind of weight alone (`mse`, KL in thousandths of a nat): {dearest}."
    by_weight = sorted(order, key=lambda n: -found[n]["kl_divergence"] / found[n]["weights"])
    yield f"For each weight that becomes int4, in falling order: {', '.join(by_weight)}."
    parts = {p: results.get(f"only-in_proj-{p}-mse") for p in ("gate", "x", "B", "C", "dt")}
    there = {part: row for part, row in parts.items() if row}
    if there:
        each = ", ".join(f"{part} {divergence(row)}" for part, row in there.items())
        yield f"Of in_proj by its parts: {each}."


def _quality(results: Results) -> Iterator[str]:
    for method in ("mse", "gptq"):
        whole, less = (results.get(f"{p}-g128-{method}") for p in ("balanced", "quality"))
        if not whole or not less:
            continue
        weights = 1 - less["weights"] / whole["weights"]
        saved = 1 - less["kl_divergence"] / whole["kl_divergence"]
        yield (
            f"Preset `quality` leaves {100 * weights:.0f} % of `balanced`'s weights in BF16 and "
            f"has {100 * saved:.0f} % less KL divergence with `{method}`: "
            + ("more" if saved > weights else "no more")
            + " than any such share of the weights would be expected to bring."
        )


def _positions(results: Results) -> Iterator[str]:
    for name in ("balanced-g128-mse", "balanced-g128-gptq", "full-g128-gptq"):
        parts = results.get(name, {}).get("long", {}).get("positions", [])
        late = [part for part in parts if part["first"] >= _LONG_FROM]
        early = [p for p in parts if p["first"] >= _SHORT_FROM and p["stop"] <= _SHORT_TO]
        if not late or not early:
            continue
        mean = [sum(p["kl_divergence"] for p in some) / len(some) for some in (early, late)]
        yield (
            f"`{name}`: KL divergence at positions from {_LONG_FROM} on is {mean[1] / mean[0]:.2f} "
            f"times that at {_SHORT_FROM} to {_SHORT_TO}: the error "
            + ("grows" if mean[1] > 1.25 * mean[0] else "does not build up")
            + " with the length of the text."
        )
