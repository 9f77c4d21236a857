# SPDX-License-Identifier: Apache-2.0
"""Put the figures of moe.py into Markdown files, between the lines with moe:begin and moe:end.

python benchmarks/kernels/moe_table.py RESULT.json --write docs/benchmarks.md
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.sections import NOTHING, markdown_table
from benchmarks.kernels.table import put_section

MARKERS = ("<!-- moe:begin -->", "<!-- moe:end -->")
LABELS = {
    "ours": "ours",
    "bf16": "BF16 (vLLM's Triton)",
    "marlin": "int4 (vLLM's Marlin)",
    "triton_int4": "int4 (vLLM's Triton)",
}
ROUTES = {
    "random": "Random routes",
    "popular": "All tokens of a call choose the same experts",
}


def tables(report: dict[str, Any]) -> str:
    """Microseconds of each contestant by tokens, for both kinds of routes, and what was refused."""
    problem, packages = report["problem"], report["packages"]
    names = ", ".join(f"{name} {packages[name]}" for name in ("torch", "triton", "vllm"))
    parts = [
        f"{problem['experts']} experts of {problem['intermediate']} x {problem['hidden']}, "
        f"{problem['top_k']} per token, squared ReLU, one {report['device']['name']} ({names}), "
        "microseconds; made by `benchmarks/kernels/moe_table.py`."
    ]
    if not report.get("complete", True):  # files of before had no such key, and were whole
        parts.append("The run did not come to its end.")
    for routes, title in ROUTES.items():
        rows = [row for row in report["results"] if row["routes"] == routes]
        parts.append(f"{title}:\n\n{_table(rows)}")
    for refusal in report.get("refused", ()):
        at = (
            f", {refusal['routes']} routes, {refusal['tokens']} tokens"
            if "tokens" in refusal
            else ""
        )
        parts.append(f"{LABELS[refusal['peer']]}{at}: {refusal['reason']}")
    return "\n\n".join(parts)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    tokens = sorted({row["tokens"] for row in rows})
    times = {(row["peer"], row["tokens"]): row for row in rows}
    lines = []
    for peer in dict.fromkeys(row["peer"] for row in rows):
        cells = []
        for count in tokens:
            best = min(row["us"] for row in rows if row["tokens"] == count)
            if (peer, count) not in times:
                cells.append(NOTHING)
                continue
            us = times[peer, count]["us"]
            cells.append(f"**{us:.0f}**" if us == best else f"{us:.0f}")
        error = max(row["error"] for row in rows if row["peer"] == peer)
        lines.append([LABELS[peer], *cells, f"{error:.1e}"])
    head = ["tokens", *map(str, tokens), "greatest error"]
    return "\n".join(markdown_table(head, lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status."""
    what = (__doc__ or "").splitlines()[0]
    return put_section(arguments, what, "moe.py", tables, MARKERS)


if __name__ == "__main__":
    sys.exit(main())
