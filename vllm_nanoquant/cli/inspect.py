# SPDX-License-Identifier: Apache-2.0
"""``nanoquant inspect DIR``."""

from __future__ import annotations

import argparse
from typing import Any

from vllm_nanoquant.cli.output import (
    OK,
    add_command,
    add_json_option,
    megabytes,
    print_json,
    print_table,
)

_EXAMPLES = """\
examples:
  nanoquant inspect nano-9b-int4
  nanoquant inspect nano-9b-int4 --json
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = add_command(
        commands,
        "inspect",
        "say what a checkpoint is",
        "Say what a checkpoint is, by its config.json and headers; no weight is read.",
        _EXAMPLES,
    )
    parser.add_argument("folder", metavar="DIR", help="folder, or model id of the Hugging Face Hub")
    add_json_option(parser)
    parser.set_defaults(run=run, after_interrupt="")


def run(options: argparse.Namespace) -> int:
    """Carry the command out.

    Raises:
        UsageError, CheckpointError: as `checkpoint.source.find_source` and `inspect`.
    """
    # Not at the top: these import torch.
    from vllm_nanoquant.checkpoint.inspect import inspect
    from vllm_nanoquant.checkpoint.source import find_source

    summary = inspect(find_source(options.folder))
    if options.json:
        print_json(summary.as_json())
        return OK
    print(f"{options.folder}: {summary.kind}, files: {summary.files}")
    if summary.recipe:
        shown = {key: value for key, value in summary.recipe.items() if value not in ([], {})}
        print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items()))
    if summary.relative_error is not None:
        print(f"mean relative error {summary.relative_error:.4f}")
    print()
    rows = [
        (
            row.role,
            row.format,
            str(row.modules),
            f"{row.bits:.2f}" if row.bits else "?",
            megabytes(row.nbytes),
        )
        for row in (*summary.rows, summary.total)
    ]
    print_table(("part", "format", "modules", "bits", "size"), rows)
    return OK
