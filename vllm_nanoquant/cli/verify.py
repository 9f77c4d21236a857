# SPDX-License-Identifier: Apache-2.0
"""``nanoquant verify DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_nanoquant.cli.output import (
    OK,
    PROBLEM,
    add_command,
    add_json_option,
    megabytes,
    print_json,
    progress,
)

_EXAMPLES = """\
examples:
  nanoquant verify nano-9b-int4
  nanoquant verify nano-9b-int4 --against nvidia/NVIDIA-Nemotron-Nano-9B-v2
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = add_command(
        commands,
        "verify",
        "check a checkpoint, with neither GPU nor vLLM",
        "Check every file, header and byte of a checkpoint, quantized or stock.",
        _EXAMPLES,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the checkpoint")
    parser.add_argument(
        "--against", metavar="SRC", help="the stock checkpoint, to compare every tensor with"
    )
    add_json_option(parser)
    parser.set_defaults(run=run, after_interrupt="")


def run(options: argparse.Namespace) -> int:
    """Carry the command out; 1 where there is a problem.

    Raises:
        UsageError: as `checkpoint.verify.verify` and `checkpoint.source.find_source`.
    """
    # Not at the top: these import torch.
    from vllm_nanoquant.checkpoint.source import find_source
    from vllm_nanoquant.checkpoint.verify import verify

    against = find_source(options.against) if options.against else None
    total = sum(
        path.stat().st_size for path in options.folder.glob("*.safetensors") if path.is_file()
    )
    with progress("verify", total) as update:
        findings = verify(options.folder, against, update)
    if options.json:
        print_json(
            {
                "folder": str(options.folder),
                "sound": not findings.problems,
                "problems": findings.problems,
                "notes": findings.notes,
                "tensors": findings.tensors,
                "bytes": findings.nbytes,
                "relative_errors": findings.errors,
            }
        )
    else:
        for name, error in findings.errors.items():
            print(f"{error:8.5f}  {name}")
        for note in findings.notes:
            print(f"note: {note}")
        for problem in findings.problems:
            print(f"problem: {problem}")
        if findings.problems:
            print(f"{options.folder}: problems found: {len(findings.problems)}")
        else:
            print(
                f"{options.folder}: sound, {findings.tensors} tensors, {megabytes(findings.nbytes)}"
            )
    return PROBLEM if findings.problems else OK
