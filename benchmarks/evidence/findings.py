# SPDX-License-Identifier: Apache-2.0
"""What the figures say, in sentences that are only there if the figures are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from benchmarks.evidence.tables import Results, change, divergence
from benchmarks.quality.metrics import paired_difference

TARGETS = {"mse": 0.02, "gptq": 0.01}
"""Perplexity over BF16 that preset balanced may cost, without and with calibration."""
_SURE = 2.0
"""Standard errors that a difference must have to be called one."""
_LONG_FROM, _SHORT_FROM, _SHORT_TO = 8192, 512, 2048
_METHODS = ("minmax", "mse", "gptq")
_LEFT_OUT = {
    "what `quality` leaves": "quality-g128",
    "the first two layers": "balanced-but-first-two",
    "the last two layers": "balanced-but-last-two",
    "all out_proj": "balanced-but-out_proj",
    "all down_proj": "balanced-but-down_proj",
}


def findings(results: Results) -> Iterator[str]:
    """Sentences about all that was measured. KL is in thousandths of a nat."""
    yield from _targets(results)
    yield from _algorithms(results)
    yield from _groups(results)
    yield from _zeros(results)
    yield from _peers(results)
    yield from _kinds(results)
    yield from _left_out(results)
    yield from _positions(results)


def against_the_tool(results: Results) -> Iterator[str]:
    """Sentences about what llm-compressor itself made: a file of evidence/llm_compressor.py."""
    theirs = {
        name: f"`{name.removeprefix('llm-compressor-')}` ({row['bits']:.2f} bits)"
        for name, row in results.items()
        if name.startswith("llm-compressor-") and "-gptq-" in name
    }
    for name, row in results.items():
        if not name.startswith("linears-"):
            continue
        each = [
            f"{compare(results, name, their)} KL than {words}" for their, words in theirs.items()
        ]
        if each:
            yield f"Our `{name}` ({row['bits']:.2f} bits) has {', '.join(each)}."


def verdict(value: float, error: float, limit: float) -> str:
    """Whether a value is under a limit, as sure as its error allows."""
    if value + _SURE * error <= limit:
        return "met"
    return "missed" if value - _SURE * error > limit else "undecided, within two errors of it"


def compare(results: Results, one: str, other: str) -> str | None:
    """How the KL divergence of a case stands to another's, window by window; None if not there."""
    if one not in results or other not in results:
        return None
    mean, error = paired_difference(results[one]["kl_by_window"], results[other]["kl_by_window"])
    if abs(mean) <= _SURE * error:
        return "no measurably different"
    share = mean / results[other]["kl_divergence"]
    return f"{100 * abs(share):.0f} % {'less' if mean < 0 else 'more'}"


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
    for preset in ("balanced", "quality", "ssm", "full"):
        names = [f"{preset}-g128-{m}" for m in _METHODS if f"{preset}-g128-{m}" in results]
        if len(names) < 2:
            continue
        each = [f"`{names[0].split('-')[-1]}` {divergence(results[names[0]])}"]
        each += [
            f"`{name.split('-')[-1]}` {divergence(results[name])} ({compare(results, name, last)})"
            for last, name in pairwise(names)
        ]
        yield f"KL of `{preset}`, each algorithm against the one before: {', '.join(each)}."


def _groups(results: Results) -> Iterator[str]:
    for method in _METHODS:
        whole = f"balanced-g128-{method}"
        each = [
            f"groups of {size} have {found} KL in {results[name]['bits']:.2f} bits"
            for size in (64, 32)
            if (found := compare(results, name := f"balanced-g{size}-{method}", whole))
        ]
        if each:
            bits = f"{results[whole]['bits']:.2f}"
            yield f"Beside groups of 128 ({bits} bits), with `{method}`: {', '.join(each)}."


def _zeros(results: Results) -> Iterator[str]:
    for size in (128, 32):
        names = {method: f"balanced-g{size}-{method}" for method in _METHODS}
        each = [
            f"{found} with `{method}`"
            for method, name in names.items()
            if (found := compare(results, f"{name}-int", name))
        ]
        if each:
            yield (
                f"Zero points rounded to whole numbers change KL, in groups of {size}: "
                f"{', '.join(each)}."
            )


def _peers(results: Results) -> Iterator[str]:
    for size in (128, 32):
        ours = f"linears-g{size}-gptq"
        each = []
        for peer in ("gptq-sym", "gptq-mse-sym", "gptq-asym"):
            theirs = f"linears-g{size}-{peer}"
            found = compare(results, ours, theirs)
            if found:
                each.append(f"{found} KL than `{peer}` ({results[theirs]['bits']:.2f} bits)")
        if each:
            yield (
                f"Beside llm-compressor's GPTQ, simulated, groups of {size}: our `gptq` "
                f"({results[ours]['bits']:.2f} bits) has {', '.join(each)}."
            )
    # More bits must not be what makes ours better: smaller groups of theirs have more.
    found = compare(results, "linears-g128-gptq", "linears-g32-gptq-sym")
    if found:
        yield (
            "And with more bits on their side, ours in groups of 128 against `gptq-sym` in "
            f"groups of 32: {found} KL."
        )


def _kinds(results: Results) -> Iterator[str]:
    names = ("in_proj", "out_proj", "up_proj", "down_proj", "qkv", "o_proj", "lm_head")
    rows = {name: results.get(f"only-{name}-mse") for name in names}
    found: dict[str, dict[str, Any]] = {name: row for name, row in rows.items() if row}
    if len(found) < 2:
        return
    order = sorted(found, key=lambda name: -found[name]["kl_divergence"])
    dearest = ", ".join(f"{name} {divergence(found[name])}" for name in order)
    yield f"KL of each kind of weight alone (`mse`): {dearest}."
    by_weight = sorted(order, key=lambda n: -found[n]["kl_divergence"] / found[n]["weights"])
    yield f"For each weight that becomes int4, in falling order: {', '.join(by_weight)}."
    parts = {p: results.get(f"only-in_proj-{p}-mse") for p in ("gate", "x", "B", "C", "dt")}
    there = {part: row for part, row in parts.items() if row}
    if there:
        each = ", ".join(f"{part} {divergence(row)}" for part, row in there.items())
        yield f"Of in_proj by its parts: {each}."


def _left_out(results: Results) -> Iterator[str]:
    for method in ("mse", "gptq"):
        whole = results.get(f"balanced-g128-{method}")
        if not whole:
            continue
        each = []
        for words, case in _LEFT_OUT.items():
            name = f"{case}-{method}"
            if name in results:
                share = 1 - results[name]["weights"] / whole["weights"]
                found = compare(results, name, f"balanced-g128-{method}")
                each.append(f"{words} ({100 * share:.0f} % of the weights): {found} KL")
        if each:
            yield f"Left in BF16 by `balanced` with `{method}`: {'; '.join(each)}."


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
