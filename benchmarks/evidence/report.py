# SPDX-License-Identifier: Apache-2.0
"""Result files as they are written: whole, and to be read by people too."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vllm_nanoquant.files import write_whole

# Lists of numbers, which are to stand on one line.
_NUMBERS = re.compile(r"\[([-+\d.,e\s]+)\]")


def continued(path: Path, problem: dict[str, Any], machine: dict[str, Any]) -> dict[str, Any]:
    """The report that is at `path` already; empty where there is none.

    Args:
        path: of the result file.
        problem: what is measured now, and how.
        machine: what it is measured on.

    Raises:
        ValueError: what is there was measured in another way, so that its figures and those to come
            do not belong into one table.
    """
    if not path.exists():
        return {}
    before = json.loads(path.read_text("utf-8"))
    for key, now in {"problem": problem, "machine": machine}.items():
        if before.get(key) != now:
            raise ValueError(
                f"{path} was made with other options or on another machine: its {key!r} is "
                f"{before.get(key)}, not {now}; give another --output, or remove it"
            )
    return before


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON; what was there stays until all of it is."""
    text = json.dumps(report, indent=1)
    text = _NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_whole(path, text + "\n")
