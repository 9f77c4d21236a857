# SPDX-License-Identifier: Apache-2.0
"""``nanoquant card DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vllm_nanoquant.cli.output import OK, add_command, add_json_option, print_json

_EXAMPLES = """\
examples:
  nanoquant card nano-9b-int4
  nanoquant card nano-9b-int4 --results perplexity.json end_to_end.json
"""


def add_to(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = add_command(
        commands,
        "card",
        "write a model card",
        "Write README.md for a checkpoint from its report and from measured results.",
        _EXAMPLES,
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="the checkpoint")
    parser.add_argument(
        "--results",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="result files of the benchmarks, whose figures the card lists",
    )
    add_json_option(parser)
    parser.set_defaults(run=run, after_interrupt="")


def run(options: argparse.Namespace) -> int:
    """Carry the command out.

    Raises:
        UsageError, CheckpointError: as `checkpoint.card.make_card`.
        OSError: the file cannot be written.
    """
    # Not at the top: this imports torch.
    from vllm_nanoquant.checkpoint.card import make_card
    from vllm_nanoquant.files import write_durable

    path = options.folder / "README.md"
    write_durable(path, make_card(options.folder, options.results).encode())
    if options.json:
        print_json({"card": str(path)})
    else:
        print(f"{path}: written")
    return OK
