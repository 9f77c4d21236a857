# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/evidence.md, out of the result files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

Results = dict[str, dict[str, Any]]

SECTIONS = ("presets", "groups", "zeros", "peers", "kinds", "left-out", "calibration", "layers")


def percent(row: dict[str, Any], key: str) -> str:
    """A share and its error."""
    return f"{100 * row[key]:.2f} ± {100 * row[f'{key}_error']:.2f} %"


def change(row: dict[str, Any]) -> str:
    """The perplexity over BF16's."""
    value, error = row["perplexity_change"], row["perplexity_change_error"]
    return f"{100 * value:+.2f} ± {100 * error:.2f} %"


def divergence(row: dict[str, Any]) -> str:
    """KL divergence in thousandths of a nat."""
    return f"{1e3 * row['kl_divergence']:.2f} ± {1e3 * row['kl_divergence_error']:.2f}"


def section_rows(results: Results, section: str) -> Iterator[str]:
    """The table of one section, in the order of the file."""
    rows = [(name, row) for name, row in results.items() if row["section"] == section]
    if section in ("kinds", "layers"):
        rows.sort(key=lambda item: -item[1]["kl_divergence"])
    yield from header(
        "case", "bits", "weights, M", "perplexity over BF16", "KL, 10^-3 nats", "agreement"
    )
    for name, row in rows:
        yield line(
            f"`{name}`",
            f"{row['bits']:.3f}",
            f"{row['weights'] / 1e6:.1f}",
            change(row),
            divergence(row),
            percent(row, "agreement"),
        )


def position_rows(results: Results) -> Iterator[str]:
    """KL divergence by the position in long documents, one line for each case."""
    long = {name: row["long"] for name, row in results.items() if "long" in row}
    if not long:
        return
    ranges = [f"{p['first']} to {p['stop']}" for p in long["bf16"]["positions"]]
    yield from header("case", "perplexity over BF16", *ranges)
    stock = [f"{part['perplexity']:.2f}" for part in long["bf16"]["positions"]]
    yield line("BF16's perplexity", f"{long['bf16']['perplexity']:.2f}", *stock)
    for name, row in long.items():
        if name != "bf16":
            yield line(f"`{name}`", change(row), *map(divergence, row["positions"]))


def training_rows(training: dict[str, Any]) -> Iterator[str]:
    """What the training was and what it came to."""
    options, heldout = training["options"], training["heldout"]
    yield from header("", "")
    facts = {
        "parameters": f"{training['parameters']:,}",
        "layers": f"`{training['model']['pattern']}`",
        "training text": f"{training['data']['tokens']['train']:,} tokens, "
        f"{training['data']['characters'] / 1e6:.0f} M characters",
        "tokens seen": f"{training['tokens_seen']:,} in {training['steps']} steps of "
        f"{options['batch_tokens']:,}",
        "windows": f"{options['seq_len']} tokens, in the last {100 * options['long_share']:.0f} % "
        f"of the time {options['long_len']}",
        "speed": f"{training['tokens_per_second']:,} tokens/s on {training['machine']['gpu']}",
        "time": f"{training['seconds'] / 60:.1f} minutes, compilation and figures included",
        "held-out text": f"perplexity {heldout['perplexity_per_token']:.2f} of a token, "
        f"{heldout['bits_per_byte']:.3f} bits per byte ({heldout['tokens_scored']:,} tokens)",
        "steps left out": str(training["steps_left_out"]),
    }
    for name, fact in facts.items():
        yield line(name, fact)


def header(*cells: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield line(*cells)
    yield "|" + "---|" * len(cells)


def line(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def table(rows: Iterable[str]) -> str:
    """Lines as a block of text."""
    return "\n".join(rows)
