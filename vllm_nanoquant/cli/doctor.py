# SPDX-License-Identifier: Apache-2.0
"""``nanoquant doctor``."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from typing import Any

from vllm_nanoquant.cli.output import OK, PROBLEM, add_command, add_json_option, print_json

_EXAMPLES = """\
examples:
  nanoquant doctor
  nanoquant doctor --json

exit status: 0 nothing fails, though there may be warnings; 1 something fails
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = add_command(
        commands,
        "doctor",
        "check this machine and this environment",
        "Check Python, vLLM, torch, Triton, GPUs, driver, entry point, settings and caches; takes "
        "as long as importing vLLM. Run it in the shell that vLLM is to run in.",
        _EXAMPLES,
    )
    add_json_option(parser)
    parser.set_defaults(run=run, after_interrupt="")


def run(options: argparse.Namespace) -> int:
    """Carry the command out; 1 where something fails."""
    # Not at the top: reading options is quick.
    from vllm_nanoquant.doctor import gather, judge

    findings = judge(gather())
    counts = Counter(finding.status for finding in findings)
    if options.json:
        print_json(
            {
                "findings": [dataclasses.asdict(finding) for finding in findings],
                "summary": {status: counts[status] for status in ("pass", "warn", "fail")},
            }
        )
    else:
        for finding in findings:
            way_out = f": {finding.way_out}" if finding.way_out else ""
            print(f"{finding.status}  {finding.name} {finding.found}{way_out}")
        print(f"passed: {counts['pass']}, warnings: {counts['warn']}, failed: {counts['fail']}")
    return PROBLEM if counts["fail"] else OK
