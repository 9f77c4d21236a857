# SPDX-License-Identifier: Apache-2.0
"""Put figures of run.py into Markdown files, between the lines with contest:begin and contest:end.

python benchmarks/end_to_end/table.py RESULT.json --write docs/benchmarks.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.common import VLLM
from benchmarks.kernels.sections import NOTHING, markdown_table
from benchmarks.kernels.table import put_section

MARKERS = ("<!-- contest:begin -->", "<!-- contest:end -->")
LABELS = {
    "bf16": "BF16",
    "fp8": "vLLM's FP8",
    "int4-vllm": "vLLM's int4, Machete and Marlin",
    "int4-marlin": "vLLM's int4, Marlin",
}
RATES, FIRST = "decode_tokens_per_second", "time_to_first_token_ms"
# A figure whose repetitions differ by more than this share of the median was disturbed.
DISTURBED = 0.15


def tables(report: dict[str, Any]) -> str:
    """Tokens per second, time to the first token and memory of each contestant.

    Raises:
        ValueError: there are no such figures.
    """
    problem, packages = report["problem"], report["packages"]
    known = [name for name in (*VLLM, "torch", "triton") if name in packages]
    names = ", ".join(f"{name} {packages[name]}" for name in known)
    ran = {name: row for name, row in report["results"].items() if "error" not in row}
    if not ran:
        raise ValueError("every contestant failed, so there is nothing for a table")
    if not all(row[RATES] and row[FIRST] for row in ran.values()):
        raise ValueError("nothing was timed: run.py without --only-load does that")
    parts = [
        [
            f"{problem['geometry']}, {problem['weights']} weights, one {report['device']} "
            f"({names}); made by `benchmarks/end_to_end/table.py`. Medians, with the least and the "
            f"most of the repetitions; † where these differ by more than {DISTURBED:.0%} of it."
        ],
        ["Decoding, tokens per second of all sequences together:"],
        list(_timed(ran, RATES, "batch", ".0f", best=max)),
        ["Milliseconds to the first token of a prompt of so many tokens:"],
        list(_timed(ran, FIRST, "tokens", ".0f", best=min)),
        ["GiB of the model as vLLM logs it, and at the peak while loading:"],
        list(_memory(ran)),
    ]
    failed = [label(name) for name in report["results"] if name not in ran]
    if failed:
        parts.append([f"Did not run: {', '.join(failed)}."])
    return "\n\n".join("\n".join(part) for part in parts)


def label(name: str) -> str:
    """How a table calls a contestant."""
    return LABELS.get(name, f"ours, `{name}`")


def _timed(ran: dict[str, Any], figure: str, head: str, digits: str, best: Any) -> Iterator[str]:
    counts = list(next(iter(ran.values()))[figure])
    winners = {
        count: best(row[figure][count]["median"] for row in ran.values()) for count in counts
    }
    rows = []
    for name, row in ran.items():
        cells = []
        for count in counts:
            found = row[figure][count]
            median = f"{found['median']:{digits}}"
            bold = f"**{median}**" if found["median"] == winners[count] else median
            mark = " †" if found["max"] - found["min"] > DISTURBED * found["median"] else ""
            cells.append(f"{bold} ({found['min']:{digits}}-{found['max']:{digits}}){mark}")
        rows.append([label(name), *cells])
    yield from markdown_table([head, *counts], rows)


def _memory(ran: dict[str, Any]) -> Iterator[str]:
    figures = ("weights_gib", "peak_gib_while_loading")  # vLLM for CPUs logs neither
    rows = [
        [label(name), *(f"{row[each]:.2f}" if each in row else NOTHING for each in figures)]
        for name, row in ran.items()
    ]
    yield from markdown_table(["weights", "model", "peak"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    what = (__doc__ or "").splitlines()[0]
    return put_section(arguments, what, "run.py", tables, MARKERS)


if __name__ == "__main__":
    sys.exit(main())
