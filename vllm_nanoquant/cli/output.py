# SPDX-License-Identifier: Apache-2.0
"""What commands share: exit statuses, options, tables and progress."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

OK = 0
PROBLEM = 1
"""A checkpoint is damaged, or work on it failed."""
USAGE = 2
"""What was asked for makes no sense; argparse uses the same."""

RUN_AGAIN = "; run the same command again to go on"
"""What to say after an interruption of work that can be resumed."""

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add_command(
    commands: Any, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Add a command, without options yet, to argparse's sub-parsers."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_source_and_target(parser: argparse.ArgumentParser) -> None:
    """Add what a command reads and what it makes."""
    parser.add_argument("source", metavar="SRC", help="folder, or model id of the Hugging Face Hub")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make")
    parser.add_argument("--revision", help="branch, tag or commit of a model of the Hub")


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Add how a checkpoint is written."""
    parser.add_argument(
        "--max-shard-size",
        type=size_option,
        default="4.5GB",
        metavar="SIZE",
        help="largest file of the result (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="cpu (default; every core), cuda or cuda:1 for the arithmetic",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``: one JSON object on standard output, and nothing else there."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def check_device(name: str) -> None:
    """Refuse a device that torch does not have here, or that holds no numbers, as ``meta``.

    Raises:
        UsageError: one of these.
    """
    # Not at the top: importing the command line is quick.
    import torch

    from vllm_nanoquant.checkpoint.errors import UsageError

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"--device {name}: torch {torch.__version__} has no such device") from None


def print_json(value: dict[str, Any]) -> None:
    """Print a result for programs."""
    print(json.dumps(value, indent=1))


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table for people; the first two columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.2f} MB"


def size_option(text: str) -> int:
    """Bytes of ``4.5GB``, ``500MB`` or a plain number, for argparse.

    Raises:
        argparse.ArgumentTypeError: anything else, or less than a megabyte.
    """
    number = text.strip().upper().rstrip("BKMGT")
    unit = text.strip().upper()[len(number) :]
    try:
        size = int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 4.5GB or 500MB") from None
    if size < 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is less than 1MB")
    return size


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar in bytes on standard error; gives a function to call with bytes done.

    It appears with the first of them, so that it is not in the way of an early error.
    """
    # Not at the top: importing the command line is quick.
    from tqdm import tqdm

    with ExitStack() as stack:
        bar: Any = None

        def update(count: int) -> None:
            nonlocal bar
            if bar is None:
                bar = tqdm(total=total, unit="B", unit_scale=True, desc=label, file=sys.stderr)
                stack.enter_context(bar)
            bar.update(count)

        yield update
