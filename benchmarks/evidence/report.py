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


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON; what was there stays until all of it is."""
    text = json.dumps(report, indent=1)
    text = _NUMBERS.sub(lambda found: "[" + " ".join(found[1].split()) + "]", text)
    write_whole(path, text + "\n")
