# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/quality.md, out of the result files.

python benchmarks/quality/table.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
QUALITY = RESULTS / "tiny-quality.json"
SERVED = RESULTS / "tiny-served-llm-compressor.json"

_PAIRS = {"ours_stock": "ours, stock", "stock_exact": "stock, exact", "ours_exact": "ours, exact"}


def quality_rows(report: dict[str, Any]) -> Iterator[str]:
    """One line for each checkpoint, in the order of the file."""
    yield (
        "| checkpoint | perplexity | loss over BF16, 10^-3 nats | KL, 10^-3 nats | agreement "
        "| relative error | bits |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name, row in report["results"].items():
        cells = [f"`{name}`", f"{row['perplexity']:.3f}"]
        if row["relative_error"] is None:
            cells += ["", "", "", "", "16"]
        else:
            loss, error = row["loss_over_stock"], row["loss_over_stock_error"]
            cells += [f"{1e3 * loss:+.2f} ± {1e3 * error:.2f}", f"{1e3 * row['kl_divergence']:.2f}"]
            cells += [f"{100 * row['agreement']:.2f} %", f"{row['relative_error']:.4f}"]
            cells += [f"{row['bits_per_quantized_weight']:.2f}"]
        yield f"| {' | '.join(cells)} |"


def comparison_rows(report: dict[str, Any]) -> Iterator[str]:
    """One line for each pair of ours and llm-compressor's."""
    yield "| ours | llm-compressor | KL, 10^-3 nats | loss, 10^-3 nats |"
    yield "|---|---|---|---|"
    for row in report.get("comparisons", ()):
        ours = row["ours"].rpartition("-")[2]
        theirs = row["theirs"].removeprefix("llm-compressor ")
        kl = f"{1e3 * row['kl_difference']:+.2f} ± {1e3 * row['kl_difference_error']:.2f}"
        loss = f"{1e3 * row['loss_difference']:+.2f} ± {1e3 * row['loss_difference_error']:.2f}"
        yield f"| `{ours}` | `{theirs}` | {kl} | {loss} |"


def served_rows(report: dict[str, Any]) -> Iterator[str]:
    """One line for each two sets of log probabilities."""
    yield "| checkpoint | between | rms | 99.9 % below | greatest | KL, 10^-6 nats | agreement |"
    yield "|---|---|---|---|---|---|---|"
    yield _served_row("BF16 model", "stock, exact", report["bf16_model_stock_exact"])
    for name, result in report["results"].items():
        for key, between in _PAIRS.items():
            if key in result:
                yield _served_row(f"`{name}`", between, result[key])


def _served_row(name: str, between: str, row: dict[str, float]) -> str:
    cells = [name, between, f"{row['rms']:.4f}", f"{row['p999']:.3f}", f"{row['greatest']:.3f}"]
    cells += [f"{1e6 * row['kl_divergence']:.0f}", f"{100 * row['agreement']:.2f} %"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the tables."""
    quality = json.loads(QUALITY.read_text(encoding="utf-8"))
    served = json.loads(SERVED.read_text(encoding="utf-8"))
    for rows in (quality_rows(quality), comparison_rows(quality), served_rows(served)):
        print("\n".join(rows), end="\n\n")


if __name__ == "__main__":
    main()
