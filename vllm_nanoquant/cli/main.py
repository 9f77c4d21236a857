# SPDX-License-Identifier: Apache-2.0
"""``nanoquant``: int4 models planned, served, measured, made and checked; a machine checked.

Importing this is quick: a command imports torch when it runs, not when its options are read.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from vllm_nanoquant import __version__
from vllm_nanoquant.cli import (
    bench,
    card,
    convert,
    doctor,
    evaluate,
    inspect,
    plan,
    quantize,
    serve,
    verify,
)
from vllm_nanoquant.cli.output import OK, PROBLEM, USAGE, print_json

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells give it."""

_COMMANDS = (plan, serve, bench, quantize, convert, verify, inspect, card, evaluate, doctor)

_EXAMPLES = """\
examples:
  nanoquant plan nvidia/NVIDIA-Nemotron-Nano-9B-v2 --gpu-memory 24GiB
  nanoquant serve nvidia/NVIDIA-Nemotron-Nano-9B-v2
  nanoquant bench serve

  nanoquant quantize nvidia/NVIDIA-Nemotron-Nano-9B-v2 nano-9b-int4
  nanoquant verify nano-9b-int4
  nanoquant serve nano-9b-int4

  nanoquant eval --list
  nanoquant doctor

exit status: 0 all is well; 1 a problem was found; 2 wrong usage; 130 interrupted
"""


class _WrongUsage(Exception):
    """Arguments that argparse refuses."""


class _Parser(argparse.ArgumentParser):
    """Leaves it to `main` to tell what is wrong, so that it can be told as JSON."""

    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(f"{message}; see {self.prog} --help")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="nanoquant",
        description="int4 models for vLLM: planned, served, measured, made, checked and described.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nanoquant {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_to(commands)
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command; what it hands on to another program is its ``more``."""
    parser = make_parser()
    options, more = parser.parse_known_args(arguments)
    if more and not getattr(options, "takes_more", False):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.more = more
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Whatever goes wrong is one line on standard error, and with ``--json`` an object with the key
    ``error`` on standard output as well.

    Args:
        arguments: without the program's name; None takes those of the process.

    Raises:
        SystemExit: by argparse, for ``--help`` and ``--version``.
    """
    given = sys.argv[1:] if arguments is None else arguments
    after_interrupt = ""
    try:
        options = _parse(given)
        after_interrupt = options.after_interrupt
        status: int = options.run(options)
        # Here, and not at exit, so that a closed pipe is noticed where it can be dealt with.
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, `head` say, has seen enough. The interpreter flushes once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print(f"\nnanoquant: interrupted{after_interrupt}", file=sys.stderr)
        status, text = INTERRUPTED, "interrupted"
    except _WrongUsage as error:
        status, text = USAGE, str(error)
        print(f"nanoquant: error: {text}", file=sys.stderr)
    except (OSError, ValueError) as error:
        status, text = _explain(error, after_interrupt)
        print(f"nanoquant: error: {text}", file=sys.stderr)
    if "--json" in given:
        print_json({"error": text})
    return status


def _explain(error: OSError | ValueError, after_interrupt: str) -> tuple[int, str]:
    """Exit status and text for an error that is not this program's; raises one that is."""
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        full = after_interrupt if error.errno == errno.ENOSPC else ""
        return PROBLEM, f"{place}{error.strerror or error}{full}"
    # Not at the top: pydantic, which recipes are made of, takes a while to import.
    from vllm_nanoquant.checkpoint.errors import CheckpointError, UsageError
    from vllm_nanoquant.recipe import RecipeError

    if not isinstance(error, CheckpointError | RecipeError):
        raise error
    return USAGE if isinstance(error, UsageError | RecipeError) else PROBLEM, str(error)


if __name__ == "__main__":
    sys.exit(main())
